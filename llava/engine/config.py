"""How an engine is set up, and what it raises beside `InputError`. No torch.

Numbers left at None are chosen when the engine is built, from the device and its free memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava.errors import InputError

WEIGHTS = ("int8", "fp8", "int4")


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may use, and how it schedules."""

    max_running: int | None = None  # sequences that run together; None: 256 on a GPU, 32 on a CPU
    max_waiting: int = 2048  # requests that may wait; one more is refused with QueueFull
    max_step_tokens: int | None = None  # prompt tokens computed in one step; None: 4096 on a GPU, 512 on a CPU
    context_len: int | None = None  # positions of one sequence; None: what the model was trained with
    block_size: int | None = None  # tokens of one block of keys and values; None: 64 on a GPU, 16 on a CPU
    num_blocks: int | None = None  # blocks in the pool; None: what the memory has room for
    memory_fraction: float = 0.9  # of the GPU's memory, for everything
    prefix_cache: bool = True  # keep keys and values of finished prompts for those that begin alike
    feature_cache_bytes: int = 512 * 2**20  # image features kept for images that come again; 0 keeps none
    weights: str | None = None  # "int8", "fp8" or "int4": hold the language model's weights in that form
    adapter_bytes: int = 2 * 2**30  # LoRA adapters kept on the device; others wait in the host's memory
    speculation: int = 0  # draft tokens from n-grams of the text so far, for greedy answers; 0: none
    graphs: bool = True  # record decoding steps as CUDA graphs (nothing on a CPU)
    overlap: bool = True  # begin a step before the last one's tokens have been read (nothing on a CPU)

    def __post_init__(self) -> None:
        for name in ("max_running", "max_step_tokens", "context_len", "num_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give 1 or more, or leave it out")
        if self.max_waiting < 1:
            raise InputError(f"max_waiting is {self.max_waiting}; give 1 or more")
        if self.block_size is not None and (self.block_size < 1 or self.block_size & (self.block_size - 1)):
            raise InputError(f"block_size is {self.block_size}; give a power of two")
        if not 0 < self.memory_fraction <= 1:
            raise InputError(f"memory_fraction is {self.memory_fraction}; give a share above 0 and at most 1")
        if self.feature_cache_bytes < 0:
            raise InputError(f"feature_cache_bytes is {self.feature_cache_bytes}; give 0 (none) or more")
        if self.adapter_bytes < 0:
            raise InputError(f"adapter_bytes is {self.adapter_bytes}; give 0 (one adapter at a time) or more")
        if self.weights is not None and self.weights not in WEIGHTS:
            raise InputError(f"weights is {self.weights!r}; known: {', '.join(WEIGHTS)}")
        if not 0 <= self.speculation <= 32:
            raise InputError(f"speculation is {self.speculation}; give 0 (none) to 32 tokens")


class EngineError(RuntimeError):
    """The engine could not finish a request; the message says what happened."""


class QueueFull(EngineError):
    """So many requests wait that no more is taken; a server answers 429, a program waits and asks again."""


class EngineClosed(EngineError):
    """The engine was closed before the request was finished, or before it was submitted."""


class Cancelled(EngineError):
    """A request without a partial answer to return was aborted."""


class UnsupportedModelError(InputError):
    """The engine has no arithmetic for this model; `model.generate` has."""
