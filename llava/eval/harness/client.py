"""Ask a model the questions of benchmarks, through the engine.

In: questions, a model folder, sampling parameters. Out: the text of each answer as it comes, in any order. Greedy answers do
not depend on what else is asked at the same time. Sampled answers have a seed each, made from the run's seed and the
question, so that shards and resumed runs give the same answers. Torch is imported when a model is loaded.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli.startup import quick_imports
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, get_template, with_image_placeholders
from llava.engine.request import Request, SamplingParams
from llava.errors import InputError
from llava.eval.types import Question
from llava.images.io import load_image

if TYPE_CHECKING:
    from PIL import Image

    from llava.model.builder import LoadedModel

NUM_IMAGES_KEPT = 64  # decoded images; the next question is often about the same one


@dataclass(frozen=True)
class ModelChoice:
    """A model, and how it is loaded."""

    path: str
    base: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    conv_mode: str | None = None  # None: the template that the model's files imply


@dataclass(frozen=True)
class Failure:
    """Why a question could not be asked."""

    reason: str


OnResult = Callable[[int, "str | Failure"], None]  # number of the question, its answer


class EvalClient:
    """A loaded model that answers questions. Use it as `with EvalClient.open(choice, sampling) as client`."""

    def __init__(
        self, loaded: LoadedModel, sampling: SamplingParams, *, conv_mode: str | None = None, seed: int = 0
    ) -> None:
        from llava.engine.selection import open_engine

        self.loaded = loaded
        self.conv_mode = conv_mode or loaded.conv_mode
        self.sampling = sampling
        self.seed = seed
        self._image_cache = _ImageCache()
        self._placeholder = loaded.processor.image_placeholder if loaded.processor is not None else DEFAULT_IMAGE_TOKEN
        self._engine = open_engine(loaded, num_beams=sampling.num_beams)

    @classmethod
    def open(cls, choice: ModelChoice, sampling: SamplingParams, *, seed: int = 0) -> EvalClient:
        if choice.conv_mode is not None:
            get_template(choice.conv_mode)  # an unknown name is refused before the model is loaded
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

    def __enter__(self) -> EvalClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.close()

    def conversation(self, question: Question) -> Conversation:
        """Put a question into the template, with its images where it says so, else before it."""
        return question_conversation(self.conv_mode, question.prompt, len(question.images), self._placeholder)

    def answer(self, questions: Sequence[tuple[int, Question]], on_result: OnResult, *, max_new_tokens: int) -> None:
        """Answer numbered questions, many at a time.

        `on_result` is called in this thread with each number and its answer, or why there is none, in any order.
        """
        num_threads = self._engine.max_running * 5 // 4 + 8  # enough that the engine never waits for a prompt
        questions = in_rounds(questions, min(num_threads, self._num_prompts_kept(questions)))
        with ThreadPoolExecutor(num_threads) as pool:
            waiting: dict[Future[str | Failure], int] = {}
            try:
                for number, question in questions:
                    if len(waiting) >= 2 * num_threads:
                        _deliver(waiting, on_result)
                    waiting[pool.submit(self._answer_one, question, max_new_tokens)] = number
                while waiting:
                    _deliver(waiting, on_result)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._engine.close()
                raise

    def _num_prompts_kept(self, questions: Sequence[tuple[int, Question]]) -> int:
        """Return how many prompts like the first fit in half of the engine's cache."""
        processor = self.loaded.processor
        if processor is None:  # no images, nothing to share
            return 1
        stats = self._engine.stats()
        for _, question in questions:
            try:
                ids = processor.encode_ids(self.conversation(question), len(question.images))
                layouts = processor.plan([image.size for image in self._images(question)])
            except InputError:  # a broken image; try the next
                continue
            size = len(ids) - len(layouts) + sum(layout.num_features for layout in layouts)
            return max(1, stats.num_blocks * stats.block_size // (2 * size))
        return 1

    def _answer_one(self, question: Question, max_new_tokens: int) -> str | Failure:
        """Answer one question. Its own faults (a broken image, a prompt too long) must not end the others."""
        seed = None if self.sampling.greedy else question_seed(self.seed, question)
        params = replace(self.sampling, max_new_tokens=max_new_tokens, seed=seed)
        try:
            request = Request(self.conversation(question), self._images(question), params)
            result = self._engine.submit(request, streamed=False, wait=True).result()
        except InputError as error:
            return Failure(str(error))
        return result.text

    def _images(self, question: Question) -> list[Image.Image]:
        return [self._image_cache.get(source) for source in question.images]


def in_rounds(questions: Sequence[tuple[int, Question]], width: int) -> list[tuple[int, Question]]:
    """Reorder questions so that those about one image follow each other at a distance of `width` images.

    Asked at the same time, each would compute the image's keys and values for itself; asked one after the other, the
    later ones find them in the cache. Only neighbouring questions are regrouped.
    """
    groups = [list(group) for _, group in groupby(questions, key=lambda numbered: numbered[1].images or numbered[0])]
    ordered = []
    for start in range(0, len(groups), width):
        for round_ in zip_longest(*groups[start : start + width]):
            ordered += [numbered for numbered in round_ if numbered is not None]
    return ordered


def question_conversation(conv_mode: str, question: str, num_images: int, placeholder: str) -> Conversation:
    """Make a conversation of one unanswered question."""
    conversation = get_template(conv_mode).copy()
    conversation.append_message(conversation.roles[0], with_image_placeholders(question, num_images, placeholder))
    conversation.append_message(conversation.roles[1], None)
    return conversation


def _deliver(waiting: dict[Future[str | Failure], int], on_result: OnResult) -> None:
    """Wait for at least one answer, and call `on_result` for all that are there."""
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        on_result(waiting.pop(future), future.result())


def question_seed(seed: int, question: Question) -> int:
    """Return a question's seed: the same in every shard and every order."""
    text = f"{seed}\0{question.id}\0{question.round}\0{question.prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class _ImageCache:
    """Keeps the last decoded images. Threads that ask for one at the same time decode it once."""

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
                # Like the original, without the rotation in a photograph's EXIF data.
                future.set_result(load_image(source, upright=False))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def missing_images(questions: Iterable[Question]) -> list[Path]:
    """Return image files that do not exist, each once, in the order of the questions."""
    known: dict[Path, bool] = {}
    for question in questions:
        for source in question.images:
            if isinstance(source, Path) and source not in known:
                known[source] = source.is_file()
    return [path for path, found in known.items() if not found]
