"""Each row of a step's logits to a token, as its request asks.

In: logits, and for each row a sequence with its `Choice`. Out: tokens on the device, and log probabilities where asked for.
What is the same for all tokens of a sequence stands in tables with a line for each running sequence, so that a step picks
lines instead of reading requests. Nothing waits for the device. The arithmetic of drawing is the kernels'; what changes
logits first (penalties, biases, an end that must not come yet, a grammar) is here.

    S rows, V vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.engine.input_batch import sent
from llava.engine.kernels.base import Kernels, SamplingTensors
from llava.engine.request import MAX_SEED, SamplingParams
from llava.engine.sequence import Sequence

STRIDE = 0x9E3779B97F4A7C15  # between the seeds of a request's completions: odd, and far from small numbers


class Choice:
    """How one completion's tokens are chosen."""

    def __init__(self, params: SamplingParams, index: int, end_ids: frozenset[int], grammar: Any = None) -> None:
        seed = random.getrandbits(62) if params.seed is None else params.seed
        self.params = params
        self.seed = (seed + index * STRIDE) & MAX_SEED
        self.end_ids = end_ids
        self.grammar = grammar  # a matcher of grammar.py
        self.is_penalized = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )

    @property
    def is_plain(self) -> bool:
        """The likeliest token, and nothing else asked: what guessing ahead is exact for."""
        params = self.params
        return (
            params.greedy
            and not self.is_penalized
            and not params.logit_bias
            and self.grammar is None
            and params.logprobs is None
        )

    def biases(self, num_new: int) -> dict[int, float]:
        """What is added to single logits when `num_new` tokens are there."""
        biases = dict(self.params.logit_bias)
        if num_new < self.params.min_new_tokens:
            biases |= dict.fromkeys(self.end_ids, -torch.inf)
        return biases


@dataclass(frozen=True)
class Chosen:
    """What a step has chosen, on the device; `logprobs` is for the rows `asked`: the token's, and the likeliest ones'."""

    tokens: Tensor  # (S,)
    asked: tuple[int, ...] = ()
    logprobs: Tensor | None = None  # (A,)
    top_ids: Tensor | None = None  # (A, N)
    top_logprobs: Tensor | None = None  # (A, N)


