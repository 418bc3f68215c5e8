"""Compute a step: build its tensors, run the language model over them, sample tokens.

In: a `SchedulerOutput`. Out: an `InFlightStep`; `collect` waits for it and reads the tokens. On a GPU the next step is
launched before the last one is collected: the newest token of each running sequence stays on the device, in the sequence's
slot, where the next step finds it. Image features come from the model's own tower, projector and merge, and enter by the
one splice (model/splice.py).

    T tokens of a step, S sequences, V vocabulary
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.adapters.adapter import LoadedAdapter
from llava.engine.adapters.step import adapters_of
from llava.engine.decoder import Decoder
from llava.engine.encoder_cache import EncoderCache
from llava.engine.input_batch import StepArrays, to_device
from llava.engine.prompt import Prompt, PromptImage
from llava.engine.request import TokenLogprob
from llava.engine.sampler import Sampler, SamplerOutput
from llava.engine.scheduler import ScheduledChunk, SchedulerOutput
from llava.engine.sequence import Sequence, TokenScore
from llava.images.gpu_preprocess import GpuPreprocessor
from llava.model.protocols import LlavaModel
from llava.model.splice import splice

if TYPE_CHECKING:
    from llava.engine.cuda_graphs import StepGraphs

TOWER_TILES = 16  # encoded together where the vision tower's own states are asked for
ENCODED_TILES = 32  # that the vision tower encodes at once
SCORED_POSITIONS = 256  # logits in float32 that exist at once when a continuation is scored


@dataclass(frozen=True)
class StepOutput:
    """What a step gave one sequence: sampled tokens, or what was asked about given ones."""

    chunk: ScheduledChunk
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    scores: tuple[TokenScore, ...] = ()  # of each given token
    states: np.ndarray | None = None  # hidden states (n, D) in float32, or the sum (1, D) of `num_states`
    num_states: int = 0


@dataclass(frozen=True)
class _SampledChunks:
    """Chunks whose tokens were sampled together; those of each begin at its number in `firsts`, in `output`."""

    chunks: list[ScheduledChunk]
    firsts: list[int]
    output: SamplerOutput | None


@dataclass(frozen=True)
class _ScoredChunk:
    """A chunk of a continuation: of each of its N given tokens, and of the K most likely ones in its place."""

    chunk: ScheduledChunk
    logprobs: Tensor  # (N,)
    is_argmax: Tensor  # (N,)
    top_ids: Tensor  # (N, K)
    top_logprobs: Tensor  # (N, K)

    def to_host(self) -> _ScoredChunk:
        tensors = (self.logprobs, self.is_argmax, self.top_ids, self.top_logprobs)
        return _ScoredChunk(self.chunk, *(_copied(tensor) for tensor in tensors))

    def output(self) -> StepOutput:
        tops = [
            tuple(zip(ids, values, strict=True))
            for ids, values in zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        ]
        rows = zip(self.logprobs.tolist(), self.is_argmax.tolist(), tops, strict=True)
        return StepOutput(self.chunk, scores=tuple(TokenScore(*row) for row in rows))


@dataclass(frozen=True)
class _ReadChunk:
    """A chunk of a prompt whose hidden states are asked for: its states (n, D), or the sum (1, D) of `count`."""

    chunk: ScheduledChunk
    states: Tensor
    count: int

    def to_host(self) -> _ReadChunk:
        return _ReadChunk(self.chunk, _copied(self.states), self.count)

    def output(self) -> StepOutput:
        return StepOutput(self.chunk, states=self.states.numpy(), num_states=self.count)


@dataclass(frozen=True)
class InFlightStep:
    """A launched step. Its tensors are on the host, or on their way there until `arrived` has happened."""

    step: SchedulerOutput
    parts: list[_SampledChunks]
    observed: list[_ScoredChunk | _ReadChunk]
    arrived: torch.cuda.Event | None


class Runner:
    def __init__(
        self,
        model: LlavaModel,
        decoder: Decoder,
        sampler: Sampler,
        features: EncoderCache,
        *,
        block_size: int,
        max_running: int,
        max_blocks: int,
        pixel_table: np.ndarray | None,
        gpu_preprocessor: GpuPreprocessor | None = None,
    ) -> None:
        self.decoder, self.sampler, self.features = decoder, sampler, features
        self.device = decoder.device
        self._model = model
        self._block_size = block_size
        self._max_context = max_blocks * block_size
        # A width that 16 divides: kernels are compiled for what divides it.
        self._tables = np.zeros((max_running, -(-max_blocks // 16) * 16), dtype=np.int32)
        self._assigned = [-1] * max_running  # the assignment that each slot has now
        self._num_listed = [0] * max_running
        self._newest = torch.zeros(max_running, dtype=torch.int64, device=self.device)  # each slot's last token
        self._graphs: StepGraphs | None = None
        self._encode: Callable[[Tensor], Tensor] | None = None
        self._pixel_table = None if pixel_table is None else torch.from_numpy(pixel_table).to(self.device)
        self._gpu_preprocessor = gpu_preprocessor

    def record_graphs(self, tile: tuple[int, ...] | None) -> None:
        """Record steps and the vision tower as CUDA graphs; `tile` is the shape of a tile's pixels, if there is a tower."""
        from llava.engine.cuda_graphs import StepGraphs, TowerGraphs

        max_running, num_table = self._tables.shape
        self._graphs = StepGraphs(
            self.decoder, self._newest, max_running=max_running, num_table=num_table, max_context=self._max_context
        )
        if tile is not None:
            self._encode = TowerGraphs(self._model.encode_images, tile, self._model.get_vision_tower())

    def read_images(self, chunk: ScheduledChunk) -> None:
        """Make the pixels that a chunk needs; what is wrong with an image shows here."""
        for image in _images_in(chunk):
            if image.key not in self.features:
                image.prepare()

    def launch(self, step: SchedulerOutput) -> InFlightStep:
        """Begin a step. On a CPU it is over when this returns."""
        parts: list[_SampledChunks] = []
        observed: list[_ScoredChunk | _ReadChunk] = []
        if step.decode:
            parts.append(self._decode(step.decode))
        if step.prefill:
            part, observed = self._prefill(step.prefill)
            parts.append(part)
        return self._copy_to_host(step, parts, observed)

    def collect(self, step: InFlightStep) -> list[StepOutput]:
        """Wait for a step and read what it gave."""
        if step.arrived is not None:
            step.arrived.synchronize()
        outputs = []
        for part in step.parts:
            sampled = part.output
            if sampled is None:
                continue
            tokens = sampled.tokens.tolist()
            logprobs = _read_logprobs(sampled)
            for chunk, first in zip(part.chunks, part.firsts, strict=True):
                if chunk.drafts:
                    accepted = _accepted(chunk.drafts, tokens[first : first + 1 + len(chunk.drafts)])
                    self._newest[chunk.slot] = accepted[-1]  # where the next step looks for it
                    outputs.append(StepOutput(chunk, tuple(accepted)))
                elif chunk.samples:
                    outputs.append(StepOutput(chunk, (tokens[first],), logprobs.get(first, ())))
        return outputs + [observed.output() for observed in step.observed]

    def tower_states(self, prompt: Prompt, *, summed: bool) -> Iterator[tuple[np.ndarray, int]]:
        """What the vision tower gives the projector, a few tiles at a time: states (n, V), or their sum (1, V), and n."""
        tower = _Tower(self._model)
        changed = {} if prompt.adapter is None else prompt.adapter.vision
        tensors = {f"model.{name}": tensor for name, tensor in changed.items()}
        for image in prompt.images:
            image.prepare()
            for tiles in self._normalised(self._tiles(image)).split(TOWER_TILES):
                states = torch.func.functional_call(tower, tensors, (tiles,)).flatten(0, 1).float()
                yield (states.sum(0, keepdim=True) if summed else states).cpu().numpy(), len(states)

    # Decoding: one position of each sequence, whose token is on the device.

    def _decode(self, chunks: list[ScheduledChunk]) -> _SampledChunks:
        adapters = adapters_of(chunks, self.device)
        size = self._graphs.decode_size(len(chunks)) if self._graphs and adapters is None else None
        arrays = self._arrays(chunks, size)
        if self._graphs and size:
            logits, slots = self._graphs.decode(arrays)
            logits, slots = logits[: len(chunks)], slots[: len(chunks)]
        else:
            step = arrays.sent(self.device)
            slots = step.slots
            embeds = self.decoder.embedding[self._newest[slots]]
            hidden = self.decoder.hidden_states(embeds, step.plan(1, self._reach(arrays)), adapters=adapters)
            logits = self.decoder.logits(hidden)
        return self._sample(logits, chunks, list(range(len(chunks))), slots)

    # Prompts: any number of positions, whose tokens and images are known here.

    def _prefill(self, chunks: list[ScheduledChunk]) -> tuple[_SampledChunks, list[_ScoredChunk | _ReadChunk]]:
        num_tokens = sum(chunk.count for chunk in chunks)
        kept = {
            chunk.sequence.read.layer: torch.empty(0)
            for chunk in chunks
            if chunk.sequence.read is not None and not chunk.sequence.read.is_last_layer
        }
        adapters = adapters_of(chunks, self.device)
        is_recorded = self._graphs is not None and not kept and adapters is None
        size = self._graphs.prompt_size(num_tokens, len(chunks)) if self._graphs and is_recorded else None
        arrays = self._arrays(chunks, size)
        embeds = self._prompt_embeds(chunks)
        if self._graphs and size:
            hidden = self._graphs.prompt(arrays, embeds)
        else:
            plan = arrays.sent(self.device).plan(max(chunk.count for chunk in chunks), self._reach(arrays))
            depth = None if any(chunk.sequence.is_cachable for chunk in chunks) else max(kept)
            hidden = self.decoder.hidden_states(embeds, plan, kept=kept, depth=depth, adapters=adapters)
        # The hidden states from which tokens are sampled: the last one of each chunk that samples, and its drafts'.
        sampling: list[ScheduledChunk] = []
        firsts: list[int] = []
        index: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.count
            if chunk.samples:
                sampling.append(chunk)
                firsts.append(len(index))
                index += range(end - 1 - len(chunk.drafts), end)
        observed: list[_ScoredChunk | _ReadChunk] = [*self._scores(chunks, hidden), *self._states(chunks, hidden, kept)]
        if not sampling:
            return _SampledChunks([], [], None), observed
        slots = to_device([chunk.slot for chunk in sampling], self.device)
        logits = self.decoder.logits(hidden[to_device(index, self.device)])
        return self._sample(logits, sampling, firsts, slots), observed

    def _prompt_embeds(self, chunks: list[ScheduledChunk]) -> Tensor:
        """Embeddings (T, D) of text and images, by the splice that training and `generate` use."""
        ids: list[int] = []
        slices: list[Tensor] = []
        features = self._features([(image, chunk.sequence.adapter) for chunk in chunks for image in _images_in(chunk)])
        for chunk in chunks:
            tokens = [*chunk.sequence.ids[chunk.start : chunk.stop - len(chunk.drafts)], *chunk.drafts]
            at = chunk.start
            for image in _images_in(chunk):
                ids += [*tokens[at - chunk.start : max(image.start - chunk.start, 0)], IMAGE_TOKEN_INDEX]
                slices.append(features[image.key][max(chunk.start - image.start, 0) : chunk.stop - image.start])
                at = min(image.stop, chunk.stop)
            ids += tokens[at - chunk.start :]
        if not slices:  # text alone: no splice
            return self._embed(torch.tensor(ids))
        # The ids stay on the host: where everything goes is worked out there, while the device is busy.
        batch = torch.tensor([ids])  # (1, T)
        return splice(batch, torch.ones_like(batch, dtype=torch.bool), slices, self._embed).embeds

    def _embed(self, ids: Tensor) -> Tensor:
        return self.decoder.embedding[to_device(ids.numpy(), self.device)]

    def _features(self, images: abc.Sequence[tuple[PromptImage, LoadedAdapter | None]]) -> dict[bytes, Tensor]:
        """Features of images by their keys: cached ones, and the others computed together, as each adapter sees them."""
        found = {image.key: self.features.get(image.key) for image, _ in images}
        missing: dict[LoadedAdapter | None, dict[bytes, PromptImage]] = {}
        for image, adapter in images:
            if found[image.key] is None:
                seen_by = adapter if adapter is not None and adapter.changes_vision else None
                missing.setdefault(seen_by, {})[image.key] = image
        for seen_by, group in missing.items():
            made = self._encoded(list(group.values()), seen_by)
            for key, features in zip(group, made, strict=True):
                found[key] = features
                self.features.put(key, features)
        return {key: features for key, features in found.items() if features is not None}

    def _encoded(self, images: abc.Sequence[PromptImage], adapter: LoadedAdapter | None) -> list[Tensor]:
        """Features of images and videos, by the model's own tower and projector or by an adapter's."""
        pixels = [self._normalised(self._tiles(image)) for image in images]
        sizes, modalities = [image.size for image in images], [image.modality for image in images]
        if adapter is None:
            return self._model.image_features(
                pixels,
                sizes,
                modalities=modalities,
                encode=partial(_in_batches, self._encode or self._model.encode_images),
            )
        tensors = {f"model.{name}": tensor for name, tensor in adapter.vision.items()}
        return torch.func.functional_call(_ImageFeatures(self._model), tensors, (pixels, sizes, modalities))

    def _tiles(self, image: PromptImage) -> Tensor:
        """Bytes (n, 3, side, side), on the device."""
        if image.colours is not None:
            assert self._gpu_preprocessor is not None
            return self._gpu_preprocessor(to_device(image.colours, self.device), image.layout)
        return to_device(image.pixels().numpy(), self.device)

    def _normalised(self, tiles: Tensor) -> Tensor:
        """What the image processor makes of bytes (n, 3, side, side), looked up in its table (3, 256)."""
        assert self._pixel_table is not None
        places = tiles.int() + torch.arange(0, 3 * 256, 256, device=tiles.device, dtype=torch.int32).view(3, 1, 1)
        return self._pixel_table.flatten()[places]

    # Both.

    def _arrays(self, chunks: list[ScheduledChunk], size: tuple[int, int, int] | None = None) -> StepArrays:
        for chunk in chunks:
            self._list_blocks(chunk.sequence)
        on_gpu = self.device.type == "cuda"
        return StepArrays.of(chunks, self._tables, self._block_size, padded_to=size, whole_tables=on_gpu, pinned=on_gpu)

    def _reach(self, arrays: StepArrays) -> int:
        """An upper bound for contexts: exact on a CPU, a few different ones on a GPU, where kernels depend on it."""
        if self.device.type == "cpu":
            return arrays.max_context
        return min(1 << (arrays.max_context - 1).bit_length(), self._max_context)

    def _list_blocks(self, sequence: Sequence) -> None:
        """Update a slot's block table, and its sampling state where another sequence has it now."""
        slot, blocks = sequence.slot, sequence.blocks
        assert slot is not None
        if self._assigned[slot] != sequence.assignment:
            self._assigned[slot], self._num_listed[slot] = sequence.assignment, 0
            if sequence.sampling is not None:
                self.sampler.assign_slot(sequence)
        listed = self._num_listed[slot]
        if listed < len(blocks):
            self._tables[slot, listed : len(blocks)] = blocks[listed:]
            self._num_listed[slot] = len(blocks)

    def _sample(
        self, logits: Tensor, chunks: list[ScheduledChunk], firsts: list[int], device_slots: Tensor
    ) -> _SampledChunks:
        """Tokens for logits, of which those of `chunks` begin at `firsts`; `device_slots` (len(chunks),) are theirs."""
        slots: list[int] = []
        num_new: list[int] = []
        for chunk in chunks:
            before = chunk.stop - len(chunk.drafts) - chunk.sequence.num_prompt
            slots += [chunk.slot] * (1 + len(chunk.drafts))
            num_new += range(before, before + 1 + len(chunk.drafts))
        output = self.sampler.sample(logits, slots, num_new)
        # With drafts, the first token is stored; which one is the newest is known when they have been read.
        tokens = output.tokens if len(chunks) == len(slots) else output.tokens[to_device(firsts, self.device)]
        self._newest.index_copy_(0, device_slots, tokens)
        return _SampledChunks(chunks, firsts, output)

    def _scores(self, chunks: list[ScheduledChunk], hidden: Tensor) -> list[_ScoredChunk]:
        """Of each token of a continuation that the next position's logits are computed for here."""
        scores, end = [], 0
        for chunk in chunks:
            end += chunk.count
            sequence = chunk.sequence
            first = max(chunk.start, sequence.first_output)
            if not sequence.is_scored or first >= chunk.stop:
                continue
            sequence.num_observed = chunk.stop
            targets = to_device(sequence.ids[first + 1 : chunk.stop + 1], self.device)
            states = hidden[end - (chunk.stop - first) : end]
            parts: list[tuple[Tensor, ...]] = []
            for at in range(0, len(targets), SCORED_POSITIONS):
                logprobs = self.decoder.logits(states[at : at + SCORED_POSITIONS]).float().log_softmax(dim=-1)
                wanted = targets[at : at + SCORED_POSITIONS]
                top = logprobs.topk(sequence.num_top, dim=-1)
                own = logprobs.gather(1, wanted[:, None]).squeeze(1)
                parts.append((own, logprobs.argmax(dim=-1) == wanted, top.indices, top.values))
            scores.append(_ScoredChunk(chunk, *(torch.cat(tensors) for tensors in zip(*parts, strict=True))))
        return scores

    def _states(self, chunks: list[ScheduledChunk], hidden: Tensor, kept: dict[int, Tensor]) -> list[_ReadChunk]:
        """The hidden states that are asked for among the positions computed here."""
        read_chunks, end = [], 0
        for chunk in chunks:
            end += chunk.count
            sequence, read = chunk.sequence, chunk.sequence.read
            if read is None:
                continue
            positions = read.positions(max(chunk.start, sequence.num_observed), chunk.stop)
            sequence.num_observed = max(sequence.num_observed, chunk.stop)
            if not positions:
                continue
            source = hidden if read.is_last_layer else kept[read.layer]
            states = source[to_device([end - chunk.stop + at for at in positions], self.device)].float()
            states = states.sum(0, keepdim=True) if read.pooling == "mean" else states
            read_chunks.append(_ReadChunk(chunk, states, len(positions)))
        return read_chunks

    def _copy_to_host(
        self, step: SchedulerOutput, parts: list[_SampledChunks], observed: list[_ScoredChunk | _ReadChunk]
    ) -> InFlightStep:
        if self.device.type != "cuda":
            return InFlightStep(step, parts, observed, None)
        parts = [
            _SampledChunks(part.chunks, part.firsts, _to_host(part.output)) for part in parts if part.output is not None
        ]
        observed = [chunk.to_host() for chunk in observed]
        arrived = torch.cuda.Event()
        arrived.record()
        return InFlightStep(step, parts, observed, arrived)


