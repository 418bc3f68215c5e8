"""Account for every stored tensor of a source: what a model does not use is named, with the reason.

In: the `MetaModel` of a source. Out: the names of unused tensors by reason; a tensor without a reason is an error. What is
used is compared with the target in verify.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from llava.errors import InputError
from llava.model.checkpoints.inspect import CheckpointInfo
from llava.model.checkpoints.loading import COMPUTED, differing_tower_tensors
from llava.model.checkpoints.meta_model import MetaModel
from llava.model.checkpoints.weight_files import TensorHeader

EQUAL_TOWER = "a copy of the vision tower, equal to the one in {}, which is used"
OTHER_TOWER = (
    "a vision tower that config.json does not call trained, and that differs from the one in {}, which is used"
)
BUFFER = "buffers that every version of transformers computes"
REPLACED = "tensors of the base, in whose place the checkpoint has its own"
ACTIVATIONS = "scales of quantized activations, which are not quantized here"
NOT_MERGED = "biases of tower and projector in an adapter, which are stored with their modules where they were trained"


def unused_tensors(source: MetaModel) -> dict[str, tuple[str, ...]]:
    """Find the stored tensors of a checkpoint, of its base and of adapters below it that its model does not use, by reason.

    Raises:
        InputError: A tensor is neither used nor left out for a known reason.
    """
    layers = [source.info, *([source.base, *source.base.adapters_below] if source.base is not None else [])]
    used = {_place(header) for header in source.found.values()}
    used |= {_place(header) for layer in layers for header in layer.merged_adapter.values()}
    tower = {_place(header) for header in source.sources.unused_tower.values()}
    result: dict[str, list[str]] = {}
    for layer in layers:
        for name, header in _stored(layer):
            if _place(header) in used:
                continue
            if _place(header) in tower:
                folder = source.tower_folder
                assert folder is not None, "a stored tower is unused only beside another one"
                reason = (OTHER_TOWER if differing_tower_tensors(source.sources, folder) else EQUAL_TOWER).format(
                    folder
                )
            elif COMPUTED.search(name):
                reason = BUFFER
            elif layer is not source.info:
                reason = REPLACED
            elif name in layer.adapter:
                reason = NOT_MERGED
            else:
                raise InputError(f"{header.file}: tensor {header.name!r} is stored and has no use in the model")
            result.setdefault(reason, []).append(header.name)
        if layer.packing is not None and layer.packing.activation_scales:
            result.setdefault(ACTIVATIONS, []).extend(layer.packing.activation_scales)
    return {reason: tuple(names) for reason, names in result.items()}


def _stored(layer: CheckpointInfo) -> list[tuple[str, TensorHeader]]:
    parts: tuple[Mapping[str, TensorHeader], ...] = (layer.tensors, layer.extras, layer.adapter)
    return [item for part in parts for item in part.items()]


def _place(header: TensorHeader) -> tuple[str, str]:
    return str(header.file), header.name
