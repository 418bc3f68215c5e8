"""Inspect a model folder: decide by its files, never by its name, what it holds. torch is not needed.

In: a folder. Out: `CheckpointInfo`: the kind, the config, every stored tensor under its published name, the adapter.

    full          a LLaVA in the original layout: config with `mm_*` keys, weights of the language model and projector
    projector     config with `mm_*` keys and `mm_projector.bin`; the language model is in a base folder
    lora          adapter_config.json and adapter weights; the language model is in a base folder, which may be in either
                  layout, and its config too where PEFT alone wrote the folder
    transformers  the layout of one of the LLaVA classes of transformers (hf_layout.py)
    language      a language model without a vision tower

Models that are not read are recognised by foreign.py: `inspect` refuses them, `survey` describes them.

Headers of weight files are read by weight_files.py, transformers' layout is translated by hf_layout.py, tensors are loaded
by loading.py, and hub repositories are found by hub.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.files import holds_tokenizer, read_json
from llava.model.checkpoints.foreign import ForeignModel, ForeignModelError, foreign_model, quantized_model
from llava.model.checkpoints.gguf.folder import gguf_pair_tensors, is_gguf_folder
from llava.model.checkpoints.hf_layout import is_transformers_layout, published_name
from llava.model.checkpoints.hub import resolve_checkpoint
from llava.model.checkpoints.packed import Packing, find_packed, missing_reader, quantization_method
from llava.model.checkpoints.weight_files import TensorHeader, read_headers
from llava.model.config import check_types, is_multimodal, language_model_type

# The files that hold a whole model's weights, in order of preference: (name, whether it is an index of shards).
WEIGHT_FORMS = (
    ("model.safetensors.index.json", True),
    ("model.safetensors", False),
    ("pytorch_model.bin.index.json", True),
    ("pytorch_model.bin", False),
)
SHARD = re.compile(r"(?:model|pytorch_model)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
ADAPTER_CONFIG = "adapter_config.json"

# Where the settings of quantized weights are: keys of config.json, or a file for a method.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
QUANTIZATION_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}

# Settings of adapter_config.json, with which an adapter is no sum of products and so cannot be merged.
NOT_MERGED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "target_parameters",
    "use_bdlora", "use_qalora",
)  # fmt: skip
# Ways to begin training, by their first letters, that change the base's weights.
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")

# Parts of the names of a LLaVA's tensors.
TOWER_INFIX = ".vision_tower.vision_tower."
PROJECTOR_INFIX = "mm_projector."

# The embedding table's name in the language models of transformers.
EMBEDDING_TABLES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")
VOCABULARY = re.compile(rf"(^|\.)({'|'.join(EMBEDDING_TABLES)}|lm_head|embed_out)\.weight$")
VOCABULARY_MODULE = re.compile(rf"(^|\.)({'|'.join(EMBEDDING_TABLES)}|lm_head|embed_out)\.(weight$|lora_)")
OUTPUT_LAYER = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")

# Names in a tower module begin with this; a whole CLIP or SigLIP model has parts that a tower does not.
TOWER_MODULE_PREFIX = "vision_tower."
NOT_IN_TOWER = re.compile(
    r"vision_tower\.(text_model\.|text_projection|visual_projection|logit_scale|logit_bias|classifier\.)"
)
# The level that a model with a head has above the tower.
ABOVE_TOWER = re.compile(r"^(vision_model|dinov2|dinov2_with_registers|convnext)\.")


@dataclass(frozen=True)
class CheckpointInfo:
    """The contents of a model folder. `tensors` and `extras` are keyed by published names; headers have the stored ones."""

    folder: Path
    kind: str
    config: Mapping[str, Any]
    config_folder: Path  # whose config.json `config` is: the base's, for an adapter without one (`over_base`)
    language_model: str  # the transformers model type inside: llama, mistral, mpt, qwen2, ...
    tensors: Mapping[str, TensorHeader] = field(repr=False, default_factory=dict)
    extras: Mapping[str, TensorHeader] = field(repr=False, default_factory=dict)  # projector or non-LoRA tensors
    adapter: Mapping[str, TensorHeader] = field(repr=False, default_factory=dict)
    adapter_config: Mapping[str, Any] | None = None
    adapters_below: tuple[
        CheckpointInfo, ...
    ] = ()  # of a base that is itself base and adapters, in the order of merging
    base_hint: str | None = None  # the base model that the folder's files name
    has_legacy_config: bool = False  # written before model_type said llava; read as llava_llama
    foreign: ForeignModel | None = None  # what it is instead of a model that is read
    packing: Packing | None = None  # of weights that are stored quantized, and unpacked where they are read

    @property
    def needs_base(self) -> bool:
        return self.kind == "projector" or (self.kind == "lora" and not self.tensors)

    @property
    def is_multimodal(self) -> bool:
        return is_transformers_layout(self.config) or is_multimodal(self.config)

    @property
    def is_adapter_of_llava(self) -> bool:
        """Whether LLaVA's own training wrote the adapter: with a config, and with the modules beside the language model."""
        return self.kind == "lora" and bool(self.config) and self.config_folder == self.folder

    @property
    def adapter_changes_tower(self) -> bool:
        """Whether an adapter, or one below it, changes the tower; biases that LLaVA's `lora_bias all` adds do not count."""
        return any(TOWER_INFIX in name for name in self._merged_names)

    @property
    def adapter_changes_vocabulary(self) -> bool:
        """Whether an adapter changes embeddings or output layer, which PEFT does not keep equal where the base ties them."""
        return any(VOCABULARY_MODULE.search(name) for name in self._merged_names)

    @property
    def adapter_vocabulary_size(self) -> int:
        """The rows of the largest embedding table or output layer that an adapter stores whole; 0 without one."""
        sizes = (h.shape[0] for layer in self._adapters for n, h in layer.adapter.items() if VOCABULARY.search(n))
        return max(sizes, default=0)

    @property
    def _adapters(self) -> tuple[CheckpointInfo, ...]:
        return (*self.adapters_below, self)

    @property
    def _merged_names(self) -> Iterator[str]:
        return (name for layer in self._adapters for name in layer.merged_adapter)

    @property
    def merged_adapter(self) -> Mapping[str, TensorHeader]:
        """The adapter's tensors that are merged.

        LLaVA's own training with `lora_bias all` adds the biases of tower and projector, which are trained and stored with
        their own modules, or not at all.
        """
        if not self.is_adapter_of_llava:
            return self.adapter
        beside = (TOWER_INFIX, PROJECTOR_INFIX)
        return {n: h for n, h in self.adapter.items() if "lora_" in n or not any(infix in n for infix in beside)}

    @property
    def stores_tower(self) -> bool:
        return any(TOWER_INFIX in name for name in (*self.tensors, *self.extras))

    @property
    def stores_quantized(self) -> bool:
        """Whether a library reads the weights, which were saved quantized.

        The config of a quantized training run of an adapter does not count, nor do weights that are unpacked (`packing`).
        """
        return bool(self.config.get("quantization_config")) and not self.needs_base

    @property
    def trains_tower(self) -> bool:
        """Whether a stored tower was trained, rather than being a copy of the one that the config names.

        LLaVA says so by `unfreeze_mm_vision_tower`, LLaVA-NeXT's training by the parts that it trained or their learning rate.
        """
        config = self.config
        return (
            is_transformers_layout(config)
            or bool(config.get("unfreeze_mm_vision_tower"))
            or "mm_vision_tower" in map(str.strip, str(config.get("mm_tunable_parts")).split(","))
            or config.get("mm_vision_tower_lr") is not None
        )

    @property
    def tower_in_checkpoint(self) -> bool:
        """Whether the tower to use is stored in this checkpoint."""
        return self.trains_tower and self.stores_tower

    @property
    def stored_bytes(self) -> int:
        """The bytes of all stored tensors at two bytes an element."""
        return sum(2 * header.num_elements for header in (*self.tensors.values(), *self.extras.values()))


