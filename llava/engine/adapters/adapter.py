"""A LoRA adapter that a running engine adds to its base model, for the requests that name it.

In: an adapter's folder, of this package's training, of the original's or of PEFT, and the loaded base. Out: a `LoadedAdapter`:
two small matrices for each projection of the language model that it changes, and whole tensors for what it changes of vision
tower, projector and newline. The products are in engine/decoder.py; merging an adapter for good is model/checkpoints/lora.py.

    r rank, I inputs and O outputs of a projection
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from llava.engine.decoder import Decoder, Projection
from llava.errors import InputError
from llava.model.checkpoints.base_model import base_on_disk, original_config
from llava.model.checkpoints.hf_layout import comparable_name
from llava.model.checkpoints.hub import resolve_checkpoint
from llava.model.checkpoints.inspect import PROJECTOR_INFIX, TOWER_INFIX, CheckpointInfo, inspect
from llava.model.checkpoints.loading import ADDED_PART
from llava.model.checkpoints.lora import LoraMerge, load_adapter
from llava.model.checkpoints.weight_files import TensorHeader, read_tensor
from llava.model.config import LEARNED_ENDS, LlavaSettings
from llava.model.protocols import LlavaModel

logger = logging.getLogger(__name__)

MERGE_IT = "write the merged model (llava merge) and serve that"


class LoraPart(NamedTuple):
    """The change of one projection: `x @ a.T @ b.T` is added to its outputs, which begin at `start` among the fused ones."""

    start: int
    a: Tensor  # (r, I)
    b: Tensor  # (O, r), scaled


LoraLayer: TypeAlias = Mapping[str, tuple[LoraPart, ...]]  # by the field of engine/decoder.py's `Layer`


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory. A folder that is read again has another `key`, so that nothing cached of the old one is found."""

    name: str
    folder: Path
    key: bytes
    layers: Sequence[LoraLayer]
    vision: Mapping[str, Tensor]  # whole tensors, by their names in the model

    @property
    def changes_vision(self) -> bool:
        return bool(self.vision)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def rank(self) -> int:
        """The largest one of its projections; 0 without any."""
        return max((len(part.a) for layer in self.layers for parts in layer.values() for part in parts), default=0)

    def to(self, device: torch.device) -> LoadedAdapter:
        """The same with its tensors on a device."""

        def moved(parts: Sequence[LoraPart]) -> tuple[LoraPart, ...]:
            return tuple(LoraPart(start, a.to(device), b.to(device)) for start, a, b in parts)

        layers = [{field: moved(parts) for field, parts in layer.items()} for layer in self.layers]
        return replace(self, layers=layers, vision={name: tensor.to(device) for name, tensor in self.vision.items()})

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            for parts in layer.values():
                for part in parts:
                    yield from (part.a, part.b)
        yield from self.vision.values()


class Base(NamedTuple):
    """What the base model was loaded as, with which what adapters name is compared."""

    folder: Path
    conv_mode: str


