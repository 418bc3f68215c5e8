"""Put questions to a model: the one place where evaluation and the engine meet.

In: items, a model folder, sampling parameters. Out: the text of each answer, as they come, in any order. Greedy answers do
not depend on what else is asked at the time; sampled ones have a seed of their own each, made from the run's seed and the
question, so that shards and resumed runs give the same. Torch is imported when a model is loaded.
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
    def open(cls, choice: ModelChoice, sampling: SamplingParams, *, seed: int = 0) -> Asker:
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
        self._engine.close()

    def conversation(self, item: Question) -> Conversation:
        """A question in the template's words, its images marked where it says so, else before it."""
        return ask(self.conv_mode, item.prompt, len(item.images), self._placeholder)

    def ask(self, items: Sequence[tuple[int, Question]], done: Done, *, max_new_tokens: int) -> None:
        """Answer numbered items and call `done` with each number and text, in this thread."""
        num_threads = self._engine.max_running * 5 // 4 + 8  # so many that the engine never waits for a prompt
        items = in_rounds(items, min(num_threads, self._num_prompts_kept(items)))
        with ThreadPoolExecutor(num_threads) as pool:
            waiting: dict[Future[str | Failure], int] = {}
            try:
                for number, item in items:
                    if len(waiting) >= 2 * num_threads:
                        _deliver(waiting, done)
                    waiting[pool.submit(self._answer, item, max_new_tokens)] = number
                while waiting:
                    _deliver(waiting, done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._engine.close()
                raise

    def _num_prompts_kept(self, items: Sequence[tuple[int, Question]]) -> int:
        """How many prompts like the first the engine's cache holds, with as much room again for those being computed."""
        processor = self.loaded.processor
        if processor is None:  # no images, nothing to share
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

    def _answer(self, item: Question, max_new_tokens: int) -> str | Failure:
        """Answer one question. What is wrong with it (a broken image, a prompt too long) must not end the others."""
        seed = None if self.sampling.greedy else item_seed(self.seed, item)
        params = replace(self.sampling, max_new_tokens=max_new_tokens, seed=seed)
        try:
            request = Request(self.conversation(item), self._images(item), params)
            result = self._engine.submit(request, streamed=False, wait=True).result()
        except InputError as error:
            return Failure(str(error))
        text: str = result.text
        return text

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


def _deliver(waiting: dict[Future[str | Failure], int], done: Done) -> None:
    """Wait for at least one answer, and call `done` for all that are there."""
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