def folders_of(info: CheckpointInfo, base: CheckpointInfo | None) -> list[Path]:
    """The folders in which a model's files are looked up: the checkpoint's, then those of what it was trained on."""
    if base is None:
        return [info.folder]
    return [info.folder, *(layer.folder for layer in reversed(base.adapters_below)), base.folder]


def tokenizer_folder(info: CheckpointInfo, base: CheckpointInfo | None) -> Path:
    """The folder whose tokenizer a model has; the last one where none holds a tokenizer."""
    folders = folders_of(info, base)
    return next((folder for folder in folders if holds_tokenizer(folder)), folders[-1])


def inspect(path: str | Path) -> CheckpointInfo:
    """Inspect a model folder or hub repository that is to be read.

    Every command asks this function, so that none reads what another one refuses.

    Raises:
        ForeignModelError: It holds a model that is not read.
        InputError: It is no model folder, or its files are damaged.
    """
    info = survey(path)
    if info.foreign is not None:
        raise ForeignModelError(info.foreign, info.folder)
    return info


def survey(path: str | Path) -> CheckpointInfo:
    """Find out what a model folder or hub repository holds; `foreign` says so where it is no model that is read."""
    folder = resolve_checkpoint(path)
    adapter_config = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
    config = read_config(folder, required=adapter_config is None)
    stored = stored_tensors(folder)
    foreign = foreign_model(config, stored) if config or adapter_config is None else None  # its base has a config
    settings = None if foreign is not None else quantization_settings(config, folder)
    packing = None
    if settings is not None and stored:
        reason = missing_reader(settings)
        if reason is not None:
            foreign = quantized_model(quantization_method(settings), reason)
        else:
            packing = find_packed(stored, settings, folder / "config.json")
    if packing is not None:
        stored = dict(packing.headers)
        config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    kind = _kind(config, stored=bool(stored), projector=_first_file(folder, PROJECTOR_FILES), adapter=adapter_config)
    if foreign is None:
        check_types(config, folder / "config.json")
        _check_parts(folder, kind, config, stored=bool(stored), adapter_config=adapter_config)
    return CheckpointInfo(
        folder=folder,
        kind=kind,
        config=_upgraded(config) if foreign is None else config,
        config_folder=folder,
        language_model=language_model_type(config),
        tensors={published_name(name) if kind == "transformers" else name: h for name, h in stored.items()},
        extras=_extra_tensors(folder, kind, stored),
        adapter=_adapter_tensors(folder) if kind == "lora" else {},
        adapter_config=adapter_config if kind == "lora" else None,
        base_hint=_base_hint(config, adapter_config),
        has_legacy_config=is_legacy_config(config),
        foreign=foreign,
        packing=packing,
    )


