"""Cut images into tiles on the GPU, with the same bits as Pillow on the host.

In: an image's bytes. Out: its tiles as bytes, before normalising. Pillow takes several milliseconds to scale a photograph,
as long as a GPU needs for half a prompt. Pillow computes with integers: weights in units of 2**-22, one pass along the
rows and one along the columns, each rounded to a byte. A matrix product in float64 adds such numbers without rounding,
so that an image has the same hash and the same cached features wherever it was scaled.

    H, W: an image's height and width; colour channels come first
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from llava.images.image_processor import ClipImageProcessor, mean_colour, overview_side, resized
from llava.images.layout import ImageLayout, ImagePolicy, fit_inside, select_best_resolution, tile_boxes

UNIT = 2**22  # Pillow's weights are multiples of 1 / UNIT
BAND = 2**22  # numbers in float64 that exist at once
LANCZOS, BILINEAR, BICUBIC, BOX = 1, 2, 3, 4  # Pillow's numbers


class GpuPreprocessor:
    """Makes on the GPU the tiles of `Processor.pixels`, as bytes before normalising."""

    def __init__(self, processor: ClipImageProcessor, policy: ImagePolicy, device: torch.device) -> None:
        self._processor, self._policy, self._device = processor, policy, device

    @staticmethod
    def supports(processor: ClipImageProcessor, policy: ImagePolicy) -> bool:
        """Whether the processor's filter and the policy's way to cut are implemented here."""
        return policy.mode in ("square", "pad", "anyres") and (not processor.do_resize or processor.resample in FILTERS)

    def __call__(self, rgb: Tensor, layout: ImageLayout) -> Tensor:
        """Cut an image (H, W, 3) of uint8 into the tiles (N, 3, side, side) of its layout."""
        image = rgb.permute(2, 0, 1)
        height, width = image.shape[1:]
        is_padded = self._policy.mode == "pad" or layout.is_padded
        if is_padded and height != width:
            side = max(height, width)
            corner = (side - width) // 2, (side - height) // 2
            image = _pasted(image, (side, side), corner, mean_colour(self._processor))
        if self._policy.mode != "anyres" or is_padded:
            return self._finished(image)[None]
        side = overview_side(self._processor)
        tiles = [scaled(image, (side, side), BICUBIC)]
        if layout.num_tiles > 1:
            canvas = select_best_resolution((width, height), self._policy.pinpoints)
            fitted, offset = fit_inside((width, height), canvas)
            whole = _pasted(scaled(image, fitted, BICUBIC), canvas, offset, (0, 0, 0))
            boxes = tile_boxes(canvas, self._processor.crop_size["height"])
            tiles += [whole[:, top:bottom, left:right] for left, top, right, bottom in boxes]
        return torch.stack([self._finished(tile) for tile in tiles])

    def _finished(self, tile: Tensor) -> Tensor:
        """Do to a tile what the image processor does before normalising."""
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
    """Scale an image (3, H, W) of uint8 to `size` (width, height) as Pillow does."""
    fewer_rows, fewer_columns = image.shape[1] - size[1], image.shape[2] - size[0]
    columns_first = fewer_rows > max(0, 2 * fewer_columns) and _columns_first()
    return _scaled(image, size, resample, rows_first=not columns_first)


def _scaled(image: Tensor, size: tuple[int, int], resample: int, *, rows_first: bool) -> Tensor:
    for across in (rows_first, not rows_first):
        dim, wanted = (2, size[0]) if across else (1, size[1])
        if wanted != image.shape[dim]:
            matrix = weights(image.shape[dim], wanted, resample, image.device)
            image = _one_way(image, matrix.t() if across else matrix, across=across)
    return image


@cache
def _columns_first() -> bool:
    """Whether Pillow scales columns before rows where an image loses many rows: Pillow 13 does, earlier versions do not."""
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (32, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(np.array(Image.fromarray(image).resize((6, 12), BICUBIC)))
    planes = torch.from_numpy(image).permute(2, 0, 1)
    return torch.equal(_scaled(planes, (6, 12), BICUBIC, rows_first=False).permute(1, 2, 0), expected)


def _one_way(image: Tensor, matrix: Tensor, *, across: bool) -> Tensor:
    """Sum with weights along the rows or the columns and round to bytes, a band of rows or columns at a time."""
    dim = 1 if across else 2
    bands = image.split(max(1, BAND // (image.numel() // image.shape[dim])), dim)
    sums = (band.double() @ matrix if across else matrix @ band.double() for band in bands)
    parts = [((total + UNIT // 2) / UNIT).floor_().clamp_(0, 255).to(torch.uint8) for total in sums]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@lru_cache(maxsize=64)
def weights(num_in: int, num_out: int, resample: int, device: torch.device) -> Tensor:
    """The weight of each input pixel in each output pixel (num_out, num_in): integers in float64, rows sum to about UNIT."""
    function, reach = FILTERS[resample]
    scale = num_in / num_out
    stretch = max(scale, 1.0)
    support = reach * stretch
    centers = (np.arange(num_out) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centers + support + 0.5).astype(np.int64), num_in)
    columns = first[:, None] + np.arange(math.ceil(support) * 2 + 1)
    taken = columns < stop[:, None]
    values = np.where(taken, function((columns - centers[:, None] + 0.5) * (1.0 / stretch)), 0.0)
    total = np.zeros(num_out)
    for column in values.T:  # in Pillow's order: another one would round differently
        total += column
    values = np.divide(values, total[:, None], where=total[:, None] != 0, out=values)
    whole = np.trunc(values * UNIT + np.where(values < 0, -0.5, 0.5))
    matrix = np.zeros((num_out, num_in))
    rows = np.broadcast_to(np.arange(num_out)[:, None], columns.shape)
    matrix[rows[taken], columns[taken]] = whole[taken]
    return torch.from_numpy(matrix).to(device)


def _pasted(image: Tensor, size: tuple[int, int], offset: tuple[int, int], colour: tuple[int, int, int]) -> Tensor:
    """Paste an image onto a canvas of `size` (width, height), its corner at `offset` (left, top)."""
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


# By Pillow's number: the filter and its support in pixels.
FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    LANCZOS: (_lanczos, 3.0),
    BILINEAR: (lambda x: np.maximum(1 - np.abs(x), 0.0), 1.0),
    BICUBIC: (_bicubic, 2.0),
    BOX: (lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0), 0.5),
}
