"""Computes a step: builds its tensors, runs the language model over them, has tokens chosen.

In: a `Step` of the scheduler. Out: `Launched`, work on its way; `collect` waits for it and reads the tokens. On a GPU the
next step is launched before the last one is collected: the newest token of each running sequence stays on the device, in
the sequence's row, where the next step finds it. Image features come from the model's own tower, projector and merge, and
enter by the one splice.

    T tokens of a step, S sequences, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.engine.decoder import Decoder
from llava.engine.encoder_cache import EncoderCache
from llava.engine.input_batch import StepArrays, sent
from llava.engine.prompt import PromptImage
from llava.engine.request import TokenLogprob
from llava.engine.sampler import Chosen, Sampler
from llava.engine.scheduler import Step, Work
from llava.engine.sequence import Sequence
from llava.images.gpu_preprocess import GpuPreprocessor
from llava.model.splice import splice

if TYPE_CHECKING:
    from llava.engine.cuda_graphs import StepGraphs

SCORED_ROWS = 256  # logits in float32 that exist at once when a continuation is scored


@dataclass(frozen=True)
class Outcome:
    """What a step gave one sequence: tokens chosen, or what was asked about a continuation's tokens."""

    work: Work
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    scores: tuple[
        tuple[float, bool], ...
    ] = ()  # of each given token: its log probability, and whether it is the likeliest


@dataclass(frozen=True)
class _Part:
    """Rows of one launch: those of `work` begin at `firsts`, in `chosen`."""

    work: list[Work]
    firsts: list[int]
    chosen: Chosen | None


@dataclass(frozen=True)
class Launched:
    """Work under way. Its tensors are on the host, or on their way there until `arrived` has happened."""

    step: Step
    parts: list[_Part]
    scores: list[tuple[Work, Tensor, Tensor]]
    arrived: torch.cuda.Event | None