def _kind(config: Mapping[str, Any], *, stored: bool, projector: Path | None, adapter: Mapping[str, Any] | None) -> str:
    """The kind of a folder, empty for one without weights; `stored` says whether it holds a whole model's."""
    if adapter is not None and not stored:
        return "lora"
    if is_transformers_layout(config):
        return "transformers"
    if stored:
        return "full" if is_multimodal(config) else "language"
    return "projector" if projector is not None else ""


def _check_parts(
    folder: Path, kind: str, config: Mapping[str, Any], *, stored: bool, adapter_config: Mapping[str, Any] | None
) -> None:
    """Raise an `InputError` if a folder lacks what its kind needs."""
    if kind == "lora":
        _check_adapter_config(adapter_config or {}, folder / ADAPTER_CONFIG)
    if kind in ("", "transformers") and not stored:
        raise InputError(
            f"the folder {folder} holds no weights: expected one of {', '.join(name for name, _ in WEIGHT_FORMS)}, "
            f"{PROJECTOR_FILES[1]} or {ADAPTER_FILES[0]}"
        )
    if kind == "projector" and not is_multimodal(config):
        raise InputError(
            f"{folder / 'config.json'} names no vision tower, so {_first_file(folder, PROJECTOR_FILES)} has nothing to connect"
        )
    if kind != "transformers" and is_multimodal(config) and not config.get("mm_vision_tower"):
        raise InputError(
            f"{folder / 'config.json'} has no mm_vision_tower, so that the model's vision tower is not known"
        )


def _extra_tensors(folder: Path, kind: str, stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The tensors beside a model's or an adapter's own: a projector, or what LoRA training trained whole."""
    projector, non_lora = _first_file(folder, PROJECTOR_FILES), _first_file(folder, NON_LORA_FILES)
    if kind == "lora" and non_lora is not None:
        return {_without_peft_prefix(name): header for name, header in read_headers(non_lora).items()}
    if projector is not None and kind in ("full", "projector") and not any(PROJECTOR_INFIX in name for name in stored):
        return read_headers(projector)
    return {}


def quantization_settings(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any] | None:
    """The settings with which a folder's weights were quantized; older programs wrote them to a file of their own."""
    for key in QUANTIZATION_KEYS:
        value = config.get(key)
        if isinstance(value, Mapping) and value:
            return value
    for name, method in QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method} | read_json(folder / name)
    return None


def read_config(folder: Path, *, required: bool = True) -> dict[str, Any]:
    """Read the folder's config.json; without one, return {} unless it is `required`."""
    file = folder / "config.json"
    if not file.is_file():
        if not required:
            return {}
        raise InputError(f"the folder {folder} holds no config.json, so it is not a model folder")
    return read_json(file)


# --- files ------------------------------------------------------------------------------------------------------------


