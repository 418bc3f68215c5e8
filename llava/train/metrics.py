"""Measure the speed of a run: tokens, images, FLOPs, padding, memory, waiting for data.

In: what passes through the model in training, counted by hooks (the language model's inputs after the splice, the tower's
tiles). Out: one dictionary of figures per log line, which callbacks.py prints.

Counts stay on the device until a line is logged: reading them earlier would make the program wait for the GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.protocols import LlavaModel, TorchModule, VisionTower

# Model FLOPs are counted as usual: two per weight and token in the forward pass; in the backward pass two for the inputs
# and two for the weights if trained; causal attention at half of the square. Recomputation does not count.
_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT = 2, 2, 2

# Two square matrices of this size multiply at the highest rate that a GPU reaches.
_PROBE_SIZE, _PROBE_RUNS = 8192, 10

_TOKENS, _POSITIONS, _SQUARES, _TRAINED, _IMAGES, _TILES = range(6)


class DecoderStack(TorchModule, Protocol):
    """The stack of layers of a language model."""

    config: PreTrainedConfig
    layers: Sequence[nn.Module]


class Throughput:
    """Count what passes through a model; `take()` returns the figures since the last call and resets the counts."""

    def __init__(self, model: nn.Module, *, device: torch.device, matmul_rate: float | None = None) -> None:
        self.model = model
        self.matmul_rate = matmul_rate
        self.counts = torch.zeros(6, device=device)
        self.flops = FlopsCounter.of_model(model)
        inner, tower = language_model(model), vision_tower(model)
        self._handles = [inner.register_forward_pre_hook(self._count_sequences, with_kwargs=True)]
        if tower is not None:
            self._handles.append(tower.input_modules()[0].register_forward_pre_hook(self._count_tiles))
        self._restart()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def count_batch(self, batch: Mapping[str, object]) -> None:
        """Count trained tokens and images in a batch from the data loader."""
        if isinstance(labels := batch.get("labels"), Tensor):
            self._add(_TRAINED, (labels != IGNORE_INDEX).sum())
        if isinstance(ids := batch.get("input_ids"), Tensor):
            self._add(_IMAGES, (ids == IMAGE_TOKEN_INDEX).sum())

    def _count_sequences(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self.model.training:
            return
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(states, Tensor):
            return
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        num_rows, num_positions = states.shape[0], states.shape[0] * states.shape[1]
        self._add(_POSITIONS, num_positions)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            lengths = mask.sum(dim=1, dtype=torch.float32)
            self._add(_TOKENS, lengths.sum())
            self._add(_SQUARES, (lengths**2).sum())
            return
        self._add(_TOKENS, num_positions)
        if isinstance(position_ids, Tensor):
            # Packed samples: positions restart with each, and 1 + 3 + 5 + ... is the square of its length.
            self._add(_SQUARES, (2 * position_ids.float() + 1).sum() * num_rows / position_ids.shape[0])
        else:
            self._add(_SQUARES, num_positions * states.shape[1])

    def _count_tiles(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.model.training:
            self._add(_TILES, args[0].shape[0])

    @torch.no_grad()
    def _add(self, counter: int, count: Tensor | float) -> None:
        self.counts[counter] += count

    def _restart(self) -> None:
        self.counts.zero_()
        self._began, self._paused, self._waited = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of validation or saving."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def take(self, sum_over_ranks: Callable[[Tensor], Tensor], num_ranks: int) -> dict[str, float]:
        """Return the figures of all ranks together since the last call."""
        tokens, positions, squares, trained, images, tiles = sum_over_ranks(self.counts.clone()).tolist()
        seconds = max(time.perf_counter() - self._began - self._paused, 1e-9)
        figures = {
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "padding": 1 - tokens / positions if positions else 0.0,
            "trained_tokens": trained / tokens if tokens else 0.0,
            "data_wait": min(self._waited / seconds, 1.0),
            "memory_gib": peak_memory() / 2**30,
        }
        if self.matmul_rate:
            figures["mfu"] = self.flops.total(tokens, squares, tiles) / seconds / (self.matmul_rate * num_ranks)
        self._restart()
        return figures


@dataclass(frozen=True)
class FlopsCounter:
    """Model FLOPs of a training step, from counts: per token, per squared sequence length, per image tile."""

    per_token: float
    per_square: float
    per_tile: float

    def total(self, tokens: float, squares: float, tiles: float) -> float:
        return self.per_token * tokens + self.per_square * squares + self.per_tile * tiles

    @classmethod
    def of_model(cls, model: nn.Module) -> FlopsCounter:
        """Count from a model's weights and from which of them are trained."""
        tower = vision_tower(model)
        in_tower = set(tower.modules()) if tower is not None else set()
        run = [module for part in tower.modules_used() for module in part.modules()] if tower is not None else []
        per_token = per_patch = 0.0
        for name, module in model.named_modules():
            if not isinstance(module, MATMULS) or module in in_tower:
                continue
            cost = _weights(module) * (_FORWARD + _INPUT_GRADIENT + _WEIGHT_GRADIENT * module.weight.requires_grad)
            if "mm_projector" in name:
                per_patch += cost
            else:
                per_token += cost
        input_gradient = _INPUT_GRADIENT * (tower is not None and tower.trainable)
        for module in run:
            if isinstance(module, MATMULS):
                trained = _WEIGHT_GRADIENT * module.weight.requires_grad
                per_patch += _weights(module) * (_FORWARD + input_gradient + trained)
        config = language_model(model).config
        heads = getattr(config, "num_attention_heads", None) or 0  # a state-space model has none
        head_width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        # Scores and values: two products of two FLOPs each for half of the pairs, three times with the backward pass.
        per_square = 3 * 2 * heads * head_width * config.num_hidden_layers
        return cls(per_token, per_square, per_patch * (tower.num_patches + 1 if tower is not None else 0))


MATMULS = (nn.Linear, nn.Conv2d)


def _weights(module: nn.Module) -> int:
    # Quantized or partitioned weights are counted by their full shape.
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()


def base_model(model: Any) -> LlavaModel:
    """The LLaVA or language model under adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def language_model(model: object) -> DecoderStack:
    """The decoder under the output layer, whose input is the spliced sequence."""
    base = base_model(model)
    return getattr(base, base.base_model_prefix)


def vision_tower(model: object) -> VisionTower | None:
    base = base_model(model)
    return base.get_vision_tower() if hasattr(base, "get_vision_tower") else None


def peak_memory() -> int:
    """Bytes of the peak: allocated by tensors on the GPU, or without one by the process in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_matmul_rate(dtype: torch.dtype) -> float | None:
    """Measure the FLOPs per second of a large matrix product on this GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    left, right = (torch.randn(_PROBE_SIZE, _PROBE_SIZE, device="cuda", dtype=dtype) for _ in range(2))
    for _ in range(3):
        torch.mm(left, right)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_PROBE_RUNS):
        torch.mm(left, right)
    end.record()
    end.synchronize()
    return 2 * _PROBE_SIZE**3 * _PROBE_RUNS / (start.elapsed_time(end) / 1e3)
