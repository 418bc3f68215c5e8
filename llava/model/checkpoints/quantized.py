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
from llava.model.checkpoints.hf_layout import NAME_RULES, comparable_name, published_name
from llava.model.checkpoints.inspect import CheckpointInfo
from llava.model.checkpoints.loading import Origins, expected_tensors, load_with_transformers

# Where each method's configuration lists the modules that it left alone; the first one that is there is used.
UNPACKED_KEYS = {"bitsandbytes": "llm_int8_skip_modules", "compressed-tensors": "ignore"}
DEFAULT_UNPACKED_KEY = "modules_to_not_convert"

PLAIN_DTYPES = ("F32", "F16", "BF16")  # of tensors that are stored as they are

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
    with torch.device("meta"):
        meta_model = model_class(copy.deepcopy(config))
    _refuse_other_shapes(meta_model, info)
    linear = [name for name, module in meta_model.named_modules() if isinstance(module, nn.Linear)]
    settings = translated_config(info, linear)
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


def _refuse_other_shapes(meta_model: nn.Module, info: CheckpointInfo) -> None:
    """Check what is not packed against the model's shapes. transformers 5.17 takes the stored shapes of such a folder."""
    shapes = {comparable_name(name): tuple(tensor.shape) for name, tensor in expected_tensors(meta_model).items()}
    for name, header in info.tensors.items():
        own = comparable_name(published_name(name))
        if (
            own in shapes
            and header.dtype in PLAIN_DTYPES
            and shapes[own] != header.shape
            and not _is_packed(name, info)
        ):
            raise InputError(
                f"{header.file}: tensor {name!r} is stored in the shape {list(header.shape)}, and the model has "
                f"{list(shapes[own])}; the checkpoint is damaged or its config.json describes another model"
            )


def _is_packed(name: str, info: CheckpointInfo) -> bool:
    """Whether a weight has companions, which say how to read it."""
    module = name.rpartition(".")[0]
    return any((match := COMPANIONS.fullmatch(other)) and match[1] == module for other in info.tensors)


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
