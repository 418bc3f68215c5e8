"""mm_utils.py against recorded pixels, and against the layout's plan; and that its names from other modules arrive."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from argparse import Namespace
from functools import cache

import numpy as np
import pytest
import torch
from golden_data import golden
from image_kit import png_of
from PIL import Image

from llava import mm_utils
from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.images.layout import ImagePolicy, parse_pinpoints, plan

EXPECTED = json.loads(golden("images/expected.json").read_text())
PIXELS = np.load(golden("images/expected_pixels.npz"))
UINT8 = np.load(golden("images/intermediate_uint8.npz"))
SINGLE = [row for row in EXPECTED["results"] if "image" in row]
SEVERAL = [row for row in EXPECTED["results"] if "images" in row]
MEAN_COLOUR = (122, 116, 104)


@cache
def open_image(name: str, rgb: bool = True) -> Image.Image:
    image = Image.open(golden(f"images/{name}.png"))
    image.load()
    return image.convert("RGB") if rgb else image


def config(row: dict) -> Namespace:
    if row["image_aspect_ratio"] == "absent":
        return Namespace()
    pinpoints = row.get("pinpoints") or EXPECTED["pinpoints"][str(row["crop_size"])]
    return Namespace(image_aspect_ratio=row["image_aspect_ratio"], image_grid_pinpoints=pinpoints)


@pytest.mark.parametrize(
    "row", SINGLE, ids=lambda row: row.get("npz_key") or f"{row['image']}-{row['image_aspect_ratio']}"
)
def test_recorded_pixels(row: dict) -> None:
    processor = ClipImageProcessor().with_side(row["crop_size"])
    image = open_image(row["image"], row["converted_to_rgb_first"])
    pixels = mm_utils.process_images([image], processor, config(row))
    if "error" in row:
        # The original fails on greys that it pads with a colour, and takes thin images for grey ones.
        as_rgb = mm_utils.process_images([open_image(row["image"])], processor, config(row))
        side = row["crop_size"]
        assert pixels.shape == (1, 3, side, side)
        assert torch.equal(pixels, as_rgb)
        return
    assert isinstance(pixels, list) == row["is_list"]
    assert list(pixels.shape) == row["shape"]
    assert str(pixels.dtype) == row["dtype"]
    # The one-by-one sum of hundreds of thousands of floats, in double precision.
    assert pixels.double().sum().item() == pytest.approx(row["sum"], abs=1e-3, rel=1e-7)
    if row.get("npz_key") in PIXELS:
        assert np.array_equal(pixels.numpy(), PIXELS[row["npz_key"]])


@pytest.mark.parametrize("row", SEVERAL, ids=lambda row: str(row["image_aspect_ratio"]))
def test_recorded_batches(row: dict) -> None:
    processor = ClipImageProcessor().with_side(row["crop_size"])
    images = [open_image(name) for name in row["images"]]
    pixels = mm_utils.process_images(images, processor, config(row))
    assert isinstance(pixels, list) == row["is_list"]
    assert [list(item.shape) for item in pixels] == row["shapes"]
    alone = [mm_utils.process_images([image], processor, config(row))[0] for image in images]
    assert all(torch.equal(one, other) for one, other in zip(pixels, alone, strict=True))


@pytest.mark.parametrize("key", list(UINT8))
def test_recorded_steps(key: str) -> None:
    name, step, *target = key.split("|")
    image = open_image(name)
    if step == "expand2square":
        result = mm_utils.expand2square(image, MEAN_COLOUR)
    elif step == "resize_and_pad":
        result = mm_utils.resize_and_pad_image(image, tuple(int(side) for side in target[0].split("x")))
    else:
        side = int(step.removeprefix("anyres_base_"))
        processor = ClipImageProcessor().with_side(side)
        plain = {"do_rescale": False, "do_normalize": False}
        tiles = mm_utils.process_anyres_image(image, _Raw(processor, plain), [(side, 2 * side), (2 * side, side)])
        result = tiles[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(result), UINT8[key])


class _Raw:
    """An image processor that leaves values as they are, to see the steps before."""

    def __init__(self, processor: ClipImageProcessor, overrides: dict) -> None:
        self.size, self.crop_size = processor.size, processor.crop_size
        self._processor, self._overrides = processor, overrides

    def preprocess(self, images: list, return_tensors: str) -> dict:
        return self._processor.preprocess(images, return_tensors, **self._overrides)


@pytest.mark.parametrize("size", [(1, 1), (5, 400), (400, 5), (64, 48), (100, 200), (57, 56)])
def test_tiles_are_those_of_the_plan(size: tuple[int, int]) -> None:
    pinpoints = EXPECTED["pinpoints"]["56"]
    policy = ImagePolicy("anyres", 56, 14, parse_pinpoints(pinpoints, 56), "spatial_unpad")
    image = Image.effect_noise(size, 80).convert("RGB")
    for flavour in ("CLIPImageProcessor", "SiglipImageProcessor"):
        processor = ClipImageProcessor.from_dict({"image_processor_type": flavour, "size": 56, "crop_size": 56})
        tiles = mm_utils.process_anyres_image(image, processor, str(pinpoints))
        assert tiles.shape == (plan(size, policy).num_tiles, 3, 56, 56)


def test_tiles_put_together_are_the_canvas() -> None:
    canvas = mm_utils.resize_and_pad_image(open_image("waves_640x480"), (112, 168))
    tiles = mm_utils.divide_to_patches(canvas, 56)
    rows = [np.concatenate([np.asarray(tile) for tile in tiles[row : row + 2]], axis=1) for row in (0, 2, 4)]
    assert np.array_equal(np.concatenate(rows), np.asarray(canvas))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_squares_in_every_mode(mode: str) -> None:
    image = Image.new(mode, (10, 4))
    square = mm_utils.expand2square(image, MEAN_COLOUR)
    assert square.size == (10, 10)
    assert square.getpixel((5, 0))[:3] == MEAN_COLOUR
    assert square.getpixel((5, 4)) != square.getpixel((5, 9)) == square.getpixel((5, 7))
    grey = mm_utils.expand2square(Image.new("L", (4, 10)), 7)
    assert (grey.mode, grey.getpixel((0, 0)), grey.getpixel((4, 5))) == ("L", 7, 0)
    assert mm_utils.expand2square(open_image("square_56x56"), MEAN_COLOUR) is open_image("square_56x56")


def test_config_with_one_attribute_and_other_processors() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    ours = ClipImageProcessor().with_side(28)
    images = [open_image("text_200x80"), open_image("grad_64x48")]
    for aspect_ratio in (None, "square", "pad"):
        settings = Namespace(image_aspect_ratio=aspect_ratio)
        pixels = mm_utils.process_images(images, ours, settings)
        assert isinstance(pixels, torch.Tensor)
        assert torch.equal(pixels, mm_utils.process_images(images, theirs, settings))


def test_what_cannot_work() -> None:
    processor = ClipImageProcessor()
    assert mm_utils.process_images([], processor, Namespace(image_aspect_ratio="pad")) == []
    with pytest.raises(InputError, match="'highres'"):
        mm_utils.process_images([open_image("dot_1x1")], processor, Namespace(image_aspect_ratio="highres"))
    with pytest.raises(InputError, match="image_grid_pinpoints"):
        mm_utils.process_images([open_image("dot_1x1")], processor, Namespace(image_aspect_ratio="anyres"))


def test_base64() -> None:
    data = golden("images/rgba_101x33.png").read_bytes()
    image = mm_utils.load_image_from_base64(base64.b64encode(data).decode())
    assert image.tobytes() == open_image("rgba_101x33").tobytes()
    assert mm_utils.load_image_from_base64(base64.encodebytes(data)).size == (101, 33)
    for bad in ("", "!!!", base64.b64encode(b"no image").decode(), base64.b64encode(data[:300]).decode()):
        with pytest.raises(InputError):
            mm_utils.load_image_from_base64(bad)
    with pytest.raises(InputError, match="12000x12000"):
        mm_utils.load_image_from_base64(base64.b64encode(png_of(12000, 12000)))


def test_borrowed_names() -> None:
    from llava.constants import IMAGE_TOKEN_INDEX

    for home, names in mm_utils.EXPORTS.items():
        for name in names:
            assert getattr(mm_utils, name).__module__ == home
            assert name in mm_utils.__all__
    assert mm_utils.get_model_name_from_path("a/llava-v1.5-7b/") == "llava-v1.5-7b"
    assert IMAGE_TOKEN_INDEX == -200
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mm_utils.nothing  # noqa: B018


def test_light_import() -> None:
    heavy = "('torch', 'PIL', 'numpy', 'transformers', 'http.client', 'ssl')"
    code = f"import sys, llava.mm_utils; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
