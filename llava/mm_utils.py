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
    CropSplit,
    Pinpoints,
    crop_split,
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
    "extract_patches",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "load_image_from_base64",
    "process_anyres_image",
    "process_highres_image",
    "process_highres_image_crop_split",
    "process_images",
    "resize_and_center_crop",
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
        model_cfg: an object with the attributes `image_aspect_ratio`, for "anyres" and "highres" `image_grid_pinpoints`,
            for "crop_split" `image_crop_resolution` and `image_split_resolution`. An aspect ratio that is absent, None or
            "square" crops the centre; "pad" first pads to a square with the mean colour; the others cut tiles.

    Returns:
        Of shape (images, 3, side, side), or (images, tiles, 3, side, side) where images are cut; where the numbers of tiles
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
    elif mode == "highres":
        pinpoints = read_pinpoints(getattr(model_cfg, "image_grid_pinpoints", None), mode)
        pixels = [process_highres_image(image, image_processor, pinpoints) for image in images]
    elif mode == "crop_split":
        pixels = [process_highres_image_crop_split(image, model_cfg, image_processor) for image in images]
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


def process_highres_image(image: Image.Image, processor: ImageProcessor, grid_pinpoints: Pinpoints) -> torch.Tensor:
    """Cut an image, padded to a square and scaled to the largest of `grid_pinpoints`, into tiles (tiles, 3, side, side).

    The first is the overview, the whole image squeezed to a square. `grid_pinpoints` are sides, such as "336,672".
    """
    tile_size, side = processor.crop_size["height"], overview_side(processor)
    sizes = parse_pinpoints(read_pinpoints(grid_pinpoints, "highres"), tile_size)
    if not sizes:
        raise InputError("image_aspect_ratio 'highres' needs image_grid_pinpoints, and there are none.")
    largest = max(size.width for size in sizes)
    padded = expand2square(image, mean_colour(processor)).resize((largest, largest))
    return _tile_pixels([image.resize((side, side)), *extract_patches(padded, side)], processor)


def process_highres_image_crop_split(
    image: Image.Image, data_args: object, processor: ImageProcessor | None = None
) -> torch.Tensor:
    """Cut the middle of an image into tiles (tiles, 3, side, side), row by row, without an overview.

    Args:
        data_args: an object with `image_crop_resolution`, the side of the middle, and `image_split_resolution`, that of a
            tile before the processor resizes it; and with `image_processor`, where none is given.
    """
    sides = _crop_split(data_args)
    processor = processor or data_args.image_processor  # type: ignore[attr-defined]
    return _tile_pixels(extract_patches(resize_and_center_crop(image, sides.crop), sides.split), processor)


def _crop_split(settings: object) -> CropSplit:
    names = ("image_crop_resolution", "image_split_resolution")
    sides = crop_split(*(getattr(settings, name, None) for name in names))
    if sides is None:
        raise InputError(f"image_aspect_ratio 'crop_split' needs {names[0]} and {names[1]}, and there are none.")
    return sides


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


def extract_patches(image: Image.Image, patch_size: int, overlap_ratio: float = 0) -> list[Image.Image]:
    """Cut an image into as many squares of `patch_size` pixels as fit, row by row, from its middle.

    Neighbours share the part `overlap_ratio` of their sides.
    """
    step = int(patch_size * (1 - overlap_ratio))
    if not 0 <= overlap_ratio < 1 or step < 1:
        raise InputError(
            f"overlap_ratio is {overlap_ratio} for squares of {patch_size} pixels; give 0 or more, below 1."
        )
    starts = []
    for length in (image.width, image.height):
        count = (length - patch_size) // step + 1
        first = (length - (count - 1) * step - patch_size) // 2
        starts.append([first + index * step for index in range(count)])
    lefts, tops = starts
    return [image.crop((left, top, left + patch_size, top + patch_size)) for top in tops for left in lefts]


def resize_and_center_crop(image: Image.Image, shortest_edge_length: int) -> Image.Image:
    """Scale an image so that its shorter side has `shortest_edge_length` pixels, and cut a square out of its middle."""
    from PIL import Image

    side, shape = shortest_edge_length, image.width / image.height
    size = (side, int(side / shape)) if image.width < image.height else (int(side * shape), side)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))  # type: ignore[arg-type]


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Open the RGB image in a base64 text, within the default limits."""
    if not image:
        raise InputError("the base64 text of an image is empty.")
    return load_image(decode_base64(image, "the base64 text of an image"))
