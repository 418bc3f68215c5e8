"""A request's conversation and images, made into the prompt that the engine computes.

In: a `Request`. Out: a `Prompt`, ids with a place for every image feature, and its images, known by their content. This
runs in the thread of whoever asks. Images leave it as bytes, a quarter of the size of normalised pixels; normalising is
a look-up on the device. A GPU also scales them and cuts them into tiles (images/gpu_preprocess.py); elsewhere, and for
very large ones, that happens here, and only for an image whose features are not known yet or that is too large to be
kept.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, check_placeholders
from llava.engine.request import Request, ScoreRequest
from llava.engine.sequence import Prompt
from llava.errors import InputError
from llava.images.io import to_rgb
from llava.processor import Processor

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from llava.images.layout import ImageLayout


KEPT_PIXELS = 4_000_000  # of an image kept whole: its features are known, or a device makes its tiles


def prompt_bytes(layout: ImageLayout, tile_size: int) -> int:
    """What a prompt holds of an image: its tiles, or a small one itself, to which Pillow gives 4 bytes a pixel."""
    pixels = layout.size.width * layout.size.height
    return max(3 * layout.num_tiles * tile_size**2, 4 * pixels if pixels <= KEPT_PIXELS else 0)


class PromptImage:
    """An image in a prompt, its features at positions `start` to `stop`.

    `key` names content and layout: the same key, the same features. A layout follows from size, model and number of
    tiles, so these stand for it.
    """

    def __init__(
        self, rgb: Image.Image, layout: ImageLayout, start: int, to_pixels: Callable[[list[Any]], list[Tensor]] | None
    ) -> None:
        """Without `to_pixels`, its tiles are made on the device, from its colours (H, W, 3)."""
        colours = np.array(rgb)
        content = hashlib.sha256(repr((rgb.size, layout.num_tiles)).encode())
        content.update(colours.data)
        self.key = content.digest()
        self.size = rgb.size
        self.start = start
        self.num_features = layout.num_features
        self.num_tiles = layout.num_tiles
        self.colours = colours if to_pixels is None else None
        self._rgb = None if to_pixels is None else rgb  # until its pixels are made
        self._to_pixels = to_pixels
        self._pixels: Tensor | None = None

    @property
    def stop(self) -> int:
        return self.start + self.num_features

    def pixels(self) -> Tensor:
        """Tiles (n, 3, side, side) of uint8, as they were before normalising, made on the host."""
        assert self._to_pixels is not None
        if self._pixels is None:
            assert self._rgb is not None
            pixels, self._rgb = self._to_pixels([self._rgb])[0], None
            # The overview comes first, and stands alone where little detail was asked for.
            self._pixels = pixels[None] if pixels.dim() == 3 else pixels[: self.num_tiles]
        return self._pixels

    def prepare(self) -> None:
        """Do what can be done on the host; what is wrong with an image shows here."""
        if self._to_pixels is not None:
            self.pixels()


class PromptBuilder:
    """Makes prompts for one model. `knows` tells whether an image's features are at hand. `on_device` leaves images that
    are not too large for the device to cut into tiles."""

    def __init__(
        self, processor: Processor, *, vocab_size: int, knows: Callable[[bytes], bool], on_device: bool = False
    ) -> None:
        self._vocab_size = vocab_size
        self._knows = knows
        self._on_device = on_device
        self._lock = threading.Lock()  # tokenizers change settings of theirs while they work
        self._processor = processor
        if processor.image_processor is not None:
            as_bytes = replace(processor.image_processor, do_rescale=False, do_normalize=False)
            self._processor = Processor(processor.tokenizer, as_bytes, processor.config, policy=processor.policy)

    def __call__(self, request: Request | ScoreRequest) -> Prompt:
        if request.images and self._processor.image_processor is None:
            raise InputError("this model has no vision tower, so it cannot look at images")
        ids = self._encode(request.prompt, len(request.images))
        rgb = [to_rgb(image) for image in request.images]
        details = request.details if isinstance(request, Request) else ()
        layouts = self._processor.plan([image.size for image in rgb], details)
        spread: list[int] = []
        images: list[PromptImage] = []
        for token in ids:
            if token == IMAGE_TOKEN_INDEX:
                index = len(images)
                on_device = self._on_device and math.prod(rgb[index].size) <= KEPT_PIXELS
                to_pixels = None if on_device else self._processor.pixels
                images.append(PromptImage(rgb[index], layouts[index], len(spread), to_pixels))
                spread.extend(range(-1, -1 - layouts[index].num_features, -1))
            else:
                spread.append(token)
        for image in images:
            if not self._knows(image.key) or math.prod(image.size) > KEPT_PIXELS:
                image.prepare()
        return Prompt(spread, tuple(images))

    def with_continuation(self, request: ScoreRequest) -> tuple[Prompt, list[int]]:
        """A prompt, and the ids that continue it."""
        prompt = self(request)
        if not isinstance(request.continuation, str):
            ids = self._checked([int(token) for token in request.continuation])
        else:
            ids = self._encode_continuation(request)
        if not ids:
            raise InputError("the continuation is empty; give at least one token to score")
        return prompt, ids

    def _encode_continuation(self, request: ScoreRequest) -> list[int]:
        text = request.prompt.get_prompt() if isinstance(request.prompt, Conversation) else request.prompt
        if isinstance(text, str):
            before = self._encode(text, len(request.images))
            together = self._encode(text + str(request.continuation), len(request.images))
            if together[: len(before)] == before:
                return together[len(before) :]
        with self._lock:
            return list(self._processor.tokenizer(request.continuation, add_special_tokens=False)["input_ids"])

    def _encode(self, prompt: Conversation | str | Sequence[int], num_images: int) -> list[int]:
        if isinstance(prompt, (Conversation, str)):
            with self._lock:
                ids = self._processor.encode_ids(prompt, num_images)
        else:
            ids = self._checked([int(token) for token in prompt], marks=True)
            check_placeholders(ids.count(IMAGE_TOKEN_INDEX), num_images)
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        return ids

    def _checked(self, ids: list[int], *, marks: bool = False) -> list[int]:
        wrong = [t for t in ids if not 0 <= t < self._vocab_size and not (marks and t == IMAGE_TOKEN_INDEX)]
        if wrong:
            raise InputError(
                f"token id {wrong[0]} is not one of this model's, which are 0 to {self._vocab_size - 1}"
                + (f", or {IMAGE_TOKEN_INDEX} for an image" if marks else "")
            )
        return ids