def stored_tensors(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of a model's weights: a GGUF pair, any of `WEIGHT_FORMS`, or shards without an index; {} without any."""
    if is_gguf_folder(folder):
        return gguf_pair_tensors(folder)
    for name, is_index in WEIGHT_FORMS:
        if (folder / name).is_file():
            return _indexed_tensors(folder / name) if is_index else read_headers(folder / name)
    shards = {int(m[1]): file for file in sorted(folder.iterdir()) if (m := SHARD.fullmatch(file.name))}
    if not shards:
        return {}
    total = max(int(m[2]) for file in shards.values() if (m := SHARD.fullmatch(file.name)))
    absent = sorted(set(range(1, total + 1)) - shards.keys())
    if absent:
        raise InputError(f"the folder {folder} lacks weight shard {absent[0]} of {total}; copy the missing files")
    return {name: header for file in shards.values() for name, header in read_headers(file).items()}


def tower_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of a vision tower's folder, under the names of a tower module."""
    headers = stored_tensors(folder)
    if not headers:
        raise InputError(f"the vision tower's folder {folder} holds no weights")
    in_tower = {TOWER_MODULE_PREFIX + ABOVE_TOWER.sub("", name): header for name, header in headers.items()}
    return {name: header for name, header in in_tower.items() if not NOT_IN_TOWER.match(name)}


def _indexed_tensors(index_file: Path) -> dict[str, TensorHeader]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index_file} has no usable 'weight_map' from tensor names to file names")
    folder = index_file.parent
    shards: dict[str, dict[str, TensorHeader]] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise InputError(f"{index_file} names the weight file {name!r}, which is not in its own folder")
        if not (folder / name).is_file():
            first = next(tensor for tensor, file in weight_map.items() if file == name)
            raise InputError(
                f"{index_file} places tensor {first!r} in {folder / name}, which does not exist; copy the missing file"
            )
        shards[name] = read_headers(folder / name)
    for tensor, file in weight_map.items():
        if tensor not in shards[file]:
            raise InputError(f"{index_file} places tensor {tensor!r} in {file}, which does not hold it")
    return {tensor: shards[file][tensor] for tensor, file in weight_map.items()}


def _adapter_tensors(folder: Path) -> dict[str, TensorHeader]:
    file = _first_file(folder, ADAPTER_FILES)
    if file is None:
        raise InputError(f"the folder {folder} has {ADAPTER_CONFIG} but neither {' nor '.join(ADAPTER_FILES)}")
    return {published_name(_without_peft_levels(name)): header for name, header in read_headers(file).items()}


def _check_adapter_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise an `InputError` if an adapter is no LoRA, or has settings with which it cannot be merged."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{file}: the adapter is of type {kind!r}; only LORA adapters can be merged")
    special = next((key for key in NOT_MERGED if config.get(key)), None)
    if special is not None:
        raise InputError(
            f"{file}: the adapter was trained with {special} ({config[special]!r}), and cannot be merged; load it with PEFT"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise InputError(
            f"{file}: the adapter was trained with init_lora_weights {start!r}, which changes the base's weights before "
            "training; merge it with PEFT, or save it there with path_initial_model_for_weight_conversion"
        )
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float) or config[key] <= 0:
            raise InputError(f"{file} has {key} {config.get(key)!r}; it must be a number above 0")


def _first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _without_peft_levels(name: str) -> str:
    """The name of a module of the base, without the levels that PEFT adds around one that it saves whole."""
    name = _without_peft_prefix(name)
    for level in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
        name = name.replace(level, ".")
    return name


def _without_peft_prefix(name: str) -> str:
    """`base_model.model.model.layers…` -> `model.layers…`: PEFT wraps a model twice before it saves names."""
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name


# --- configs ----------------------------------------------------------------------------------------------------------


def is_legacy_config(config: Mapping[str, Any]) -> bool:
    """Whether a LLaVA's model_type is that of its language model, or `llava`, as in the first releases."""
    model_type = str(config.get("model_type", ""))
    return is_multimodal(config) and not is_transformers_layout(config) and not model_type.startswith("llava_")


def _upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with today's model type; the file is not changed."""
    values = dict(config)
    if is_legacy_config(config):
        values["model_type"] = f"llava_{language_model_type(config)}"
        values.pop("architectures", None)
    return values


def _base_hint(config: Mapping[str, Any], adapter_config: Mapping[str, Any] | None) -> str | None:
    named = ((adapter_config or {}).get("base_model_name_or_path"), config.get("base_model_name_or_path"))
    hint = next((name for name in (*named, config.get("_name_or_path")) if name), None)
    return hint if isinstance(hint, str) else None