class _ImageFeatures(nn.Module):
    """`image_features` as a module, which `functional_call` runs with other tensors."""

    def __init__(self, model: LlavaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: list[Tensor], sizes: list[tuple[int, int]], modalities: list[str]) -> list[Tensor]:
        encode = partial(_in_batches, self.model.encode_images)
        return self.model.image_features(pixels, sizes, modalities=modalities, encode=encode)


class _Tower(_ImageFeatures):
    """The same of the vision tower alone."""

    def forward(self, tiles: Tensor) -> Tensor:  # type: ignore[override]
        tower = self.model.get_vision_tower()
        assert tower is not None
        return tower(tiles)


def _in_batches(encode: Callable[[Tensor], Tensor], tiles: Tensor) -> Tensor:
    """Encode tiles (N, 3, side, side), a bounded number at once: a step may have images and videos of many."""
    if len(tiles) <= ENCODED_TILES:
        return encode(tiles)
    return torch.cat([encode(part) for part in tiles.split(ENCODED_TILES)])


def _images_in(chunk: ScheduledChunk) -> list[PromptImage]:
    """The images that have features among the positions of a chunk."""
    return [image for image in chunk.sequence.images if image.start < chunk.stop and image.stop > chunk.start]


def _accepted(drafts: abc.Sequence[int], sampled: abc.Sequence[int]) -> list[int]:
    """The tokens that would have come one by one: accepted drafts, and the token sampled after the last of them."""
    num_accepted = 0
    while num_accepted < len(drafts) and drafts[num_accepted] == sampled[num_accepted]:
        num_accepted += 1
    return list(sampled[: num_accepted + 1])


def _read_logprobs(output: SamplerOutput) -> dict[int, tuple[TokenLogprob, ...]]:
    if output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
        return {}
    tokens = output.tokens.tolist()
    return {
        row: (TokenLogprob(tokens[row], own, tuple(zip(ids, values, strict=True))),)
        for row, own, ids, values in zip(
            output.rows, output.logprobs.tolist(), output.top_ids.tolist(), output.top_logprobs.tolist(), strict=True
        )
    }


def _to_host(output: SamplerOutput) -> SamplerOutput:
    tensors = (output.tokens, output.logprobs, output.top_ids, output.top_logprobs)
    tokens, *others = [None if tensor is None else _copied(tensor) for tensor in tensors]
    assert tokens is not None
    return SamplerOutput(tokens, output.rows, *others)


def _copied(tensor: Tensor) -> Tensor:
    """On its way to the host; there when the step's event has happened."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
