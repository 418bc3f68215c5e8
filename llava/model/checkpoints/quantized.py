"""Load a checkpoint whose weights were saved quantized, through transformers and the library that packed them.

In: a folder whose config.json has a `quantization_config` (bitsandbytes, AWQ, GPTQ, compressed-tensors, torchao, ...), in
the original layout or in that of transformers' own classes. Out: the model, and the origin of each weight. Packed tensors
are not read here: names are translated, and which modules are packed is read off the stored tensors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava.errors import InputError
from llava.model.checkpoints.hf_layout import NAME_RULES
from llava.model.checkpoints.inspect import CheckpointInfo
from llava.model.checkpoints.loading import Origins, load_with_transformers

# Where each method's configuration lists the modules that it left alone; the first one that is there is used.
UNPACKED_KEYS = {"bitsandbytes": "llm_int8_skip_modules", "compressed-tensors": "ignore"}
DEFAULT_UNPACKED_KEY = "modules_to_not_convert"

# What a packed module stores beside, or in place of, its `weight`.
COMPANIONS = re.compile(
    r"(.+)\.(?:weight\.\w+(?:\.\w+)?|weight_(?:packed|scale|shape|zero_point|scale_inv|format)|SCB|qweight|qzeros|scales|g_idx)"
)


def load_quantized(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    info: CheckpointInfo,
    dtype: torch.dtype,
    device_map: object,
    *,
    unused: Collection[str] = (),
) -> tuple[PreTrainedModel, Origins]:
    """Load a folder's packed weights under the names of the original layout, and say where each weight comes from.

    `config` is that of `model_class`; its `quantization_config` is replaced by one with this layout's module names. `dtype` is
    that of what is not packed, `device_map` as transformers takes it.

    Raises:
        InputError: The method, or the package that reads it, is not here; or tensors and config do not fit.
    """
    settings = translated_config(info, _linear_modules(model_class, config))
    method = str(settings.get("quant_method", "bitsandbytes"))
    config.quantization_config = settings
    options: dict[str, object] = {}
    if info.kind == "transformers":
        options["key_mapping"] = {rule.pattern: name for rule, name in NAME_RULES}
    try:
        return load_with_transformers(
            model_class, info.folder, unused, config=config, dtype=dtype, device_map=device_map, **options
        )
    except (InputError, torch.OutOfMemoryError):
        raise
    except (ImportError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the weights of {info.folder} are stored quantized by {method}, and cannot be read here: {reason}; install what "
            "it needs, or load the checkpoint that they were quantized from"
        ) from error


def translated_config(info: CheckpointInfo, linear_modules: Sequence[str]) -> dict[str, object]:
    """Return a folder's `quantization_config` with those linear modules of the model named that are not stored packed."""
    settings = info.config["quantization_config"]
    if not isinstance(settings, Mapping):
        raise InputError(
            f"{info.folder / 'config.json'} has the quantization_config {settings!r}; it must be an object"
        )
    key = UNPACKED_KEYS.get(str(settings.get("quant_method", "bitsandbytes")), DEFAULT_UNPACKED_KEY)
    packed = {match[1] for name in info.tensors if (match := COMPANIONS.fullmatch(name))}
    unpacked = [name for name in linear_modules if name not in packed]
    # transformers matches patterns at the beginning of names; compressed-tensors compares whole names.
    return dict(settings) | {key: unpacked if key == "ignore" else [re.escape(name) + "$" for name in unpacked]}


def _linear_modules(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> list[str]:
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
