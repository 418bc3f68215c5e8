"""The tiles of an image, made on the GPU: scaled, padded and cut there, to the same bits as Pillow does it on the host.

In: an image's bytes. Out: its tiles as bytes, before normalising. Scaling a photograph takes Pillow several milliseconds,
during which a GPU could have read half a prompt. Pillow's arithmetic is whole numbers: weights in units of 2**-22, one
pass along the rows and one along the columns, each rounded to a byte. A product of matrices in float64 adds such numbers
without any rounding of its own, so what is looked up, hashed and cached is one image wherever it was scaled.

    H, W an image's height and width; colours come first, as the vision tower wants them
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from llava.images.image_processor import ClipImageProcessor, resized
from llava.images.layout import ImagePolicy, fit_inside, select_best_resolution, tile_boxes
from llava.mm_utils import mean_colour, overview_side

UNIT = 2**22  # Pillow's weights are multiples of 1 / UNIT
BAND = 2**22  # numbers in float64 that exist at once
LANCZOS, BILINEAR, BICUBIC, BOX = 1, 2, 3, 4  # Pillow's numbers


class DeviceTiler:
    """Makes what `Processor.pixels` makes with an image processor that leaves pixels as bytes."""

    def __init__(self, processor: ClipImageProcessor, policy: ImagePolicy, device: torch.device) -> None:
        self._processor, self._policy, self._device = processor, policy, device

    @staticmethod
    def can(processor: ClipImageProcessor) -> bool:
        """Whether it knows the processor's filter."""
        return not processor.do_resize or processor.resample in FILTERS

    def __call__(self, rgb: Tensor, num_tiles: int) -> Tensor:
        """Tiles (num_tiles, 3, side, side) of an image (H, W, 3), uint8; of several, the overview comes first."""
        image = rgb.permute(2, 0, 1)
        height, width = image.shape[1:]
        if self._policy.mode == "pad" and height != width:
            side = max(height, width)
            corner = (side - width) // 2, (side - height) // 2
            image = _pasted(image, (side, side), corner, mean_colour(self._processor))
        if self._policy.mode != "anyres":
            return self._finished(image)[None]
        side = overview_side(self._processor)
        tiles = [scaled(image, (side, side), BICUBIC)]
        if num_tiles > 1:
            canvas = select_best_resolution((width, height), self._policy.pinpoints)
            fitted, offset = fit_inside((width, height), canvas)
            whole = _pasted(scaled(image, fitted, BICUBIC), canvas, offset, (0, 0, 0))
            boxes = tile_boxes(canvas, self._processor.crop_size["height"])
            tiles += [whole[:, top:bottom, left:right] for left, top, right, bottom in boxes]
        return torch.stack([self._finished(tile) for tile in tiles])

    def _finished(self, tile: Tensor) -> Tensor:
        """What the image processor does to a tile, but for normalising it."""
        processor = self._processor
        if processor.do_resize:
            size = tile.shape[2], tile.shape[1]
            tile = scaled(tile, resized(size, processor.size), processor.resample)
        if processor.do_center_crop:
            width, height = processor.crop_size["width"], processor.crop_size["height"]
            left, top = (tile.shape[2] - width) // 2, (tile.shape[1] - height) // 2
            if left < 0 or top < 0:  # outside the image: black
                canvas = max(width, tile.shape[2]), max(height, tile.shape[1])
                tile = _pasted(tile, canvas, (max(-left, 0), max(-top, 0)), (0, 0, 0))
                left, top = max(left, 0), max(top, 0)
            tile = tile[:, top : top + height, left : left + width]
        return tile


def scaled(image: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """An image (3, H, W) of uint8 as Pillow scales it to `size` (width, height)."""
    fewer_rows, fewer_columns = image.shape[1] - size[1], image.shape[2] - size[0]
    columns_first = fewer_rows > max(0, 2 * fewer_columns) and _begins_with_columns()
    return _scaled(image, size, resample, rows_first=not columns_first)


def _scaled(image: Tensor, size: tuple[int, int], resample: int, *, rows_first: bool) -> Tensor:
    for across in (rows_first, not rows_first):
        dim, wanted = (2, size[0]) if across else (1, size[1])
        if wanted != image.shape[dim]:
            matrix = weights(image.shape[dim], wanted, resample, image.device)
            image = _one_way(image, matrix.t() if across else matrix, across=across)
    return image


@cache
def _begins_with_columns() -> bool:
    """Pillow 13 begins with the columns of an image that becomes much lower, older ones always with the rows."""
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (32, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(np.array(Image.fromarray(image).resize((6, 12), BICUBIC)))
    planes = torch.from_numpy(image).permute(2, 0, 1)
    return torch.equal(_scaled(planes, (6, 12), BICUBIC, rows_first=False).permute(1, 2, 0), expected)


def _one_way(image: Tensor, matrix: Tensor, *, across: bool) -> Tensor:
    """Weighted sums along the rows or the columns, rounded to bytes; a band of rows, or of columns, at a time."""
    dim = 1 if across else 2
    bands = image.split(max(1, BAND // (image.numel() // image.shape[dim])), dim)
    sums = (band.double() @ matrix if across else matrix @ band.double() for band in bands)
    parts = [((total + UNIT // 2) / UNIT).floor_().clamp_(0, 255).to(torch.uint8) for total in sums]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@lru_cache(maxsize=64)
def weights(num_in: int, num_out: int, resample: int, device: torch.device) -> Tensor:
    """What each pixel out (rows) takes of each pixel in: whole numbers in float64, a row adds up to about UNIT."""
    function, reach = FILTERS[resample]
    scale = num_in / num_out
    stretch = max(scale, 1.0)
    support = reach * stretch
    centers = (np.arange(num_out) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centers + support + 0.5).astype(np.int64), num_in)
    places = first[:, None] + np.arange(math.ceil(support) * 2 + 1)
    taken = places < stop[:, None]
    values = np.where(taken, function((places - centers[:, None] + 0.5) * (1.0 / stretch)), 0.0)
    total = np.zeros(num_out)
    for column in values.T:  # one after the other, as Pillow adds them: another order would round differently
        total += column
    values = np.divide(values, total[:, None], where=total[:, None] != 0, out=values)
    whole = np.trunc(values * UNIT + np.where(values < 0, -0.5, 0.5))
    matrix = np.zeros((num_out, num_in))
    rows = np.broadcast_to(np.arange(num_out)[:, None], places.shape)
    matrix[rows[taken], places[taken]] = whole[taken]
    return torch.from_numpy(matrix).to(device)


def _pasted(image: Tensor, size: tuple[int, int], offset: tuple[int, int], colour: tuple[int, int, int]) -> Tensor:
    """The image on a canvas of `size` (width, height), its corner at `offset` (left, top)."""
    (width, height), (left, top) = size, offset
    if (width, height) == (image.shape[2], image.shape[1]):
        return image
    canvas = torch.empty(3, height, width, dtype=image.dtype, device=image.device)
    for plane, value in zip(canvas, colour, strict=True):
        plane.fill_(value)
    canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return canvas


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((1.5 * x - 2.5) * x) * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = np.where(x == 0, 1.0, x * math.pi)
    return np.where(x == 0, 1.0, np.sin(angle) / angle)


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0.0)


def _box(x: np.ndarray) -> np.ndarray:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


# By Pillow's number: the filter, and how far it reaches.
FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    LANCZOS: (_lanczos, 3.0),
    BILINEAR: (_bilinear, 1.0),
    BICUBIC: (_bicubic, 2.0),
    BOX: (_box, 0.5),
}