class Runner:
    def __init__(
        self,
        model: Any,
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
        self._placed = [-1] * max_running  # who has a row, by number of placement
        self._num_listed = [0] * max_running
        self._newest = torch.zeros(max_running, dtype=torch.int64, device=self.device)  # each row's last token
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

    def read_images(self, work: Work) -> None:
        """Make the pixels that this work will need; what is wrong with an image shows here."""
        for image in _images_in(work):
            if image.key not in self.features:
                image.prepare()

    def launch(self, step: Step) -> Launched:
        """Begin a step. On a CPU it is over when this returns."""
        parts: list[_Part] = []
        scores: list[tuple[Work, Tensor, Tensor]] = []
        if step.decode:
            parts.append(self._decode(step.decode))
        if step.prefill:
            part, scores = self._prefill(step.prefill)
            parts.append(part)
        return self._sent_home(step, parts, scores)

    def collect(self, launched: Launched) -> list[Outcome]:
        """Wait for a step and read what it gave."""
        if launched.arrived is not None:
            launched.arrived.synchronize()
        outcomes = []
        for part in launched.parts:
            chosen = part.chosen
            if chosen is None:
                continue
            tokens = chosen.tokens.tolist()
            logprobs = _read_logprobs(chosen)
            for work, first in zip(part.work, part.firsts, strict=True):
                if work.drafts:
                    accepted = _accepted(work.drafts, tokens[first : first + 1 + len(work.drafts)])
                    self.set_newest(work.sequence, accepted[-1])
                    outcomes.append(Outcome(work, tuple(accepted)))
                elif work.chooses:
                    outcomes.append(Outcome(work, (tokens[first],), logprobs.get(first, ())))
        outcomes += [
            Outcome(work, scores=tuple(zip(values.tolist(), likeliest.tolist(), strict=True)))
            for work, values, likeliest in launched.scores
        ]
        return outcomes

    def set_newest(self, sequence: Sequence, token: int) -> None:
        """Put a token that was decided on the host where the next step looks for it."""
        assert sequence.row is not None
        self._newest[sequence.row] = token

    # Decoding: one position of each sequence, whose token is on the device.

    def _decode(self, work: list[Work]) -> _Part:
        size = self._graphs.decode_size(len(work)) if self._graphs else None
        arrays = self._arrays(work, size)
        if self._graphs and size:
            logits, rows = self._graphs.decode(arrays)
            logits, rows = logits[: len(work)], rows[: len(work)]
        else:
            step = arrays.sent(self.device)
            rows = step.rows
            embeds = self.decoder.embedding[self._newest[rows]]
            logits = self.decoder.logits(self.decoder.hidden_states(embeds, step.plan(1, self._reach(arrays))))
        return self._choose(logits, work, list(range(len(work))), rows)

    # Prompts: any number of positions, whose tokens and images are known here.

    def _prefill(self, work: list[Work]) -> tuple[_Part, list[tuple[Work, Tensor, Tensor]]]:
        num_tokens = sum(item.count for item in work)
        size = self._graphs.prompt_size(num_tokens, len(work)) if self._graphs else None
        arrays = self._arrays(work, size)
        embeds = self._prompt_embeds(work)
        if self._graphs and size:
            hidden = self._graphs.prompt(arrays, embeds)
        else:
            plan = arrays.sent(self.device).plan(max(item.count for item in work), self._reach(arrays))
            hidden = self.decoder.hidden_states(embeds, plan)
        # The hidden states from which tokens are chosen: the last one of each that chooses, and those of its guesses.
        chooses: list[Work] = []
        firsts: list[int] = []
        index: list[int] = []
        end = 0
        for item in work:
            end += item.count
            if item.chooses:
                chooses.append(item)
                firsts.append(len(index))
                index += range(end - 1 - len(item.drafts), end)
        scores = self._scores(work, hidden)
        if not chooses:
            return _Part([], [], None), scores
        rows = sent([_row_of(item) for item in chooses], self.device)
        logits = self.decoder.logits(hidden[sent(index, self.device)])
        return self._choose(logits, chooses, firsts, rows), scores

    def _prompt_embeds(self, work: list[Work]) -> Tensor:
        """Embeddings (T, D) of text and images, by the splice that training and `generate` use."""
        ids: list[int] = []
        slices: list[Tensor] = []
        features = self._features([image for item in work for image in _images_in(item)])
        for item in work:
            tokens = [*item.sequence.ids[item.start : item.stop - len(item.drafts)], *item.drafts]
            at = item.start
            for image in _images_in(item):
                ids += [*tokens[at - item.start : max(image.start - item.start, 0)], IMAGE_TOKEN_INDEX]
                slices.append(features[image.key][max(item.start - image.start, 0) : item.stop - image.start])
                at = min(image.stop, item.stop)
            ids += tokens[at - item.start :]
        if not slices:  # text alone, as most of a conversation is: nothing to work out
            return self._embed(torch.tensor(ids))
        # The ids stay on the host: where everything goes is worked out there, while the device is busy.
        row = torch.tensor([ids])
        return splice(row, torch.ones_like(row, dtype=torch.bool), slices, self._embed).embeds

    def _embed(self, ids: Tensor) -> Tensor:
        return self.decoder.embedding[sent(ids.numpy(), self.device)]

    def _features(self, images: Items[PromptImage]) -> dict[bytes, Tensor]:
        """Features of images by their keys: those that are at hand, and the others computed together."""
        found = {image.key: self.features.get(image.key) for image in images}
        missing = list({image.key: image for image in images if found[image.key] is None}.values())
        if missing:
            pixels = [self._normalised(self._tiles(image)) for image in missing]
            made = self._model.image_features(pixels, [image.size for image in missing], encode=self._encode)
            for image, features in zip(missing, made, strict=True):
                found[image.key] = features
                self.features.put(image.key, features)
        return {key: features for key, features in found.items() if features is not None}

    def _tiles(self, image: PromptImage) -> Tensor:
        """Bytes (n, 3, side, side), on the device."""
        if image.colours is not None:
            assert self._gpu_preprocessor is not None
            return self._gpu_preprocessor(sent(image.colours, self.device), image.num_tiles)
        return sent(image.pixels().numpy(), self.device)

    def _normalised(self, tiles: Tensor) -> Tensor:
        """What the image processor makes of bytes (n, 3, side, side), looked up in its table (3, 256)."""
        assert self._pixel_table is not None
        places = tiles.int() + torch.arange(0, 3 * 256, 256, device=tiles.device, dtype=torch.int32).view(3, 1, 1)
        return self._pixel_table.flatten()[places]

    # Both.

    def _arrays(self, work: list[Work], size: tuple[int, int, int] | None = None) -> StepArrays:
        for item in work:
            self._list_blocks(item.sequence)
        on_gpu = self.device.type == "cuda"
        return StepArrays.of(work, self._tables, self._block_size, padded_to=size, whole_tables=on_gpu, pinned=on_gpu)

    def _reach(self, arrays: StepArrays) -> int:
        """An upper bound for contexts: exact on a CPU, a few different ones on a GPU, where kernels depend on it."""
        if self.device.type == "cpu":
            return arrays.max_context
        return min(1 << (arrays.max_context - 1).bit_length(), self._max_context)

    def _list_blocks(self, sequence: Sequence) -> None:
        """Bring what is noted of a row up to date: who has it, and the list of its blocks."""
        row, blocks = sequence.row, sequence.blocks
        assert row is not None
        if self._placed[row] != sequence.placement:
            self._placed[row], self._num_listed[row] = sequence.placement, 0
            if sequence.choice is not None:
                self.sampler.seat(sequence)
        listed = self._num_listed[row]
        if listed < len(blocks):
            self._tables[row, listed : len(blocks)] = blocks[listed:]
            self._num_listed[row] = len(blocks)

    def _choose(self, logits: Tensor, work: list[Work], firsts: list[int], rows_there: Tensor) -> _Part:
        """Tokens for logits whose rows for `work` begin at `firsts`; `rows_there` (len(work),) is on the device."""
        rows: list[int] = []
        num_new: list[int] = []
        for item in work:
            before = item.stop - len(item.drafts) - item.sequence.num_prompt
            rows += [_row_of(item)] * (1 + len(item.drafts))
            num_new += range(before, before + 1 + len(item.drafts))
        chosen = self.sampler.choose(logits, rows, num_new)
        # Of guesses, the first choice is put there; which one is the newest is known when they have been read.
        tokens = chosen.tokens if len(work) == len(rows) else chosen.tokens[sent(firsts, self.device)]
        self._newest.index_copy_(0, rows_there, tokens)
        return _Part(work, firsts, chosen)

    def _scores(self, work: list[Work], hidden: Tensor) -> list[tuple[Work, Tensor, Tensor]]:
        """Of each token of a continuation that the next position's logits are computed for here."""
        scores, end = [], 0
        for item in work:
            end += item.count
            sequence = item.sequence
            first = max(item.start, sequence.num_prompt - 1)
            if not sequence.is_scored or first >= item.stop:
                continue
            targets = sent(sequence.ids[first + 1 : item.stop + 1], self.device)
            states = hidden[end - (item.stop - first) : end]
            values, likeliest = [], []
            for at in range(0, len(targets), SCORED_ROWS):
                logprobs = self.decoder.logits(states[at : at + SCORED_ROWS]).float().log_softmax(dim=-1)
                wanted = targets[at : at + SCORED_ROWS]
                values.append(logprobs.gather(1, wanted[:, None]).squeeze(1))
                likeliest.append(logprobs.argmax(dim=-1) == wanted)
            scores.append((item, torch.cat(values), torch.cat(likeliest)))
        return scores

    def _sent_home(self, step: Step, parts: list[_Part], scores: list[tuple[Work, Tensor, Tensor]]) -> Launched:
        if self.device.type != "cuda":
            return Launched(step, parts, scores, None)
        parts = [_Part(part.work, part.firsts, _to_host(part.chosen)) for part in parts if part.chosen is not None]
        scores = [(work, _copied(values), _copied(likeliest)) for work, values, likeliest in scores]
        arrived = torch.cuda.Event()
        arrived.record()
        return Launched(step, parts, scores, arrived)


def _row_of(work: Work) -> int:
    assert work.sequence.row is not None
    return work.sequence.row


def _images_in(work: Work) -> list[PromptImage]:
    """The images that have features among the positions of this work."""
    return [image for image in work.sequence.images if image.start < work.stop and image.stop > work.start]


def _accepted(drafts: Items[int], chosen: Items[int]) -> list[int]:
    """The tokens that would have come one by one: right guesses, and the choice after the last of them."""
    num_right = 0
    while num_right < len(drafts) and drafts[num_right] == chosen[num_right]:
        num_right += 1
    return list(chosen[: num_right + 1])


def _read_logprobs(chosen: Chosen) -> dict[int, tuple[TokenLogprob, ...]]:
    if chosen.logprobs is None or chosen.top_ids is None or chosen.top_logprobs is None:
        return {}
    tokens = chosen.tokens.tolist()
    return {
        row: (TokenLogprob(tokens[row], own, tuple(zip(ids, values, strict=True))),)
        for row, own, ids, values in zip(
            chosen.asked, chosen.logprobs.tolist(), chosen.top_ids.tolist(), chosen.top_logprobs.tolist(), strict=True
        )
    }


def _to_host(chosen: Chosen) -> Chosen:
    tensors = (chosen.tokens, chosen.logprobs, chosen.top_ids, chosen.top_logprobs)
    tokens, *others = [None if tensor is None else _copied(tensor) for tensor in tensors]
    assert tokens is not None
    return Chosen(tokens, chosen.asked, *others)


def _copied(tensor: Tensor) -> Tensor:
    """On its way to the host; there when the step's event has happened."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
