"""Load stored tensors into a model, and check the names and shapes on both sides.

In: the folders of a model (`CheckpointInfo` of a checkpoint and of its base) and the names and shapes that the model
expects. Out: a model with every weight loaded from a file, or an `InputError` that names file, tensor, expected and found
shapes. What a folder holds is decided in inspect.py; which model is built, on which device, in model/builder.py.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava.errors import InputError
from llava.model.checkpoints.converted import convert_headers
from llava.model.checkpoints.hf_layout import comparable_name
from llava.model.checkpoints.inspect import (
    EMBEDDING_TABLES,
    OUTPUT_LAYER,
    PROJECTOR_INFIX,
    TOWER_INFIX,
    VOCABULARY,
    CheckpointInfo,
    tower_headers,
)
from llava.model.checkpoints.lora import LoraMerge, load_adapter
from llava.model.checkpoints.weight_files import TensorHeader, open_tensors, read_tensor
from llava.model.config import described_by
from llava.model.transformers_internals import current_names
from llava.utils import waiting

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

# Buffers that old versions of transformers saved and every version computes; they are skipped.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.position_ids|\.attn\.(masked_)?bias|\.rotary_emb\.(cos|sin)_cached)$")

# Stored names whose absence in the model means that the config is wrong: one layer more, another type of projector.
STRUCTURAL = re.compile(r"(\.(layers|blocks|h)\.\d+\.|mm_projector\.)")

# A projector file's tensors, whose saved names may begin with any module path.
ADDED_PART = re.compile(
    r"(?:.*\.)?((?:mm_projector\.|vision_tower\.vision_tower\.).+|image_newline|faster_token|"
    rf"(?:{'|'.join(EMBEDDING_TABLES)})\.weight)"
)

TOO_LARGE = (
    "the model does not fit into the memory that device_map and max_memory allow, and no part of it is read from disk at every "
    "step; allow more, use more GPUs, or load it in 8 or 4 bits"
)

# Where each weight of a model comes from, by name: the file that it was read from, or the reason why it was made.
Origins = dict[str, str]


@dataclass(frozen=True)
class WeightSources:
    """The stored tensor for each published name of a model, and the adapter to merge while loading."""

    headers: Mapping[str, TensorHeader] = field(repr=False)
    folder: str
    merge: LoraMerge | None = None
    stores_tower: bool = False  # the checkpoint's or its base's stored tower is used, not its own folder's weights
    merges_tower: bool = False  # the adapter changes the tower
    unused_tower: Mapping[str, TensorHeader] = field(repr=False, default_factory=dict)  # stored beside a frozen tower
    may_grow_vocabulary: bool = False  # a base model has fewer rows than the checkpoint that adds image tokens


def plan_sources(info: CheckpointInfo, base: CheckpointInfo | None, *, prefix: str) -> WeightSources:
    """Combine a checkpoint's tensors with its base model's, which they override.

    `prefix` is the name of the inner model within the language model, `model` for LLaMA.
    """
    own = dict(info.tensors)
    for name, header in info.extras.items():
        match = ADDED_PART.fullmatch(name)
        if match is None or (base is not None and name in base.tensors):  # an embedding table may lie deeper
            own[name] = header
        else:
            own[f"{prefix}.{match[1]}"] = header
    headers = {**base.tensors, **base.extras, **own} if base is not None else own
    if info.adapter_changes_vocabulary and not any(
        map(OUTPUT_LAYER.search, headers)
    ):  # tied in the base, and not any more
        headers["lm_head.weight"] = next(header for name, header in headers.items() if VOCABULARY.search(name))
    merge = None
    for layer in (*(base.adapters_below if base is not None else ()), info):
        if layer.adapter:
            merge = load_adapter(layer.merged_adapter, layer.adapter_config or {}, after=merge)
    tower = {name: header for name, header in headers.items() if TOWER_INFIX in name}
    is_trained = info.trains_tower or (base is not None and base.trains_tower)
    return WeightSources(
        headers=headers if is_trained else {name: header for name, header in headers.items() if name not in tower},
        folder=str(info.folder) if base is None else f"{info.folder} with the base {base.folder}",
        merge=merge,
        stores_tower=bool(tower) and is_trained,
        merges_tower=info.adapter_changes_tower,
        unused_tower={} if is_trained else tower,
        may_grow_vocabulary=info.needs_base,
    )


def with_own_tower(sources: WeightSources, folder: Path, *, prefix: str) -> WeightSources:
    """Add the tensors of a tower's own folder to the sources, under the names that they have in the model."""
    inner = f"{prefix}.vision_tower."
    towers = {inner + name: header for name, header in tower_headers(folder).items()}
    return replace(sources, headers={**sources.headers, **towers})


