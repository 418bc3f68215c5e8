"""A LLaVA engine in one file, to be read from top to bottom. docs/minimal_engine.md explains it step by step.

It answers many questions about images at a time, greedily: prompts are tokens and image features, keys and values lie in pages,
and every step computes new prompts together with the next token of every running answer (continuous batching). Its answers are
those of `llava.Engine`, which does the same for more models, samples, caches prefixes and is fast; a test compares them.

    python docs/minimal_engine.py images/demo.jpg "What do you see?" "What colour is the star?"

    T tokens of a step, S positions of one question, D width, H query heads, K key heads, d head width
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import llava
from llava.assets import embedded_model_path
from llava.constants import IMAGE_TOKEN_INDEX
from llava.session import LoadedImage

PAGE = 16  # positions of one page of keys and values
BUDGET = 256  # prompt positions computed in one step
MAX_RUNNING = 16  # questions that run together


# 1. A question, and its answer so far.


@dataclass(eq=False)
class Question:
    """One question: what enters the language model, what has been computed of it, and the answer."""

    prompt: Tensor  # (P, D): embeddings of text, with image features in place of each image
    max_new_tokens: int
    answer: list[int] = field(default_factory=list)
    num_computed: int = 0  # positions whose keys and values are in pages
    pages: list[int] = field(default_factory=list)

    @property
    def num_known(self) -> int:
        """Positions whose input is known: the prompt, and each token of the answer."""
        return len(self.prompt) + len(self.answer)

    @property
    def num_missing(self) -> int:
        """Positions to compute before the next token follows; 1 while an answer is being written."""
        return self.num_known - self.num_computed


# 2. Pages: memory for keys and values, given out in small pieces, so that no question reserves what it does not use.


class Pages:
    def __init__(self, count: int, layers: int, heads: int, width: int, like: Tensor) -> None:
        size = (layers, count, PAGE, heads, width)
        self.keys, self.values = (torch.zeros(size, dtype=like.dtype, device=like.device) for _ in range(2))
        self.free = list(range(count))

    def extend(self, question: Question, num_positions: int) -> bool:
        """Give a question pages for its first `num_positions`; False where there are not enough, and then none is given."""
        missing = -(-num_positions // PAGE) - len(question.pages)
        if missing > len(self.free):
            return False
        question.pages += [self.free.pop() for _ in range(missing)]
        return True

    def release(self, question: Question) -> None:
        """Take everything back. What was computed is lost, and computed again if the question goes on."""
        self.free += question.pages
        question.pages, question.num_computed = [], 0

    def write(self, layer: int, question: Question, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (n, K, d) of the positions from `start` on."""
        at = torch.arange(start, start + len(keys))
        pages, offsets = torch.tensor(question.pages)[at // PAGE], at % PAGE
        self.keys[layer, pages, offsets], self.values[layer, pages, offsets] = keys, values

    def read(self, layer: int, question: Question, num_positions: int) -> tuple[Tensor, Tensor]:
        """Keys and values (S, K, d) of a question's first positions, wherever its pages are."""
        pages = torch.tensor(question.pages[: -(-num_positions // PAGE)])
        keys, values = (part[layer, pages].flatten(0, 1)[:num_positions] for part in (self.keys, self.values))
        return keys, values


# 3. Which positions of which questions the next step computes.


@dataclass(frozen=True)
class Chunk:
    """Positions `start` to `stop` of a question."""

    question: Question
    start: int
    stop: int

    @property
    def gives_token(self) -> bool:
        """Whether everything known is computed then, so that the next token follows from it."""
        return self.stop == self.question.num_known


class Scheduler:
    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.waiting: deque[Question] = deque()
        self.running: list[Question] = []  # in the order in which they were admitted

    def schedule(self) -> list[Chunk]:
        """Choose a step: the next position of every running answer, then parts of prompts, as many as the budget allows."""
        chunks = []
        budget = BUDGET
        for question in list(self.running):
            if question not in self.running:  # it was preempted for one before it
                continue
            count = min(question.num_missing, budget) if question.num_missing > 1 else 1
            if count == 0 or not self._make_room(question, question.num_computed + count):
                continue
            budget -= count if count > 1 else 0
            chunks.append(Chunk(question, question.num_computed, question.num_computed + count))
        while self.waiting and budget > 0 and len(self.running) < MAX_RUNNING:
            question = self.waiting[0]
            count = min(question.num_missing, budget)
            if not self.pages.extend(question, count):
                break  # who waits longest is not passed over
            self.running.append(self.waiting.popleft())
            budget -= count
            chunks.append(Chunk(question, 0, count))
        return [chunk for chunk in chunks if chunk.question in self.running]

    def _make_room(self, question: Question, num_positions: int) -> bool:
        """Get pages for a question; where none are left, the one admitted last gives up its own and waits again."""
        while not self.pages.extend(question, num_positions):
            last = self.running.pop()
            self.pages.release(last)
            self.waiting.appendleft(last)
            if last is question:
                return False
        return True

    def finish(self, question: Question) -> None:
        self.running.remove(question)
        self.pages.release(question)


# 4. The language model: a LLaMA's layers over packed tokens. Only attention looks at other positions than its own.


class LanguageModel:
    """Computes with the weights of a loaded model; its own `forward` is not called."""

    def __init__(self, model: Any, pages: Pages) -> None:
        self.model, self.inner, self.pages = model, model.get_model(), pages
        self.head_dim = self.inner.layers[0].self_attn.head_dim

    def logits(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step, and return the logits (chunks, V) of the position after each chunk."""
        x = torch.cat([self._inputs(chunk) for chunk in chunks])  # (T, D): all chunks, one after another
        positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])  # (T,)
        cos, sin = self.inner.rotary_emb(x, positions[None].to(x.device))  # (1, T, d)
        for number, layer in enumerate(self.inner.layers):
            x = x + self._attention(number, layer.self_attn, layer.input_layernorm(x), cos[0], sin[0], chunks)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last = torch.tensor([chunk.stop - chunk.start for chunk in chunks]).cumsum(0) - 1
        return self.model.lm_head(self.inner.norm(x[last]))

    def _inputs(self, chunk: Chunk) -> Tensor:
        """What enters at a chunk's positions, (n, D): embeddings of the prompt, then of the answer's tokens."""
        question, num_prompt = chunk.question, len(chunk.question.prompt)
        tokens = question.answer[max(chunk.start - num_prompt, 0) : max(chunk.stop - num_prompt, 0)]
        answer = torch.tensor(tokens, dtype=torch.long)
        embedded = self.model.get_input_embeddings()(answer.to(question.prompt.device))
        return torch.cat([question.prompt[chunk.start : chunk.stop], embedded])

    def _attention(
        self, number: int, attention: Any, x: Tensor, cos: Tensor, sin: Tensor, chunks: Sequence[Chunk]
    ) -> Tensor:
        """Rotate, store keys and values, and let each chunk attend to all of its own question so far, (T, D)."""
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # (T, H or K, d)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = rotated(queries, cos, sin), rotated(keys, cos, sin)
        outputs, first = [], 0
        for chunk in chunks:
            rows = slice(first, first + chunk.stop - chunk.start)
            first = rows.stop
            self.pages.write(number, chunk.question, chunk.start, keys[rows], values[rows])
            all_keys, all_values = self.pages.read(number, chunk.question, chunk.stop)
            # A position sees itself and what is before it: of position `start + i`, the first `start + i + 1` keys.
            mask = torch.ones(rows.stop - rows.start, chunk.stop, dtype=torch.bool, device=x.device).tril(chunk.start)
            heads_first = (part.transpose(0, 1)[None] for part in (queries[rows], all_keys, all_values))
            out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)  # (1, H, n, d)
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return attention.o_proj(torch.cat(outputs))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings (Su et al., 2021): turn pairs (i, i + d/2) of x (T, heads, d) by the angles of each position."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


# 5. The engine: questions in, answers out.


class MinimalEngine:
    def __init__(self, loaded: Any, num_pages: int = 512) -> None:
        self.loaded, self.model = loaded, loaded.model
        config, weight = self.model.config, self.model.get_input_embeddings().weight
        head_dim = self.model.get_model().layers[0].self_attn.head_dim
        pages = Pages(num_pages, config.num_hidden_layers, config.num_key_value_heads, head_dim, weight)
        self.num_positions = PAGE * num_pages
        self.scheduler = Scheduler(pages)
        self.language_model = LanguageModel(self.model, pages)
        ends = self.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), loaded.tokenizer.eos_token_id}

    @torch.inference_mode()
    def ask(self, prompt: Any, images: Sequence[Any] = (), max_new_tokens: int = 128) -> Question:
        """Queue a question: a prompt with an <image> for each image. The tower looks at the images now."""
        inputs = self.loaded.processor(prompt, images)
        features = self.model.image_features(inputs.images, inputs.image_sizes) if images else []
        question = Question(self._embedded(inputs.input_ids, features), max_new_tokens)
        if question.num_known + max_new_tokens > self.num_positions:
            raise llava.InputError(
                f"{question.num_known} + {max_new_tokens} positions are more than {self.num_positions}"
            )
        self.scheduler.waiting.append(question)
        return question

    def _embedded(self, ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The splice: embeddings of text tokens, and in place of each -200 the features of the next image, (P, D)."""
        parts, images = [], iter(features)
        for token in ids.tolist():
            is_image = token == IMAGE_TOKEN_INDEX
            parts.append(next(images) if is_image else self.model.get_input_embeddings().weight[token][None])
        return torch.cat(parts)

    @torch.inference_mode()
    def step(self) -> Iterator[Question]:
        """Compute one step, and yield the questions that it finished."""
        chunks = self.scheduler.schedule()
        tokens = self.language_model.logits(chunks).argmax(dim=-1).tolist()
        for chunk, token in zip(chunks, tokens, strict=True):
            question = chunk.question
            gives_token = chunk.gives_token
            question.num_computed = chunk.stop
            if gives_token:
                question.answer.append(token)
                if token in self.ends or len(question.answer) == question.max_new_tokens:
                    self.scheduler.finish(question)
                    yield question

    def run(self) -> Iterator[Question]:
        """Answer everything that was asked; yields each question when it ends."""
        while self.scheduler.waiting or self.scheduler.running:
            yield from self.step()

    def text(self, question: Question) -> str:
        return self.loaded.tokenizer.decode(question.answer, skip_special_tokens=True).strip()


def main(image: str, *questions: str) -> None:
    loaded = llava.load(embedded_model_path(), device="cpu")
    engine, session = MinimalEngine(loaded), llava.Session(loaded)
    session.attach([LoadedImage.open(image)])
    shown = [attached.image for attached in session.images]
    asked = {engine.ask(session.conversation(text).get_prompt(), shown): text for text in questions}
    for question in engine.run():
        print(f"{asked[question]} {engine.text(question)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
