"""The interface of the engine's kernels, and the values that describe a layer's attention and one step.

Shapes: T tokens of this step, all sequences packed one after another; S sequences; H query heads; K key/value heads;
d head width; D model width; I inner width; V vocabulary; B blocks in the pool; b tokens per block; P positions.

Rules for every method. Sizes of outputs do not depend on the data and nothing waits for the device, so that a step can be
captured in a CUDA graph (exceptions are named where they occur). No argument is changed unless the method's name ends in
`_`. A kernel may read weights and the plan, and prefetch older keys, before the previous kernel has ended: these are
written by copies and by PyTorch's operators, never by these methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from llava.engine.kernels.quantized import QuantizedWeight

Weight: TypeAlias = Tensor | QuantizedWeight


class KVCache(NamedTuple):
    """The pool of one layer's keys and values, (B, b, K, d) each.

    It is made of zeros: what lies beyond a context is read too, and must be finite.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class AttentionParams:
    """One layer's attention: what is the same in every step."""

    num_heads: int
    num_kv_heads: int
    scale: float
    cos: Tensor | None = (
        None  # tables of rotary embeddings, (P, d/2), or (P, d) with equal halves; None rotates nothing
    )
    sin: Tensor | None = None
    q_norm: Tensor | None = None  # (d,): RMS norms of each head, before it is rotated
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    window: int | None = None  # how many tokens a token attends to, itself included
    alibi: Tensor | None = None  # (H,) slopes: the score of a key n tokens back gets slope * -n


@dataclass(frozen=True)
class AttentionPlan:
    """What one step attends to. A captured CUDA graph keeps the tensors' addresses; each step changes their contents.

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
    """How each sequence's token is sampled: temperature first, then top_k, top_p and min_p, each over what is left.

    The random number depends on the seed and the position alone, so that a token does not depend on the rest of the batch.
    """

    temperature: Tensor  # (S,) float32; 0 is greedy
    top_k: Tensor  # (S,) int32; 0 keeps all
    top_p: Tensor  # (S,) float32; 1 keeps all
    min_p: Tensor  # (S,) float32; 0 keeps all
    seeds: Tensor  # (S,) int64
    positions: Tensor  # (S,) int64: how many tokens the sequence has; each gives a new random number
    all_greedy: bool = False  # known on the host: every temperature is 0
    unlimited: bool = False  # known on the host: top_k, top_p and min_p keep every token of every sequence


class Kernels(ABC):
    """The arithmetic of a language model's layers. reference.py computes all of it; back ends override what they do faster."""

    # Whether steps of every kind can be captured in CUDA graphs.
    capturable = False

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the RMS norm of x (T, D)."""

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to `residual` in place, and return the RMS norm of the sum."""
        return self.rms_norm(residual.add_(x), weight, eps)

    @abstractmethod
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Return the layer norm of x (T, D)."""

    def add_layer_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Add x to `residual` in place, and return the layer norm of the sum."""
        return self.layer_norm(residual.add_(x), weight, bias, eps)

    @abstractmethod
    def rope_store_(self, qkv: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        """Rotate queries and keys of qkv (T, (H + 2K) d), write keys and values to the cache, return queries (T, H, d)."""

    @abstractmethod
    def attend(self, q: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        """Return the causal attention (T, H d) of q (T, H, d) over the cached tokens of each query's own sequence.

        A sequence's queries are the last tokens of its context.
        """

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up (T, I) of gate_up (T, 2I), whose first half is gate."""

    def gated_linear(self, x: Tensor, weight: Weight) -> Tensor:
        """Return `silu_mul(linear(x, weight))`, in one kernel where that is faster."""
        return self.silu_mul(self.linear(x, weight))

    @abstractmethod
    def gelu(self, x: Tensor) -> Tensor:
        """Return the exact GELU of x."""

    def pack(self, weight: Weight) -> Weight:
        """Return a copy of a weight in a layout that `linear` multiplies faster, or the weight itself where there is none."""
        return weight

    @abstractmethod
    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """Return x (T, in) times the transposed weight (out, in), plus the bias (out,)."""

    @abstractmethod
    def sample(self, logits: Tensor, sampling: SamplingTensors) -> tuple[Tensor, Tensor]:
        """Return tokens (S,) int64 and their log probabilities (S,) float32 under the softmax of logits (S, V) as given."""