class AdapterReader:
    """Reads adapters for one model; `base` is set where it is known."""

    _numbers = itertools.count(1)

    def __init__(self, model: LlavaModel, decoder: Decoder) -> None:
        self._model = model
        self.base: Base | None = None
        # Taken now: while images are encoded for an adapter, the model has that one's tensors in their places.
        self._own = {comparable_name(name): (name, parameter.data) for name, parameter in model.named_parameters()}
        self._projections = {comparable_name(name): place for name, place in decoder.projections.items()}
        self._num_layers, self._dtype, self._device = len(decoder.layers), decoder.dtype, decoder.device

    def read(self, name: str, path: str | Path, *, any_base: bool = False) -> LoadedAdapter:
        """Read the adapter in a folder or hub repository.

        Args:
            name: What requests call it.
            path: The folder or repository.
            any_base: Do not compare the base that it names with the loaded model.

        Raises:
            InputError: It is none, was trained over another model, or changes what cannot differ between requests.
        """
        info = inspect(resolve_checkpoint(path, what="adapter"))
        if info.kind != "lora" or info.tensors:
            raise InputError(f"{path} holds no LoRA adapter ({info.kind}); give the folder of an adapter")
        if not any_base:
            self._check_base(info)
        self._check_settings(info)
        merge = load_adapter(info.merged_adapter, info.adapter_config or {})
        whole = self._whole_tensors(info)
        layers: list[dict[str, tuple[LoraPart, ...]]] = [{} for _ in range(self._num_layers)]
        with torch.inference_mode():
            for target in sorted(merge.targets | whole.keys()):
                place = self._projections.get(target)
                if place is not None:
                    part = self._low_rank(merge, target, place)
                    layers[place.layer][place.field] = (*layers[place.layer].get(place.field, ()), part)
            vision = self._vision(merge, whole, merge.targets - self._projections.keys())
        return LoadedAdapter(name, info.folder, next(self._numbers).to_bytes(8, "big"), layers, vision)

    def _check_base(self, info: CheckpointInfo) -> None:
        if info.base_hint is None or self.base is None:
            return
        found = base_on_disk(info)
        is_same = (
            found.resolve() == self.base.folder.resolve()
            if found is not None
            else Path(info.base_hint).name == _repository_name(self.base.folder)
        )
        if not is_same:
            raise InputError(
                f"the adapter {info.folder} was trained over {info.base_hint}, and the model here is {self.base.folder}; serve "
                "it over its own base"
            )

    def _check_settings(self, info: CheckpointInfo) -> None:
        """An adapter with a config of its own sees images as that says."""
        if not info.config or info.config_folder != info.folder:
            return
        values, file = original_config(info), info.folder / "config.json"
        given = _looks(LlavaSettings.from_hf(SimpleNamespace(**values)))
        known = _looks(LlavaSettings.from_hf(self._model.config))
        different = next((name for name in given if given[name] != known[name]), None)
        if different is not None:
            raise InputError(
                f"{file} says {different} {given[different]!r}, and the model here has {known[different]!r}; {MERGE_IT}"
            )
        template = values.get("conv_mode")
        if template is not None and self.base is not None and template != self.base.conv_mode:
            logger.warning(
                "%s says that the adapter was trained with the template %s; prompts here are those of %s",
                file, template, self.base.conv_mode,
            )  # fmt: skip

    def _whole_tensors(self, info: CheckpointInfo) -> dict[str, TensorHeader]:
        """What is stored whole beside the adapter, by the names in the model."""
        prefix = self._model.base_model_prefix
        whole = {}
        for name, header in info.extras.items():
            match = ADDED_PART.fullmatch(name)
            whole[comparable_name(f"{prefix}.{match[1]}" if match else name)] = header
        return whole

    def _low_rank(self, merge: LoraMerge, target: str, place: Projection) -> LoraPart:
        part = merge.parts.get(target, {})
        if part.keys() != {"lora_A", "lora_B"} or target in merge.replaced or target in merge.rows:
            how = ", ".join(sorted(part)) or "whole"
            raise InputError(
                f"the adapter {merge.source} changes {target!r} by more than two matrices ({how}), which cannot differ between "
                f"requests; {MERGE_IT}"
            )
        a, b = part["lora_A"], part["lora_B"]
        if (a.shape[1], b.shape[0]) != (place.num_inputs, place.num_outputs):
            raise InputError(
                f"the adapter {merge.source} changes {target!r} from {a.shape[1]} to {b.shape[0]} numbers, and the model here "
                f"has {place.num_inputs} and {place.num_outputs}; it was trained on another base model"
            )
        scaled = b.float() * merge.scales[target]
        return LoraPart(place.start, a.to(self._device, self._dtype), scaled.to(self._device, self._dtype))

    def _vision(self, merge: LoraMerge, whole: Mapping[str, TensorHeader], changed: set[str]) -> dict[str, Tensor]:
        """The tensors that are other ones than the model's: of tower, projector and newline, and of nothing else."""
        vision = {}
        for target in sorted(changed | (whole.keys() - self._projections.keys())):
            if target not in self._own:
                raise InputError(
                    f"the adapter {merge.source} has {target!r}, which the model here does not have; it was trained on another "
                    "base model"
                )
            name, parameter = self._own[target]
            before = read_tensor(whole[target]) if target in whole else parameter
            tensor = merge.apply(name, before.cpu()) if target in changed else before
            if tensor.shape != parameter.shape:
                raise InputError(
                    f"the adapter {merge.source} has {target!r} of shape {list(tensor.shape)}, and the model here has "
                    f"{list(parameter.shape)}; it was trained on another base model"
                )
            tensor = tensor.to(parameter.device, parameter.dtype)
            if torch.equal(tensor, parameter):
                continue
            if not (PROJECTOR_INFIX in name or TOWER_INFIX in name or name.endswith(LEARNED_ENDS)):
                raise InputError(
                    f"the adapter {merge.source} changes {name!r}, which cannot differ between requests; {MERGE_IT}"
                )
            vision[name] = tensor
        return vision


def _looks(settings: LlavaSettings) -> dict[str, object]:
    """All settings by which images and videos become features, and prompts their placeholders; not where the tower lies."""
    return {
        "mm_vision_select_layer": settings.vision.select_layer,
        "mm_vision_select_feature": settings.vision.select_feature,
        "s2_scales": settings.vision.s2_scales,
        "mm_projector_type": settings.projector.type,
        "mm_use_im_start_end": settings.tokens.use_im_start_end,
        **{f"image {entry.name}": getattr(settings.image, entry.name) for entry in fields(settings.image)},
        **{f"video {entry.name}": getattr(settings.video, entry.name) for entry in fields(settings.video)},
        "add_time_instruction": settings.tells_times,
    }


def _repository_name(folder: Path) -> str:
    """The last part of the name that a model's folder stands for: of a repository in the hub's cache, the repository's."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.rpartition("--")[2]
    return folder.name
