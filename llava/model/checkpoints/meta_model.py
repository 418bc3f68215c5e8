"""Models without memory for their weights, and running them with weights that are read layer by layer.

In: a model folder (and its base). Out: `MetaModel`, a module whose parameters take no memory, with the stored tensor for
each of its names, the tower's included wherever it is. `stream_weights` lets such a module compute: a weight is in memory
only while its layer runs, so that a model of any size takes the memory of its largest layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from llava.errors import InputError
from llava.model.checkpoints.base_model import inspect_with_base
from llava.model.checkpoints.inspect import CheckpointInfo
from llava.model.checkpoints.loading import (
    WeightSources,
    build_on_meta,
    expected_tensors,
    grow_vocabulary,
    match_names,
    plan_sources,
    warn_of_unused_tower,
    with_own_tower,
)
from llava.model.checkpoints.model_config import build_config, resolved_tower_path, restore_config
from llava.model.checkpoints.weight_files import TensorHeader, read_tensor
from llava.model.protocols import LlavaModel

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class MetaModel:
    """A LLaVA without memory for its weights, with the stored tensor of each name in `found`."""

    model: LlavaModel
    info: CheckpointInfo
    base: CheckpointInfo | None
    sources: WeightSources
    found: Mapping[str, TensorHeader]
    shapes: Mapping[str, tuple[int, ...]]
    tower_folder: Path | None  # with the tower's own weights; None: they are in the checkpoint or its base

    def read(self, name: str) -> Tensor:
        """Read a tensor as the loaded model would have it, in its stored dtype (a merged one in float32)."""
        tensor = read_tensor(self.found[name])
        if self.sources.merge is not None:
            tensor = self.sources.merge.apply(name, tensor)
        return grow_vocabulary(name, tensor, torch.Size(self.shapes[name]))

    def is_stored_as_is(self, name: str) -> bool:
        """Whether `read` returns the tensor of the file unchanged."""
        merge = self.sources.merge
        return self.found[name].shape == self.shapes[name] and (merge is None or not merge.changes(name))


def open_meta_model(path: str | Path, base: str | Path | None = None) -> MetaModel:
    """Build the meta model of a checkpoint in any layout and match its files with it.

    Raises:
        InputError: It is no LLaVA, its weights are quantized, or files and config do not fit together.
    """
    from llava.model.language_model.registry import llava_classes

    info, base_info = inspect_with_base(path, base)
    if not info.is_multimodal:
        raise InputError(
            f"{info.folder} holds a language model without a vision tower ({info.language_model}), not a LLaVA checkpoint"
        )
    if info.stores_quantized:
        raise InputError(
            f"the weights of {info.folder} are stored quantized, which no other layout can express; use the checkpoint that "
            "they were quantized from"
        )
    config = build_config(info)
    _, model_class = llava_classes(info.language_model)
    sources = plan_sources(info, base_info, prefix=model_class.base_model_prefix)
    # stored=True, so that the tower is built and its tensors are expected too.
    with resolved_tower_path(config, info, base_info, stored=True, names=sources.headers):
        tower_folder = None if sources.stores_tower else Path(config.mm_vision_tower)
        if tower_folder is not None:
            warn_of_unused_tower(sources, tower_folder)
            sources = with_own_tower(sources, tower_folder, prefix=model_class.base_model_prefix)
        # A config may claim any size; the stored tensors are matched before memory is taken.
        on_meta = build_on_meta(lambda: model_class(copy.deepcopy(config)), info.config_folder / "config.json")
        expected = expected_tensors(on_meta)
        found = match_names(expected, sources, on_meta)
        model = build_empty_model(lambda: model_class(copy.deepcopy(config)))
    restore_config(model.config, config)
    shapes = {name: tuple(expected[name].shape) for name in found}
    return MetaModel(model, info, base_info, sources, found, shapes, None if sources.merges_tower else tower_folder)


def build_empty_model(build: Callable[[], M]) -> M:
    """Build a module whose parameters take no memory; buffers are computed as usual.

    Each parameter is a single NaN, expanded to its shape, so that a weight that was never read shows in the result.
    """
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with no_init_weights():
            model = build()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    empty = {id(parameter): _empty(parameter) for parameter in model.parameters()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = empty[id(parameter)]
    return model.eval()


@contextmanager
def stream_weights(model: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Within the block, let an empty model compute in float32, reading the weights of a layer when it begins.

    Parameters of a module that has submodules may be used by them at any time: they are read at once and kept until the end.
    `read` returns the weight of a parameter's name.
    """
    aliases = _first_names(model)
    handles = []
    # Restored as the same objects, since tied weights are recognised by identity, in the next block too.
    empty = {module: dict(module._parameters) for module in model.modules()}
    for prefix, module in model.named_modules():
        names = {key: aliases[id(value)] for key, value in module._parameters.items() if value is not None}
        if not names:
            continue
        if any(True for _ in module.children()) or _is_read_by_its_parent(model, prefix):
            _fill(module, names, read)
            continue
        handles.append(module.register_forward_pre_hook(lambda module, _, names=names: _fill(module, names, read)))
        handles.append(module.register_forward_hook(lambda module, *_: module._parameters.update(empty[module])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, parameters in empty.items():
            module._parameters.update(parameters)


def _empty(parameter: Tensor) -> nn.Parameter:
    number = torch.full((), float("nan"), dtype=parameter.dtype if parameter.is_floating_point() else torch.float32)
    return nn.Parameter(number.expand(parameter.shape), requires_grad=False)


def _first_names(model: nn.Module) -> dict[int, str]:
    """The names of parameters by identity; of tied ones, the first name."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    return names


def _is_read_by_its_parent(model: nn.Module, prefix: str) -> bool:
    """Whether the parent uses a layer's weight without calling the layer, as torch's attention does with its output layer."""
    return isinstance(model.get_submodule(prefix.rpartition(".")[0]), nn.MultiheadAttention)


def _fill(module: nn.Module, names: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
    for key, name in names.items():
        module._parameters[key] = nn.Parameter(read(name).float(), requires_grad=False)