def match_names(expected: Mapping[str, Tensor], sources: WeightSources, model: nn.Module) -> dict[str, TensorHeader]:
    """Find the stored tensor for every name that a model expects; of tied names one must be stored.

    Names of modules that transformers renamed since are read as it reads them.

    Raises:
        InputError: Keys are missing or unexpected, or shapes differ.
    """
    own_names = {comparable_name(name): name for name in expected}
    headers = sources.headers
    unknown = [name for name in headers if comparable_name(name) not in own_names]
    if unknown:
        names = current_names(model, unknown, comparable_name)
        headers = {names.get(name, name): header for name, header in headers.items()}
        headers = convert_headers(model, headers, [n for n in headers if comparable_name(n) not in own_names])
        unknown = [name for name in headers if comparable_name(name) not in own_names]
    found = {
        own_names[comparable_name(name)]: header
        for name, header in headers.items()
        if comparable_name(name) in own_names
    }
    _refuse_unexpected_keys({name: headers[name] for name in unknown})

    satisfied = {id(expected[name]) for name in found}
    missing = [name for name in expected if id(expected[name]) not in satisfied]
    if missing:
        raise InputError(
            f"tensor {missing[0]!r} {list(expected[missing[0]].shape)} is in no weight file of {sources.folder}"
            f"{_and_more(missing)}; the checkpoint is not complete or its config.json describes another model"
        )
    for name, header in found.items():
        shape = tuple(expected[name].shape)
        if header.shape != shape and not _can_grow(name, header.shape, shape, sources):
            raise InputError(
                f"{header.file}: tensor {header.name!r} has shape {list(header.shape)}, expected {list(shape)}; "
                "the weights and the config.json do not belong together"
            )
    if sources.merge is not None:
        sources.merge.check_targets(found, expected)
    return found


