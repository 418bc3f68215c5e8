"""The private names of transformers that the package uses, each with the reason. Checked with transformers 5.23.

No other file imports a name of transformers that begins with an underscore, or reads such an attribute of its objects. The
methods of `Trainer` that train/llava_trainer.py overrides are listed here and stand there.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from llava.model.config import language_model_type

logger = logging.getLogger(__name__)

EAGER = "eager"  # the attention implementation that computes every weight

# Trainer has no public hook at these points of a run.
TRAINER_METHODS = (
    "_get_grad_norm",  # to stop at a norm that is not finite
    "_get_output_dir",  # to write a checkpoint into a folder that is renamed when it is complete
    "_get_train_sampler",  # to group samples by length
    "_load_best_model",  # to read a projector or an adapter alone
    "_load_from_checkpoint",  # likewise
    "_load_optimizer_and_scheduler",  # to let the settings of a resumed run count
    "_prepare_for_training",  # to see the model as it is trained, sharded and wrapped
    "_prepare_inputs",  # to keep on the host what a step reads there
    "_save",  # to write a projector or an adapter alone
    "_save_checkpoint",  # to write a checkpoint whole or not at all
)


def register_recorded_outputs(model: PreTrainedModel) -> None:
    """Let `output_hidden_states` and `output_attentions` work for a model whose class was changed after it was built.

    transformers registers what a model can record in `PreTrainedModel.__init__`, by class, and has no public way to add a
    class. The key is set as versions from 5.17 on read it.
    """
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)


def attention_of(config: PreTrainedConfig) -> str:
    """Read the attention implementation of a model's config, which has no public attribute for it."""
    name: str = config._attn_implementation
    return name


def forget_implementations(config: PreTrainedConfig) -> None:
    """Let transformers pick the implementations of attention and experts, whatever the config's file names."""
    config._attn_implementation = None
    config._experts_implementation = None


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Set the attention implementation of a config before its model is built; a model has `set_attn_implementation`."""
    config._attn_implementation = name


@contextmanager
def eager_attention(config: PreTrainedConfig, *, warns: bool = True) -> Iterator[None]:
    """Within the block, let the model of a config compute attention weights, which only transformers' eager attention does.

    The first switch is said in a warning if `warns`.
    """
    before = attention_of(config)
    if before == EAGER:
        yield
        return
    if warns:
        _say_once(f"attention weights are computed by eager attention for this call, since {before} gives none")
    set_attention(config, EAGER)
    try:
        yield
    finally:
        set_attention(config, before)


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def share_tensor_names(model_type: str, own_type: str) -> None:
    """Let models of `own_type` be saved under the published tensor names of `model_type`, as transformers saves the latter.

    transformers joins the experts of a layer in memory, and takes them apart where it saves a model of a type that it knows.
    """
    mapping = get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(own_type, mapping, overwrite=True)


def current_names(model: nn.Module, names: Iterable[str], comparable: Callable[[str], str]) -> Mapping[str, str]:
    """Map stored tensor names to those of a model whose transformers class renamed its modules since they were published.

    transformers renames them in `from_pretrained`, and back in `save_pretrained`; it has no documented function for it. Names
    that no class of the model renamed are not in the result. `comparable` gives names the form in which they are compared.
    """
    renamed = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        renamings = [
            each for each in get_model_conversion_mapping(module, add_legacy=False) if isinstance(each, WeightRenaming)
        ]
        if not renamings:
            continue
        place = comparable(f"{prefix}.") if prefix else ""
        for name in names:
            if comparable(name).startswith(place):
                inside = comparable(name).removeprefix(place)
                new, _ = rename_source_key(inside, renamings, [])
                if new != inside:
                    renamed[name] = place + new
    return renamed


Converter = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def conversions(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[Sequence[str], Converter]]:
    """Find what transformers makes of stored tensors whose names a language model does not have.

    transformers looks conversions up by the class and the model type, which a LLaVA over a language model has others of. Yields
    the names that belong together, in their order, and a function from these tensors to those of the model.
    """
    transforms = _conversions_of(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    groups: dict[str, dict[str, str | None]] = {}  # target -> stored name -> pattern of the converter
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        if target != name:
            groups.setdefault(target, {})[name] = pattern
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    for target, patterns in groups.items():

        def convert(
            tensors: Mapping[str, Tensor], target: str = target, patterns: dict[str, str | None] = patterns
        ) -> Mapping[str, Tensor]:
            first = next(iter(patterns.values()))
            if first is None:
                return {target: tensors[next(iter(patterns))]}
            converter = copy.deepcopy(by_pattern[first])
            for name, pattern in patterns.items():
                converter.add_tensor(target, name, pattern, tensors[name])
            made = converter.convert(target, model=model, config=model.config)
            return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

        yield list(patterns), convert


def _conversions_of(model: nn.Module) -> list[object]:
    """The conversions of the language model's own class, or of its type."""
    if not isinstance(model, PreTrainedModel):
        return []
    classes = [each.__name__ for each in type(model).__mro__ if each.__module__.startswith("transformers.")]
    for name in [*classes, language_model_type({"model_type": model.config.model_type})]:
        found = get_checkpoint_conversion_mapping(name)
        if found is not None:
            return list(found)
    return []
