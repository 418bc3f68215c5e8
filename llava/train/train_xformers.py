"""Train with xformers' memory-efficient attention: `python -m llava.train.train_xformers`, same flags as `llava.train.train`.

For GPUs on which FlashAttention does not run (V100, T4). The attention function is registered with transformers under
the name `xformers`, so that every language model can use it; no model class is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from llava.cli.program import run_program
from llava.errors import InputError
from llava.train import train as training
from llava.train.distributed import program_name

if TYPE_CHECKING:
    from llava.train.llava_trainer import LLaVATrainer

ATTENTION = "xformers"

# The kernels read biases in vectors of this many elements, so each row of a bias begins at such a boundary.
BIAS_ALIGNMENT = 8


def register_xformers() -> None:
    """Register `attn_implementation="xformers"`, with the masks of torch's own attention (boolean, or none)."""
    AttentionInterface.register(ATTENTION, xformers_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def xformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend: queries (B, heads, T, width), keys and values with as many or fewer heads -> (B, T, heads, width)."""
    ops = _xformers()
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1:
        key, value = (states.repeat_interleave(num_groups, dim=1) for states in (key, value))
    bias: object = None
    if attention_mask is not None:
        bias = _additive(attention_mask, query)
    elif query.shape[2] > 1 and (module.is_causal if is_causal is None else is_causal):
        bias = ops.LowerTriangularMask()
    query, key, value = (states.transpose(1, 2).contiguous() for states in (query, key, value))
    output = ops.memory_efficient_attention(query, key, value, attn_bias=bias, p=dropout, scale=scaling)
    return output, None


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """Turn a boolean mask (B, 1, T, S) into a bias for each head, its rows aligned in memory."""
    batch, heads, rows, _ = query.shape
    columns = mask.shape[-1]
    aligned = -(-columns // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    bias = torch.zeros(batch, heads, rows, aligned, dtype=query.dtype, device=query.device)
    if mask.dtype == torch.bool:
        # A finite number: rows that attend to nothing (padding) stay free of NaN.
        bias[..., :columns].masked_fill_(~mask, torch.finfo(query.dtype).min)
    else:
        bias[..., :columns] = mask
    return bias[..., :columns]


def train(argv: Sequence[str] | None = None) -> LLaVATrainer:
    """Call `llava.train.train.train` with this attention."""
    _prepare()
    return training.train(attn_implementation=ATTENTION, argv=argv)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(_prepare, name=program_name()) or training.main(argv, attn_implementation=ATTENTION)


def _prepare() -> None:
    _xformers()
    register_xformers()


def _xformers() -> ModuleType:
    try:
        return import_module("xformers.ops")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "xformers":
            raise
        raise InputError("this needs the package 'xformers'; install it with: pip install xformers") from error


if __name__ == "__main__":
    sys.exit(main())