def read_tensors(
    found: Mapping[str, TensorHeader], expected: Mapping[str, Tensor], sources: WeightSources
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) file by file, with the adapter merged and the vocabulary grown; one file is open at a time."""
    by_file: dict[Path, list[str]] = {}
    first: dict[int, TensorHeader] = {}
    for name, header in found.items():
        _check_tied(header, first.setdefault(id(expected[name]), header))
        by_file.setdefault(header.file, []).append(name)
    for file, names in by_file.items():
        with open_tensors(file) as tensors:
            for name in names:
                tensor = found[name].read_from(tensors)
                if sources.merge is not None:
                    tensor = sources.merge.apply(name, tensor)
                yield name, grow_vocabulary(name, tensor, expected[name].shape)


def _check_tied(header: TensorHeader, other: TensorHeader) -> None:
    """Raise an `InputError` if two stored tensors are one weight of the model and are not equal."""
    if header != other and not _equal(header, other):
        raise InputError(
            f"{header.file}: tensor {header.name!r} differs from {other.name!r}, and config.json ties them "
            "(tie_word_embeddings true), so that only one of them can be used; set it to false if they were trained apart"
        )


def check_structure(build: Callable[[], nn.Module], sources: WeightSources, file: Path) -> None:
    """Match the stored names and shapes with those of a model before it takes memory; its config may describe any size.

    Args:
        build: Makes the model.
        file: The config.json that describes it, for errors.

    Raises:
        InputError: The weights and the config do not belong together, or the config describes no model.
    """
    model = build_on_meta(build, file)
    match_names(expected_tensors(model), sources, model)


def build_on_meta(build: Callable[[], M], file: Path) -> M:
    """Build a model without memory for its weights; `file` is the config.json that describes it, for errors."""
    from transformers.initialization import no_init_weights

    try:
        with described_by(file), torch.device("meta"), no_init_weights():
            model = build()
    except (RuntimeError, ArithmeticError, MemoryError) as error:
        raise InputError(f"{file} does not describe a model: {' '.join(str(error).split())}") from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def load_weights(model: nn.Module, sources: WeightSources) -> Origins:
    """Load weights into a model, keeping its device and dtype; tensors are copied, so files can be overwritten later."""
    if hasattr(model, "tie_weights"):  # a model built with empty weights is not tied yet
        model.tie_weights()
    expected = expected_tensors(model)
    found = match_names(expected, sources, model)
    sizes = {name: header.num_bytes for name, header in found.items()}
    with torch.no_grad(), waiting("loading weights", sum(sizes.values()), in_bytes=True) as wait:
        for name, tensor in read_tensors(found, expected, sources):
            expected[name].copy_(tensor)
            wait.done += sizes[name]
    return {name: str(header.file) for name, header in found.items()}


def check_tower_structure(build: Callable[[], nn.Module], folder: Path) -> None:
    """As `check_structure`, for the module of a vision tower with its own folder."""

    def tower() -> nn.Module:
        holder = nn.Module()
        holder.vision_tower = build()
        return holder

    check_structure(tower, WeightSources(tower_headers(folder), str(folder)), folder / "config.json")


def load_tower_weights(tower: nn.Module, folder: Path) -> Origins:
    """Load the weights of a vision tower from its folder, which may hold a whole CLIP or SigLIP model with a text part."""
    return load_weights(tower, WeightSources(tower_headers(folder), str(folder)))


def warn_of_unused_tower(sources: WeightSources, folder: Path) -> None:
    """Name a stored tower that its config does not call trained, and that differs from the one in `folder` that is used.

    They are equal where the tower was frozen in training. Where they are not, the original uses the folder's all the same.
    """
    different = differing_tower_tensors(sources, folder)
    if different:
        logger.warning(
            "%s stores %d vision tower tensors that differ from those of %s (%s first). As in the original, the latter are "
            "used, because config.json does not say that the tower was trained; if it was, set unfreeze_mm_vision_tower to "
            "true there",
            sources.folder, len(different), folder, different[0],
        )  # fmt: skip


def differing_tower_tensors(sources: WeightSources, folder: Path) -> list[str]:
    """Compare the tensors of a stored tower that is not used with those in `folder` that are; return those that differ."""
    if not sources.unused_tower:
        return []
    used = {comparable_name(f"model.vision_tower.{name}"): header for name, header in tower_headers(folder).items()}
    return [
        name
        for name, header in sources.unused_tower.items()
        if (beside := used.get(comparable_name("model" + name[name.index(TOWER_INFIX) :]))) is not None
        and not _equal(header, beside)
    ]


def _equal(stored: TensorHeader, used: TensorHeader) -> bool:
    """Whether two tensors are the same number for number in the precision of the first."""
    first, second = read_tensor(stored), read_tensor(used)
    return first.shape == second.shape and torch.equal(first, second.to(first.dtype))


def load_with_transformers(
    model_class: type[PreTrainedModel], folder: Path | None, unused: Collection[str] = (), /, **options: object
) -> tuple[PreTrainedModel, Origins]:
    """Call a class's `from_pretrained`, and refuse what transformers would fill with new numbers or leave out.

    `folder` is None where `state_dict` is among the options; `unused` are stored tensors that the caller
    accounts for. Returns the model, and where each of its weights comes from.

    Raises:
        InputError: A weight is not stored, or stored and not used, or of another shape.
    """
    # With mismatched sizes ignored, transformers reports them instead of raising an error without a name.
    try:
        with waiting("loading weights"):
            model, report = model_class.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
            )
    except ValueError as error:
        if "offload" in str(error):
            raise InputError(TOO_LARGE) from error
        raise
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise InputError(TOO_LARGE)
    where = str(folder) if folder is not None else model.config.name_or_path
    missing, mismatched = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))
    unexpected = sorted(n for n in report["unexpected_keys"] if n not in unused and not COMPUTED.search(n))
    for names, fault in (
        (missing, "is in no weight file"),
        (unexpected, "is stored and has no use in the model"),
        (mismatched, "is stored in another shape than the model has"),
    ):
        if names:
            raise InputError(
                f"{where}: tensor {names[0]!r} {fault}{_and_more(names)}; the checkpoint is not complete or its config.json "
                "describes another model"
            )
    return model, dict.fromkeys(expected_tensors(model), where)


def check_origins(model: nn.Module, origins: Mapping[str, str]) -> None:
    """Check that every parameter and persistent buffer of a model was read from a file, or made for a reason.

    Every way of loading ends here, so that no model is used with numbers that nobody wrote. `origins` has the file or the
    reason by name; one name is enough for weights that are tied. A weight without an origin is an `InputError`.
    """
    expected = expected_tensors(model)
    known = {id(expected[name]) for name in origins if name in expected}
    left = [name for name, tensor in expected.items() if id(tensor) not in known]
    if left:
        raise InputError(
            f"tensor {left[0]!r} {list(expected[left[0]].shape)} of the model was read from no file{_and_more(left)}; "
            "the checkpoint is not complete, or this is a fault of this package"
        )


def build_with_transformers(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    sources: WeightSources,
    dtype: torch.dtype,
    options: Mapping[str, object],
) -> tuple[PreTrainedModel, Origins]:
    """Build a quantized or sharded model by `from_pretrained`, with `options` for transformers and accelerate."""
    meta_model = build_on_meta(lambda: model_class(copy.deepcopy(config)), Path(config.name_or_path) / "config.json")
    expected = expected_tensors(meta_model)
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in read_tensors(match_names(expected, sources, meta_model), expected, sources)
    }
    name = config.name_or_path
    model, origins = load_with_transformers(model_class, None, config=config, state_dict=state, dtype=dtype, **options)
    model.name_or_path = model.config.name_or_path = name  # "None" otherwise, which adapters would name as their base
    return model, dict.fromkeys(origins, sources.folder)


def expected_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The persistent tensors of a model by name; tied weights appear under each of their names."""
    return dict(model.state_dict(keep_vars=True))


