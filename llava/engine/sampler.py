"""Sample a token from each row of a step's logits, as its request asks.

In: logits, and the slot of each row's sequence. Out: tokens on the device, and log probabilities where asked for. What is the
same for all tokens of a sequence is kept in tables by slot, so that a step indexes tables instead of reading requests.
Nothing waits for the device. Drawing is the kernels'; what changes logits first (penalties, biases, an end that must not come
yet, a grammar) is here.

    S rows, V vocabulary
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava.engine.input_batch import to_device
from llava.engine.kernels.base import Kernels, SamplingTensors
from llava.engine.sequence import SamplingState, Sequence


@dataclass(frozen=True)
class SamplerOutput:
    """The tokens of a step, on the device; for the rows that asked, log probabilities of the token and the most likely ones."""

    tokens: Tensor  # (S,)
    rows: tuple[int, ...] = ()  # A of them, that asked for log probabilities
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
        self._states: list[SamplingState | None] = [None] * max_running
        self._counts: Tensor | None = None  # (max_running, V): how often each token is in the completion
        self._in_prompt: Tensor | None = None  # (max_running, V): whether it is in the prompt

    def assign_slot(self, sequence: Sequence) -> None:
        """Fill the tables' line of a sequence that has got a slot."""
        slot, state = sequence.slot, sequence.sampling
        assert slot is not None
        assert state is not None
        self._states[slot] = state
        self._floats[slot] = state.params.temperature, state.top_p, state.min_p
        self._ints[slot] = state.top_k, state.seed
        if state.is_penalized:
            self._count(slot, sequence)

    def sample(self, logits: Tensor, slots: abc.Sequence[int], num_new: abc.Sequence[int]) -> SamplerOutput:
        """Sample a token for each row of logits (S, V).

        Args:
            logits: (S, V), left as they are.
            slots: The slot of each row's sequence.
            num_new: How many tokens each sequence has sampled before.
        """
        states = [self._states[slot] for slot in slots]
        special = [
            (at, state)
            for at, state in enumerate(states)
            if state is not None and not (state.is_plain and num_new[at] >= state.params.min_new_tokens)
        ]
        asked = tuple(at for at, state in special if state.params.logprobs is not None)
        asked_index = self._send(list(asked))
        raw = logits[asked_index].float().log_softmax(dim=-1) if asked else None
        logits = self._adjusted(logits, special, slots, num_new)
        tokens, _ = self.kernels.sample(logits, self._sampling_rows(slots, num_new))
        penalized = [at for at, state in special if state.is_penalized]
        if penalized and self._counts is not None:
            index = torch.tensor([slots[at] for at in penalized], device=self.device)
            self._counts.index_put_(
                (index, tokens[penalized]), torch.ones_like(index, dtype=torch.int32), accumulate=True
            )
        if raw is None:
            return SamplerOutput(tokens)
        most = max(state.params.logprobs or 0 for _, state in special)
        top = raw.topk(max(most, 1), dim=-1)
        own = raw.gather(1, tokens[asked_index][:, None]).squeeze(1)
        return SamplerOutput(tokens, asked, own, top.indices, top.values)

    def _sampling_rows(self, slots: abc.Sequence[int], num_new: abc.Sequence[int]) -> SamplingTensors:
        floats, ints = self._floats[slots], self._ints[slots]
        all_greedy = not floats[:, 0].any()
        unlimited = not ints[:, 0].any() and bool((floats[:, 1] == 1).all()) and not floats[:, 2].any()
        if all_greedy:  # they are not read
            empty = torch.empty(0, device=self.device)
            return SamplingTensors(empty, empty, empty, empty, empty, empty, all_greedy=True, unlimited=True)
        temperature, top_p, min_p = self._send(floats.T)
        top_k, seeds, positions = self._send(np.vstack([ints.T, np.asarray(num_new, dtype=np.int64)]))
        return SamplingTensors(
            temperature, top_k.int(), top_p, min_p, seeds, positions, all_greedy=False, unlimited=unlimited
        )

    def _adjusted(
        self,
        logits: Tensor,
        special: abc.Sequence[tuple[int, SamplingState]],
        slots: abc.Sequence[int],
        num_new: abc.Sequence[int],
    ) -> Tensor:
        """Logits after penalties, biases and grammars; a copy where there are any."""
        biases = [(at, token, bias) for at, state in special for token, bias in state.biases(num_new[at]).items()]
        penalized = [(at, state) for at, state in special if state.is_penalized]
        constrained = [(at, state.grammar) for at, state in special if state.grammar is not None]
        if not (biases or penalized or constrained):
            return logits
        logits = logits.float() if logits.dtype != torch.float32 else logits.clone()
        if penalized:
            self._penalize_(logits, penalized, slots)
        if biases:
            at, tokens, values = zip(*biases, strict=True)
            index = self._send(np.array([at, tokens]))
            added = self._send(np.array(values, dtype=np.float32))
            logits.index_put_((index[0], index[1]), added, accumulate=True)
        if constrained:
            allowed = np.stack([grammar.allowed(self.vocab_size) for _, grammar in constrained])
            index = self._send([at for at, _ in constrained])
            forbidden = self._send(~allowed)
            logits[index] = logits[index].masked_fill(forbidden, -torch.inf)
        return logits

    def _penalize_(
        self, logits: Tensor, penalized: abc.Sequence[tuple[int, SamplingState]], slots: abc.Sequence[int]
    ) -> None:
        assert self._counts is not None
        assert self._in_prompt is not None
        at = self._send([at for at, _ in penalized])
        slot = self._send([slots[at] for at, _ in penalized])
        repetition, presence, frequency = self._send(
            np.array(
                [
                    (state.repetition_penalty, state.params.presence_penalty, state.params.frequency_penalty)
                    for _, state in penalized
                ],
                dtype=np.float32,
            ).T
        )
        counts, values = self._counts[slot], logits[at]
        factor = torch.where((counts > 0) | self._in_prompt[slot], repetition[:, None], 1.0)
        values = torch.where(values > 0, values / factor, values * factor)
        logits[at] = values - presence[:, None] * (counts > 0) - frequency[:, None] * counts

    def _count(self, slot: int, sequence: Sequence) -> None:
        """Write which tokens a sequence has into its slot's counts."""
        if self._counts is None or self._in_prompt is None:
            size = (self._max_running, self.vocab_size)
            self._counts = torch.zeros(size, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(size, dtype=torch.bool, device=self.device)
        prompt = [token for token in sequence.ids[: sequence.num_prompt] if token >= 0]
        answer = np.array(sequence.ids[sequence.num_prompt :], dtype=np.int64)
        self._counts[slot] = self._send(np.bincount(answer, minlength=self.vocab_size).astype(np.int32))
        self._in_prompt[slot] = self._send(np.bincount(prompt, minlength=self.vocab_size) > 0)

    def _send(self, values: np.ndarray | list[int]) -> Tensor:
        return to_device(values, self.device)
