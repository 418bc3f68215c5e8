"""What the engine asks of its arithmetic, and the values that describe one step.

Letters: T tokens of this step, all sequences packed one after another; S sequences; H query heads; K key/value heads;
d head width; D model width; I inner width; V vocabulary; B blocks in the pool; b tokens per block.

Rules for every method: nothing is allocated by what the data says and nothing waits for the device, so that a step can be
captured in a CUDA graph (the exceptions are named); no argument is changed unless the method's name ends in `_`. A kernel
may read weights and the plan, and ask for older keys, before the kernel in front of it has ended: they are written by
copies and by operators of PyTorch, never by these methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from llava.engine.kernels.quantized import QuantizedWeight

Weight: TypeAlias = Tensor | QuantizedWeight


@dataclass(frozen=True)
class AttentionPlan:
    """What one step attends to. A captured graph reads these tensors again, so their addresses stay and contents change.

    A step may be padded: a token whose slot is -1 is not stored, and a sequence whose context is 0 gets zeros.
    """

    query_starts: Tensor  # (S + 1,) int32: where each sequence's new tokens start among the T
    context_lens: Tensor  # (S,) int32: tokens of each sequence in the cache once this step's are stored
    block_tables: Tensor  # (S, max_blocks) int32: the blocks of each sequence, in order
    slots: Tensor  # (T,) int64: block * b + offset, where a token's key and value go
    positions: Tensor  # (T,) int64
    max_query: int  # the longest run of new tokens; 1 is pure decoding
    max_context: int  # an upper bound for context_lens


@dataclass(frozen=True)
class SamplingTensors:
    """How each row's token is chosen: first temperature, then top_k, top_p and min_p, each over what is left.

    A random number depends on the row's seed and position alone, so a row's token does not depend on its neighbours.
    """

    temperature: Tensor  # (S,) float32; 0 takes the likeliest token
    top_k: Tensor  # (S,) int32; 0 keeps all
    top_p: Tensor  # (S,) float32; 1 keeps all
    min_p: Tensor  # (S,) float32; 0 keeps all
    seeds: Tensor  # (S,) int64
    positions: Tensor  # (S,) int64: how many tokens the row's sequence has, a new number for each
    all_greedy: bool = False  # known on the host: every temperature is 0
    unlimited: bool = False  # known on the host: top_k, top_p and min_p keep everything in every row


class Kernels(Protocol):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`residual += x`, then the norm of residual."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...

    def add_layer_norm_(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor: ...

    def rope_store_(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        plan: AttentionPlan,
        k_cache: Tensor,
        v_cache: Tensor,
        num_heads: int,
        num_kv_heads: int,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Rotate queries and keys of `qkv` (T, (H + 2K) d), write keys and values to the caches, return q (T, H, d).

        `cos` and `sin` are tables (P, d/2), or (P, d) whose halves are equal; None rotates nothing. `q_norm` and `k_norm`
        (d,) are RMS norms of each head before rotating. The caches are (B, b, K, d), and zeros before anything
        is stored: what lies beyond a context is read, and must be finite.
        """

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: AttentionPlan,
        scale: float,
        *,
        window: int | None = None,
        alibi: Tensor | None = None,
    ) -> Tensor:
        """Attention of q (T, H, d) over each sequence's cached tokens, causal; returns (T, H d).

        A sequence's queries are the last of its context. With `window`, a token sees that many tokens, itself included.
        `alibi` (H,) are slopes: a key n tokens back gets slope * -n.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of (T, 2I), whose first half is gate."""

    def gated_linear(self, x: Tensor, weight: Weight) -> Tensor:
        """`silu_mul(linear(x, weight))`, in one kernel where that is faster."""

    def gelu(self, x: Tensor) -> Tensor: ...

    def pack(self, weight: Weight) -> Weight:
        """A copy of a weight that `linear` multiplies by faster; the weight itself, where there is none."""

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x (T, in) times the transposed weight (out, in)."""

    def sample(self, logits: Tensor, rows: SamplingTensors) -> tuple[Tensor, Tensor]:
        """Tokens (S,) int64 and their log probabilities (S,) float32 under the softmax of `logits` (S, V) as given."""
