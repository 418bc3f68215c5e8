"""Cut images into tiles, and export the helpers that code outside this package imports from here.

In: Pillow images, an image processor and a model's config. Out: tensors for the vision tower, one tile or several per
image. The positions of tiles are decided in images/layout.py; images/image_processor.py resizes and normalises;
images/io.py opens files. Helpers for tokens, stop strings and model names are imported from their modules at first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.images.decode import to_rgb
from llava.images.image_processor import ImageProcessor, mean_colour, overview_side
from llava.images.io import decode_base64, load_image
from llava.images.layout import (
    Pinpoints,
    fit_inside,
    get_anyres_image_grid_shape,
    image_mode,
    parse_pinpoints,
    read_pinpoints,
    select_best_resolution,
    tile_boxes,
)
from llava.utils import lazy_exports

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

# Exported from other modules, which are imported at first use.
EXPORTS = {
    "llava.text.stopping": ("KeywordsStoppingCriteria",),
    "llava.conversation": ("get_model_name_from_path",),
    "llava.text.tokenization": ("tokenizer_image_token",),
}

__getattr__, __dir__ = lazy_exports(__name__, EXPORTS)


def process_images(
    images: Sequence[Image.Image], image_processor: ImageProcessor, model_cfg: object
) -> torch.Tensor | list[torch.Tensor]:
    """Make the pixels of images for a model.

    Args:
        model_cfg: an object with the attributes `image_aspect_ratio` and, for "anyres", `image_grid_pinpoints`. An
            aspect ratio that is absent, None or "square" crops the centre; "pad" first pads to a square with the mean
            colour; "anyres" cuts tiles.

    Returns:
        Of shape (images, 3, side, side), or (images, tiles, 3, side, side) for "anyres"; where the numbers of tiles
        differ, a list of (tiles, 3, side, side).
    """
    mode = image_mode(getattr(model_cfg, "image_aspect_ratio", None))
    images = list(images)
    if not images:
        return []
    if mode == "square":
        return image_processor(images, return_tensors="pt")["pixel_values"]
    if mode == "anyres":
        pinpoints = read_pinpoints(getattr(model_cfg, "image_grid_pinpoints", None))
        pixels = [process_anyres_image(image, image_processor, pinpoints) for image in images]
    else:
        colour = mean_colour(image_processor)
        pixels = [_tile_pixels([expand2square(image, colour)], image_processor)[0] for image in images]
    if len({tensor.shape for tensor in pixels}) != 1:
        return pixels
    import torch

    return torch.stack(pixels, dim=0)


def process_anyres_image(image: Image.Image, processor: ImageProcessor, grid_pinpoints: Pinpoints) -> torch.Tensor:
    """Cut an image into tiles (tiles, 3, side, side), as many as `plan(image.size, policy).num_tiles`.

    The first is the overview, the whole image squeezed to a square; the tiles of the best canvas follow, row by row.
    """
    tile_size = processor.crop_size["height"]
    canvas = select_best_resolution(image.size, parse_pinpoints(grid_pinpoints, tile_size))
    tiles = divide_to_patches(resize_and_pad_image(image, canvas), tile_size)
    side = overview_side(processor)
    return _tile_pixels([image.resize((side, side)), *tiles], processor)


def _tile_pixels(tiles: list[Image.Image], processor: ImageProcessor) -> torch.Tensor:
    return processor.preprocess([to_rgb(tile) for tile in tiles], return_tensors="pt")["pixel_values"]


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """Centre an image on a square of its longer side; a square image is returned as it is.

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
    """Scale an image, shape kept, to fit (width, height), and centre it on black; the result is RGB."""
    from PIL import Image

    fitted, offset = fit_inside(image.size, target_resolution)
    canvas = Image.new("RGB", (target_resolution[0], target_resolution[1]), (0, 0, 0))
    # Scaled in its own mode, then converted: the other order changes the pixels of transparent edges.
    canvas.paste(to_rgb(image.resize(fitted)), offset)
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut an image into square tiles of `patch_size` pixels, row by row."""
    return [image.crop(box) for box in tile_boxes(image.size, patch_size)]


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Open the RGB image in a base64 text, within the default limits."""
    if not image:
        raise InputError("the base64 text of an image is empty.")
    return load_image(decode_base64(image, "the base64 text of an image"))
