"""Put questions to a model: the one place where evaluation and the engine meet.

In: items, a model folder, how to choose tokens. Out: the text of each answer, as they come, in any order. Greedy answers do
not depend on what else is asked at the time; sampled ones have a seed of their own each, made from the run's seed and the
question, so that shards and resumed runs give the same. Torch is imported when a model is loaded.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.cli.startup import quick_imports
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, answer_end, get_template, with_image_placeholders
from llava.engine.hf_engine import Sampling, stream_answer
from llava.engine.request import PromptSize
from llava.errors import InputError
from llava.eval.types import Question
from llava.images.io import load_image

if TYPE_CHECKING:
    from PIL import Image

    from llava.model.builder import LoadedModel

THREADS_ON_GPU, THREADS_ON_CPU = 320, 48  # somewhat more than the engine computes together, so that it never waits
NUM_IMAGES_KEPT = 64  # decoded images; the next question is often about the same one


@dataclass(frozen=True)
class ModelChoice:
    """Which model to ask, and how it runs."""

    path: str
    base: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    conv_mode: str | None = None  # None: the template that the model's files imply


@dataclass(frozen=True)
class Failure:
    """Why a question could not be put to the model."""

    reason: str


Done = Callable[[int, "str | Failure"], None]


class Asker:
    """A loaded model that answers items. Use it as `with Asker.open(choice, sampling) as asker`."""

    def __init__(self, loaded: LoadedModel, sampling: Sampling, *, conv_mode: str | None = None, seed: int = 0) -> None:
        self.loaded = loaded
        self.conv_mode = conv_mode or loaded.conv_mode
        self.sampling = sampling
        self.seed = seed
        self._image_cache = _ImageCache()
        self._placeholder = loaded.processor.image_placeholder if loaded.processor is not None else DEFAULT_IMAGE_TOKEN
        self._engine = None if sampling.num_beams > 1 else _engine_of(loaded)

    @classmethod
    def open(cls, choice: ModelChoice, sampling: Sampling, *, seed: int = 0) -> Asker:
        if choice.conv_mode is not None:
            get_template(choice.conv_mode)  # a name that nobody knows is refused before anything is loaded
        with quick_imports():
            from llava.model.builder import load

            loaded = load(
                choice.path,
                base=choice.base,
                device=choice.device,
                dtype=choice.dtype,
                quantization=choice.quantization,
            )
        return cls(loaded, sampling, conv_mode=choice.conv_mode, seed=seed)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._engine is not None:
            self._engine.close()

    def conversation(self, item: Question) -> Conversation:
        """A question in the template's words, its images marked where it says so, else before it."""
        return ask(self.conv_mode, item.prompt, len(item.images), self._placeholder)

    def ask(self, items: Sequence[tuple[int, Question]], done: Done, *, max_new_tokens: int) -> None:
        """Answer numbered items and call `done` with each number and text, in this thread."""
        if self._engine is None:
            for number, item in items:
                done(number, self._guarded(self._generate, item, max_new_tokens))
            return
        num_threads = THREADS_ON_GPU if self.loaded.model.device.type == "cuda" else THREADS_ON_CPU
        items = in_rounds(items, min(num_threads, self._num_prompts_kept(items)))
        with ThreadPoolExecutor(num_threads) as pool:
            waiting: dict[Future[str | Failure], int] = {}
            try:
                for number, item in items:
                    if len(waiting) >= 2 * num_threads:
                        _hand_over(waiting, done)
                    waiting[pool.submit(self._guarded, self._request, item, max_new_tokens)] = number
                while waiting:
                    _hand_over(waiting, done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._engine.close()
                raise

    def _num_prompts_kept(self, items: Sequence[tuple[int, Question]]) -> int:
        """How many prompts like the first the engine's cache holds, with as much room again for those being computed."""
        processor = self.loaded.processor
        if processor is None or self._engine is None:  # no images, nothing to share
            return 1
        stats = self._engine.stats()
        for _, item in items:
            try:
                ids = processor.encode_ids(self.conversation(item), len(item.images))
                layouts = processor.plan([image.size for image in self._images(item)])
            except InputError:  # a broken image: the next one may do
                continue
            size = len(ids) - len(layouts) + sum(layout.num_features for layout in layouts)
            return max(1, stats.num_blocks * stats.block_size // (2 * size))
        return 1

    def _guarded(self, answer: Callable[[Question, int], str], item: Question, max_new_tokens: int) -> str | Failure:
        """What is wrong with one question (a broken image, a prompt too long) must not end the others."""
        try:
            return answer(item, max_new_tokens)
        except InputError as error:
            return Failure(str(error))

    def _request(self, item: Question, max_new_tokens: int) -> str:
        from llava.engine.request import Request, SamplingParams

        assert self._engine is not None
        params = SamplingParams(
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p or 1.0,
            max_new_tokens=max_new_tokens,
            seed=None if self.sampling.temperature == 0 else item_seed(self.seed, item),
        )
        return self._engine.generate(Request(self.conversation(item), self._images(item), params)).text

    def _generate(self, item: Question, max_new_tokens: int) -> str:
        """One by one by the model's own `generate`: for beam search, and for models that the engine cannot run."""
        import torch

        processor = self.loaded.processor
        if processor is None:
            raise InputError(
                f"{self.loaded.info.folder} is a language model without a vision tower; it takes no images"
            )
        conversation = self.conversation(item)
        inputs = processor(conversation, self._images(item))
        size = PromptSize(inputs.num_tokens - inputs.num_image_tokens, inputs.num_image_tokens)
        sampling = Sampling(
            self.sampling.temperature, self.sampling.top_p, self.sampling.num_beams, max_new_tokens
        ).fitted(size, self.loaded.context_len)
        torch.manual_seed(item_seed(self.seed, item))
        stream = stream_answer(
            self.loaded.model,
            self.loaded.tokenizer,
            inputs.input_ids[None],
            images=inputs.images,
            image_sizes=inputs.image_sizes or None,
            sampling=sampling,
            stop=[answer_end(conversation)],
        )
        return stream.answer.text

    def _images(self, item: Question) -> list[Image.Image]:
        return [self._image_cache.get(source) for source in item.images]


def in_rounds(items: Sequence[tuple[int, Question]], width: int) -> list[tuple[int, Question]]:
    """The same items, so that questions about one image follow each other at a distance of `width` images.

    Asked at the same time, each would compute the image's keys and values for itself; asked one after the other, the
    later ones find them in the cache. Only neighbours are brought together, so the order is the benchmark's but for that.
    """
    groups = [list(group) for _, group in groupby(items, key=lambda numbered: numbered[1].images or numbered[0])]
    ordered = []
    for start in range(0, len(groups), width):
        for round_ in zip_longest(*groups[start : start + width]):
            ordered += [numbered for numbered in round_ if numbered is not None]
    return ordered


def ask(conv_mode: str, question: str, num_images: int, placeholder: str) -> Conversation:
    """A conversation of one question not answered yet."""
    conversation = get_template(conv_mode).copy()
    conversation.append_message(conversation.roles[0], with_image_placeholders(question, num_images, placeholder))
    conversation.append_message(conversation.roles[1], None)
    return conversation


def _engine_of(loaded: LoadedModel) -> Any:
    """The engine around a model, or None where it cannot run this one."""
    from llava.engine.engine import Engine, unsupported_reason

    return Engine.from_loaded(loaded) if unsupported_reason(loaded.model) is None else None


def _hand_over(waiting: dict[Future[str | Failure], int], done: Done) -> None:
    """Wait for at least one answer and hand out all that are there."""
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        done(waiting.pop(future), future.result())


def item_seed(seed: int, item: Question) -> int:
    """A question's own seed: the same whichever shard asks it, and in whatever order."""
    text = f"{seed}\0{item.id}\0{item.round}\0{item.prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class _ImageCache:
    """The last decoded images, by file. Threads that ask for one at the same time decode it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Path | bytes, Future[Image.Image]] = OrderedDict()

    def get(self, source: Path | bytes) -> Image.Image:
        with self._lock:
            future = self._kept.get(source)
            is_mine = future is None
            if future is None:
                future = self._kept[source] = Future()
                while len(self._kept) > NUM_IMAGES_KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(source)
        if is_mine:
            try:
                # As the original sees it: not turned as a photograph's EXIF data say.
                future.set_result(load_image(source, upright=False))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def missing_images(items: Iterable[Question]) -> list[Path]:
    """Images that are not there, each once, in the order of the questions."""
    known: dict[Path, bool] = {}
    for item in items:
        for source in item.images:
            if isinstance(source, Path) and source not in known:
                known[source] = source.is_file()
    return [path for path, found in known.items() if not found]