class Sampler:
    def __init__(self, kernels: Kernels, *, max_running: int, vocab_size: int, device: torch.device) -> None:
        self.kernels = kernels
        self.vocab_size = vocab_size
        self.device = device
        self._max_running = max_running
        self._floats = np.zeros((max_running, 3), dtype=np.float32)  # temperature, top_p, min_p
        self._ints = np.zeros((max_running, 2), dtype=np.int64)  # top_k, seed
        self._choices: list[Choice | None] = [None] * max_running
        self._counts: Tensor | None = None  # (max_running, V): how often each token stands in an answer
        self._in_prompt: Tensor | None = None  # (max_running, V): whether it stands in the prompt

    def seat(self, sequence: Sequence) -> None:
        """A sequence has got a row."""
        row, choice = sequence.row, sequence.choice
        assert row is not None
        params = choice.params
        self._choices[row] = choice
        self._floats[row] = params.temperature, params.top_p, params.min_p
        self._ints[row] = params.top_k, choice.seed
        if choice.is_penalized:
            self._count(row, sequence)

    def choose(self, logits: Tensor, rows: Rows[int], num_new: Rows[int]) -> Chosen:
        """A token for each row of logits (S, V): `rows` are the sequences' rows, `num_new` how many tokens each has."""
        choices = [self._choices[row] for row in rows]
        special = [
            (at, choice)
            for at, choice in enumerate(choices)
            if choice is not None and not (choice.is_plain and num_new[at] >= choice.params.min_new_tokens)
        ]
        asked = tuple(at for at, choice in special if choice.params.logprobs is not None)
        asked_index = self._send(list(asked))
        raw = logits[asked_index].float().log_softmax(dim=-1) if asked else None
        logits = self._adjusted(logits, special, rows, num_new)
        tokens, _ = self.kernels.sample(logits, self._sampling_rows(rows, num_new))
        penalized = [at for at, choice in special if choice.is_penalized]
        if penalized and self._counts is not None:
            index = torch.tensor([rows[at] for at in penalized], device=self.device)
            self._counts.index_put_(
                (index, tokens[penalized]), torch.ones_like(index, dtype=torch.int32), accumulate=True
            )
        if raw is None:
            return Chosen(tokens)
        most = max(choice.params.logprobs or 0 for _, choice in special)
        top = raw.topk(max(most, 1), dim=-1)
        own = raw.gather(1, tokens[asked_index][:, None]).squeeze(1)
        return Chosen(tokens, asked, own, top.indices, top.values)

    def _sampling_rows(self, rows: Rows[int], num_new: Rows[int]) -> SamplingTensors:
        floats, ints = self._floats[rows], self._ints[rows]
        all_greedy = not floats[:, 0].any()
        unlimited = not ints[:, 0].any() and bool((floats[:, 1] == 1).all()) and not floats[:, 2].any()
        if all_greedy:  # nobody reads the numbers
            empty = torch.empty(0, device=self.device)
            return SamplingTensors(empty, empty, empty, empty, empty, empty, all_greedy=True, unlimited=True)
        temperature, top_p, min_p = self._send(floats.T)
        top_k, seeds, positions = self._send(np.vstack([ints.T, np.asarray(num_new, dtype=np.int64)]))
        return SamplingTensors(
            temperature, top_k.int(), top_p, min_p, seeds, positions, all_greedy=False, unlimited=unlimited
        )

    def _adjusted(
        self, logits: Tensor, special: Rows[tuple[int, Choice]], rows: Rows[int], num_new: Rows[int]
    ) -> Tensor:
        """Logits after penalties, biases and grammars; a copy where there are any."""
        biases = [(at, token, bias) for at, choice in special for token, bias in choice.biases(num_new[at]).items()]
        penalized = [(at, choice) for at, choice in special if choice.is_penalized]
        constrained = [(at, choice) for at, choice in special if choice.grammar is not None]
        if not (biases or penalized or constrained):
            return logits
        logits = logits.float() if logits.dtype != torch.float32 else logits.clone()
        if penalized:
            self._penalize_(logits, penalized, rows)
        if biases:
            at, tokens, values = zip(*biases, strict=True)
            index = self._send(np.array([at, tokens]))
            added = self._send(np.array(values, dtype=np.float32))
            logits.index_put_((index[0], index[1]), added, accumulate=True)
        if constrained:
            allowed = np.stack([choice.grammar.allowed(self.vocab_size) for _, choice in constrained])
            index = self._send([at for at, _ in constrained])
            forbidden = self._send(~allowed)
            logits[index] = logits[index].masked_fill(forbidden, -torch.inf)
        return logits

    def _penalize_(self, logits: Tensor, penalized: Rows[tuple[int, Choice]], rows: Rows[int]) -> None:
        assert self._counts is not None
        assert self._in_prompt is not None
        at = self._send([at for at, _ in penalized])
        row = self._send([rows[at] for at, _ in penalized])
        repetition, presence, frequency = self._send(
            np.array(
                [
                    (choice.params.repetition_penalty, choice.params.presence_penalty, choice.params.frequency_penalty)
                    for _, choice in penalized
                ],
                dtype=np.float32,
            ).T
        )
        counts, values = self._counts[row], logits[at]
        factor = torch.where((counts > 0) | self._in_prompt[row], repetition[:, None], 1.0)
        values = torch.where(values > 0, values / factor, values * factor)
        logits[at] = values - presence[:, None] * (counts > 0) - frequency[:, None] * counts

    def _count(self, row: int, sequence: Sequence) -> None:
        """Write what a sequence consists of into its lines of the tables."""
        if self._counts is None or self._in_prompt is None:
            size = (self._max_running, self.vocab_size)
            self._counts = torch.zeros(size, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(size, dtype=torch.bool, device=self.device)
        prompt = [token for token in sequence.ids[: sequence.num_prompt] if token >= 0]
        answer = np.array(sequence.ids[sequence.num_prompt :], dtype=np.int64)
        self._counts[row] = self._send(np.bincount(answer, minlength=self.vocab_size).astype(np.int32))
        self._in_prompt[row] = self._send(np.bincount(prompt, minlength=self.vocab_size) > 0)

    def _send(self, values: np.ndarray | list[int]) -> Tensor:
        return sent(values, self.device)