def _refuse_unexpected_keys(unknown: Mapping[str, TensorHeader]) -> None:
    """Refuse stored tensors that the model does not have, but for buffers that every version of transformers computes."""
    unexpected = [name for name in unknown if not COMPUTED.search(name)]
    if unexpected:
        first = next((name for name in unexpected if STRUCTURAL.search(name)), unexpected[0])
        header = unknown[first]
        suspect = "mm_projector_type" if PROJECTOR_INFIX in first else "the number of layers"
        raise InputError(
            f"{header.file}: tensor {header.name!r} {list(header.shape)} is unexpected in the model that the config.json "
            f"describes{_and_more(unexpected)}; compare {suspect} with it"
        )


def _can_grow(name: str, found: tuple[int, ...], expected: tuple[int, ...], sources: WeightSources) -> bool:
    return (
        sources.may_grow_vocabulary
        and VOCABULARY.search(name) is not None
        and len(found) == len(expected) == 2
        and found[1] == expected[1]
        and found[0] < expected[0]
    )


def grow_vocabulary(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Append vocabulary rows that are the mean of the others, as training does when it adds image tokens."""
    if VOCABULARY.search(name) is None or tensor.shape[0] >= shape[0]:
        return tensor
    num_new = shape[0] - tensor.shape[0]
    logger.warning(
        "%s: %d rows for new tokens are not stored; they are set to the mean of the %d others",
        name, num_new, tensor.shape[0],
    )  # fmt: skip
    return pad_rows(tensor, shape[0])


def pad_rows(table: Tensor, num_rows: int) -> Tensor:
    """Append rows that are the mean of the others, whose logits are never above the largest of those."""
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(num_rows - table.shape[0], -1)])


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
