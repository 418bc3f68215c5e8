"""Pixels that obey a layout, and the small helpers that code outside this package imports from here.

In: Pillow images, an image processor and a model's config. Out: tensors for the vision tower, one tile or several per
image. Where tiles lie is decided in images/layout.py; resizing and normalising is the image processor's; opening files is
images/io.py's. Tokenizing, stopping and naming live in text/tokenization.py, text/stopping.py and conversation.py, and
are reached from here by their known names without being imported before they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llava.errors import InputError
from llava.images.io import DEFAULT_LIMITS, decode_base64, load_image, to_rgb
from llava.images.layout import (
    fit_inside,
    get_anyres_image_grid_shape,
    image_mode,
    parse_pinpoints,
    select_best_resolution,
    tile_boxes,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from llava.conversation import get_model_name_from_path
    from llava.text.stopping import KeywordsStoppingCriteria
    from llava.text.tokenization import tokenizer_image_token

__all__ = [
    "KeywordsStoppingCriteria",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "process_anyres_image",
    "process_images",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
]

# Names that live elsewhere and are imported when somebody asks for them.
ELSEWHERE = {
    "KeywordsStoppingCriteria": "llava.text.stopping",
    "get_model_name_from_path": "llava.conversation",
    "tokenizer_image_token": "llava.text.tokenization",
}


def __getattr__(name: str) -> Any:
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(ELSEWHERE[name]), name)


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Pixels for a model whose config says `image_aspect_ratio`: a tensor where shapes agree, else a list.

    Absent, None or "square" crops the centre: (images, 3, side, side). "pad" first pads to a square with the mean
    colour. "anyres" gives tiles: (images, tiles, 3, side, side), or a list of (tiles, 3, side, side) where the numbers
    of tiles differ. `model_cfg` needs no more attributes than that, and `image_grid_pinpoints` for "anyres".
    """
    mode = image_mode(getattr(model_cfg, "image_aspect_ratio", None))
    images = list(images)
    if not images:
        return []
    if mode == "square":
        return image_processor(images, return_tensors="pt")["pixel_values"]
    if mode == "anyres":
        pinpoints = parse_pinpoints(getattr(model_cfg, "image_grid_pinpoints", None))
        pixels = [process_anyres_image(image, image_processor, pinpoints) for image in images]
    else:
        colour = mean_colour(image_processor)
        pixels = [_tile_pixels([expand2square(image, colour)], image_processor)[0] for image in images]
    if len({tensor.shape for tensor in pixels}) != 1:
        return pixels
    import torch

    return torch.stack(pixels, dim=0)


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: str | Iterable[Sequence[int]]
) -> torch.Tensor:
    """One overview tile, the whole image squeezed to a square, then the tiles of the best canvas, row by row.

    `plan(image.size, policy).num_tiles` of them: (tiles, 3, side, side).
    """
    canvas = select_best_resolution(image.size, parse_pinpoints(grid_pinpoints))
    tiles = divide_to_patches(resize_and_pad_image(image, canvas), processor.crop_size["height"])
    side = overview_side(processor)
    return _tile_pixels([image.resize((side, side)), *tiles], processor)


def _tile_pixels(tiles: list[Image.Image], processor: Any) -> torch.Tensor:
    """All at once rather than one by one: the pixels are the same."""
    return processor.preprocess([to_rgb(tile) for tile in tiles], return_tensors="pt")["pixel_values"]


def overview_side(processor: Any) -> int:
    """Pixels per side of the square that a whole image is squeezed to before its tiles."""
    side: int = processor.size["shortest_edge" if "shortest_edge" in processor.size else "height"]
    return side


def mean_colour(processor: Any) -> tuple[int, int, int]:
    """What an image is padded with: the colour that normalising makes zero."""
    red, green, blue = (int(value * 255) for value in processor.image_mean)
    return red, green, blue


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """The image centred on a square of its longer side; a square image is returned as it is.

    Where the background does not fit the image's mode (a colour on a grey or CMYK image), the result is RGB; the
    original LLaVA failed there.
    """
    from PIL import Image

    width, height = pil_img.size
    if width == height:
        return pil_img
    if isinstance(background_color, tuple) and pil_img.mode not in ("RGB", "RGBA"):
        pil_img = to_rgb(pil_img)
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def resize_and_pad_image(image: Image.Image, target_resolution: Sequence[int]) -> Image.Image:
    """The image scaled, shape kept, to fit (width, height), centred on black; always RGB."""
    from PIL import Image

    fitted, offset = fit_inside(image.size, target_resolution)
    canvas = Image.new("RGB", (target_resolution[0], target_resolution[1]), (0, 0, 0))
    # Scaled in its own mode and converted then: transparent edges come out as recorded in that order.
    canvas.paste(to_rgb(image.resize(fitted)), offset)
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Square tiles of `patch_size` pixels, row by row."""
    return [image.crop(box) for box in tile_boxes(image.size, patch_size)]


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """The RGB image in a base64 text, under the limits of every image from outside."""
    if not image:
        raise InputError("the base64 text of an image is empty.")
    return load_image(decode_base64(image, "the base64 text of an image"), limits=DEFAULT_LIMITS)
