"""Attention over packed samples: each sample of a row attends to itself alone.

In: what transformers passes to an attention function, with `cu_seq_lens_q` (the boundaries of the samples) in a packed
forward. Out: (B, T, heads, width). The function is registered with transformers as `varlen`. On GPUs it uses torch's
variable-length kernel, whose work grows with the square of each sample's length, not of the row's. Rows that are not packed
go to torch's usual attention. Rows are packed in splice.py.

Without that kernel (CPU, old GPUs, float32) nothing here is needed: for its sdpa, eager and flex attention transformers
builds a block mask from positions that restart, and its flash kernels read `cu_seq_lens_q` themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava.errors import InputError
from llava.model.splice import PackedRow
from llava.model.transformers_internals import attention_of, set_attention

VARLEN = "varlen"

# The lowest compute capability of NVIDIA GPUs that the kernel runs on.
MIN_CAPABILITY = (8, 0)


def use_varlen(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Select this attention in a model's config if torch's kernel runs on the device; return whether it was selected."""
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.bfloat16, torch.float16):
        return False
    kernel = varlen_kernel()
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY or kernel is None:
        return False
    register_varlen(kernel)
    set_attention(config, VARLEN)
    return True


def register_varlen(kernel: VarlenKernel) -> None:
    """Register `attn_implementation="varlen"`; rows that are not packed get the masks of sdpa."""
    # Bound here: torch.compile cannot trace an import.
    AttentionInterface.register(VARLEN, partial(varlen_attention, kernel=kernel))
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def packed_arguments(config: PreTrainedConfig, row: PackedRow) -> tuple[Tensor | None, dict[str, object]]:
    """Build the mask and keyword arguments of a packed forward for the model's attention implementation."""
    boundaries = {
        "cu_seq_lens_q": row.boundaries,
        "cu_seq_lens_k": row.boundaries,
        "max_length_q": row.longest,
        "max_length_k": row.longest,
    }
    if attention_of(config) != VARLEN:
        return None, boundaries  # with a mask, transformers would not look for positions that restart
    # transformers takes any 4-D mask as it is: this one keeps it from building one of T times T.
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.boundaries.device), boundaries


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: VarlenKernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' interface asks: queries (B, heads, T, width) -> (B, T, heads, width)."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert query.shape[0] == 1, "a packed batch is one row"
    if dropout:
        raise InputError(f"attention dropout ({dropout}) is not possible with attn_implementation 'varlen'; use 'sdpa'")
    options = _options(kernel, sliding_window)
    if scaling is not None:
        options["scale"] = scaling
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1 and kernel.shares_heads:
        options["enable_gqa"] = True
    elif num_groups > 1:
        key, value = (states.repeat_interleave(num_groups, dim=1) for states in (key, value))
    # Under mixed precision the rotary embedding returns float32; the kernel takes half precision only.
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    bounds, longest = cu_seq_lens_q, max_length_q
    return kernel.function(query, key, value, bounds, bounds, longest, longest, **options)[None], None


@dataclass(frozen=True)
class VarlenKernel:
    """torch's function, and which arguments it has in the installed version."""

    function: Callable[..., Tensor]
    has_window: bool  # causality is a window (all before, none after) rather than a flag
    shares_heads: bool  # several query heads may read one key head


def varlen_kernel() -> VarlenKernel | None:
    """Return the kernel, if the installed torch has it."""
    try:
        function = import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    known = inspect.signature(function).parameters
    if not {"window_size", "is_causal"} & set(known) or "scale" not in known:
        return None
    return VarlenKernel(function, has_window="window_size" in known, shares_heads="enable_gqa" in known)


def _options(kernel: VarlenKernel, sliding_window: int | None) -> dict[str, object]:
    """The arguments for causal attention, over `sliding_window` tokens where there is a window."""
    if kernel.has_window:
        return {"window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    if sliding_window is not None:
        raise InputError(
            f"torch {torch.__version__} has no variable-length attention with a sliding window; use "
            "attn_implementation 'sdpa', or torch 2.12 or newer"
        )
    return {"is_causal": True}
