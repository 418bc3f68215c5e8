"""Steps recorded as CUDA graphs: a few hundred kernels launched by one call.

In: what a step of a given size does with its buffers. Out: the same, replayed for steps of up to that size, which are
padded. Recorded are decoding for a range of numbers of sequences, short prompts, and the vision tower for a few tiles; any
other step runs as it is written. All recordings share their memory, since one is over before the next begins.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llava.engine.decoder import Decoder
from llava.engine.input_batch import StepArrays, StepTensors

PROMPT_TOKENS = (16, 32, 64, 128, 256)  # beyond, a GPU is busy for longer than Python needs to launch
PROMPT_SEQUENCES = 8  # sequences in a recorded step of prompts
TILES = (1, 2, 3, 4, 5, 6, 8)  # of the vision tower


def decode_sizes(max_running: int) -> list[int]:
    """1, 2, 4, then ever longer steps: a padded sequence costs little, a graph for each number would cost memory."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_running + 32, 32)]
    return [size for size in sizes if size < max_running] + [max_running]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    buffers: tuple[Tensor, ...]
    result: Tensor


class StepGraphs:
    """Recordings of a decoder's steps. `newest` (slots,) are the running sequences' last tokens."""

    def __init__(self, decoder: Decoder, newest: Tensor, *, max_running: int, num_table: int, max_context: int) -> None:
        self._decoder, self._newest = decoder, newest
        self._num_table, self._max_context = num_table, max_context
        self._pool = torch.cuda.graph_pool_handle()
        self._decode: dict[int, _Recorded] = {}
        self._prompt: dict[int, _Recorded] = {}
        for size in reversed(decode_sizes(max_running)):  # the largest first: the others fit into its memory
            self._decode[size] = self._record_decode(size)
        for size in reversed(PROMPT_TOKENS):
            self._prompt[size] = self._record_prompt(size)
        self._decode_sizes, self._prompt_sizes = sorted(self._decode), sorted(self._prompt)

    def decode_size(self, num_sequences: int) -> tuple[int, int, int] | None:
        """How large the arrays of a decoding step must be; None where it was not recorded."""
        size = _at_least(num_sequences, self._decode_sizes)
        return None if size is None else (size, size, self._num_table)

    def prompt_size(self, num_tokens: int, num_sequences: int) -> tuple[int, int, int] | None:
        size = _at_least(num_tokens, self._prompt_sizes) if num_sequences <= PROMPT_SEQUENCES else None
        return None if size is None else (size, PROMPT_SEQUENCES, self._num_table)

    def decode(self, arrays: StepArrays) -> tuple[Tensor, Tensor]:
        """Logits (S, V) and the slots (S,) that they belong to; good until the next replay."""
        recorded = self._decode[arrays.size[0]]
        step = arrays.sent(self._decoder.device, into=recorded.buffers[0])
        recorded.graph.replay()
        return recorded.result, step.slots

    def prompt(self, arrays: StepArrays, embeds: Tensor) -> Tensor:
        """Hidden states (T, D)."""
        recorded = self._prompt[arrays.size[0]]
        arrays.sent(self._decoder.device, into=recorded.buffers[0])
        recorded.buffers[1][: len(embeds)].copy_(embeds)
        recorded.graph.replay()
        return recorded.result

    def _record_decode(self, size: int) -> _Recorded:
        decoder = self._decoder
        step = StepTensors.empty((size, size, self._num_table), decoder.device)
        plan = step.plan(1, self._max_context)

        def run() -> Tensor:
            embeds = decoder.embedding[self._newest[step.slots]]
            return decoder.logits(decoder.hidden_states(embeds, plan))

        return _record(run, (step.flat,), self._pool)

    def _record_prompt(self, size: int) -> _Recorded:
        decoder = self._decoder
        step = StepTensors.empty((size, PROMPT_SEQUENCES, self._num_table), decoder.device)
        plan = step.plan(size, self._max_context)
        embeds = torch.zeros(size, decoder.embedding.shape[1], dtype=decoder.dtype, device=decoder.device)
        return _record(lambda: decoder.hidden_states(embeds.clone(), plan), (step.flat, embeds), self._pool)


class TowerGraphs:
    """Recordings of `encode_images` by number of tiles; the result of a call is the caller's own."""

    def __init__(self, encode: Callable[[Tensor], Tensor], tile: tuple[int, ...], like: Tensor) -> None:
        self._encode = encode
        pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[int, _Recorded] = {}
        for size in reversed(TILES):
            pixels = torch.zeros(size, *tile, dtype=like.dtype, device=like.device)
            self._recorded[size] = _record(partial(encode, pixels), (pixels,), pool)
        self._sizes = sorted(self._recorded)

    def __call__(self, pixels: Tensor) -> Tensor:
        size = _at_least(len(pixels), self._sizes)
        if size is None or pixels.shape[1:] != self._recorded[size].buffers[0].shape[1:]:
            return self._encode(pixels)
        recorded = self._recorded[size]
        recorded.buffers[0][: len(pixels)].copy_(pixels)
        recorded.graph.replay()
        return recorded.result[: len(pixels)].clone()


def _record(run: Callable[[], Tensor], buffers: tuple[Tensor, ...], pool: tuple[int, int]) -> _Recorded:
    """Run once as it is, which compiles what must be compiled, and once for the record."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return _Recorded(graph, buffers, result)


def _at_least(number: int, sizes: list[int]) -> int | None:
    place = bisect_left(sizes, number)
    return sizes[place] if place < len(sizes) else None
