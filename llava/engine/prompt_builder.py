"""Build the engine's prompts: tokenize a request's conversation and lay its images out.

In: a `Request`. Out: a `Prompt`. This runs in the thread of whoever submits. A GPU scales images and cuts them into tiles
itself (images/gpu_preprocess.py). Elsewhere, and for very large images, that happens here, and only for an image whose
features are not cached yet or that is too large to be kept whole.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, check_placeholders
from llava.engine.adapters.adapter import LoadedAdapter
from llava.engine.prompt import KEPT_PIXELS, Prompt, PromptImage, PromptVideo
from llava.engine.request import EmbedRequest, Request, ScoreRequest
from llava.errors import InputError
from llava.images.frames import Video
from llava.images.layout import ImageLayout
from llava.images.video_layout import VideoLayout
from llava.processor import Layout, Processor, entry_rgb

if TYPE_CHECKING:
    from PIL import Image


class PromptBuilder:
    """Builds prompts for one model.

    Args:
        processor: The model's tokenizer and image processor.
        vocab_size: Token ids are below this.
        is_cached: Whether the features of an image with this key are in the encoder cache.
        adapter_of: The adapter of a name.
        on_device: Leave images that are not too large for the device to cut into tiles.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        vocab_size: int,
        is_cached: Callable[[bytes], bool],
        adapter_of: Callable[[str], LoadedAdapter],
        on_device: bool = False,
    ) -> None:
        self._vocab_size = vocab_size
        self._is_cached = is_cached
        self._adapter_of = adapter_of
        self._on_device = on_device
        self._lock = threading.Lock()  # tokenizers change settings of theirs while they work
        self._processor = processor
        if processor.image_processor is not None:
            as_bytes = replace(processor.image_processor, do_rescale=False, do_normalize=False)
            self._processor = replace(processor, image_processor=as_bytes)

    def __call__(self, request: Request | ScoreRequest | EmbedRequest) -> Prompt:
        if request.images and self._processor.image_processor is None:
            raise InputError("this model has no vision tower, so it cannot look at images")
        asked = request.prompt if request.prompt is not None else [IMAGE_TOKEN_INDEX] * len(request.images)
        ids = self._encode(asked, request.images)
        rgb = [entry_rgb(image) for image in request.images]
        details = () if isinstance(request, ScoreRequest) else request.details
        layouts = self._processor.layouts(rgb, details)
        adapter = None if request.adapter is None else self._adapter_of(request.adapter)
        seen_by = adapter.key if adapter is not None and adapter.changes_vision else b""
        spread: list[int] = []
        images: list[PromptImage] = []
        for token in ids:
            if token == IMAGE_TOKEN_INDEX:
                image = self._prompt_image(rgb[len(images)], layouts[len(images)], len(spread), seen_by)
                images.append(image)
                spread.extend(range(-1, -1 - image.num_features, -1))
            else:
                spread.append(token)
        for image in images:
            if not (image.is_kept_whole and self._is_cached(image.key)):
                image.prepare()
        return Prompt(spread, tuple(images), adapter)

    def _prompt_image(self, entry: Image.Image | Video, layout: Layout, start: int, seen_by: bytes) -> PromptImage:
        if isinstance(entry, Video):
            assert isinstance(layout, VideoLayout)
            return PromptVideo(entry, layout, start, self._processor.video_pixels, seen_by=seen_by)
        assert isinstance(layout, ImageLayout)
        on_device = self._on_device and math.prod(entry.size) <= KEPT_PIXELS
        return PromptImage(entry, layout, start, None if on_device else self._processor.pixels, seen_by=seen_by)

    def with_continuation(self, request: ScoreRequest) -> tuple[Prompt, list[int]]:
        """A prompt, and the ids that continue it."""
        prompt = self(request)
        if not isinstance(request.continuation, str):
            ids = check_token_ids(request.continuation, self._vocab_size)
        else:
            ids = self._encode_continuation(request, request.continuation)
        if not ids:
            raise InputError("the continuation is empty; give at least one token to score")
        return prompt, ids

    def _encode_continuation(self, request: ScoreRequest, continuation: str) -> list[int]:
        text = request.prompt.get_prompt() if isinstance(request.prompt, Conversation) else request.prompt
        if isinstance(text, str):
            before = self._encode(text, request.images)
            together = self._encode(text + continuation, request.images)
            if together[: len(before)] == before:
                return together[len(before) :]
        with self._lock:
            return list(self._processor.tokenizer(continuation, add_special_tokens=False).input_ids)

    def _encode(self, prompt: Conversation | str | Sequence[int], images: Sequence[Image.Image | Video]) -> list[int]:
        num_images = len(images)
        if isinstance(prompt, (Conversation, str)):
            prompt = self._processor.with_times(prompt, images)
            with self._lock:
                ids = self._processor.encode_ids(prompt, num_images)
        else:
            ids = check_token_ids(prompt, self._vocab_size, with_images=True)
            check_placeholders(ids.count(IMAGE_TOKEN_INDEX), num_images)
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        return ids


def check_token_ids(ids: Sequence[int], vocab_size: int, *, with_images: bool = False) -> list[int]:
    """The ids as integers; raises where one is not a token (or, `with_images`, the id that stands for an image)."""
    checked = [int(token) for token in ids]
    wrong = [t for t in checked if not 0 <= t < vocab_size and not (with_images and t == IMAGE_TOKEN_INDEX)]
    if wrong:
        raise InputError(
            f"token id {wrong[0]} is not one of this model's, which are 0 to {vocab_size - 1}"
            + (f", or {IMAGE_TOKEN_INDEX} for an image" if with_images else "")
        )
    return checked
