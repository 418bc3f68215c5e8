"""Our image processor against transformers' own, over Pillow; and its config files in every spelling, there and back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor

SIZES = [(1, 1), (53, 1), (1, 99), (3, 200), (224, 224), (225, 224), (640, 480), (333, 999), (17, 23), (336, 500)]
THEIRS = {"CLIPImageProcessor": CLIPImageProcessorPil, "SiglipImageProcessor": SiglipImageProcessorPil}


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(size[0] * 1000 + size[1])
    rgba = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8))
    return rgba.convert("RGB").convert(mode) if mode not in ("LA", "RGBA") else rgba.convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [28, 224, 337])
def test_same_pixels_as_transformers_clip(size: tuple[int, int], side: int) -> None:
    theirs = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    expected = theirs.preprocess(noise(size), return_tensors="pt")["pixel_values"]
    assert torch.equal(
        ClipImageProcessor().with_side(side).preprocess(noise(size), return_tensors="pt").pixel_values, expected
    )


@pytest.mark.parametrize("size", SIZES)
def test_same_pixels_as_transformers_siglip(size: tuple[int, int]) -> None:
    ours = ClipImageProcessor.from_dict({"image_processor_type": "SiglipImageProcessor", "size": 384})
    theirs = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    expected = theirs.preprocess(noise(size), return_tensors="pt")["pixel_values"]
    assert torch.equal(ours.preprocess(noise(size), return_tensors="pt")["pixel_values"], expected)
    assert ours.crop_size == {"height": 384, "width": 384}  # outside code reads it here


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_same_pixels_in_other_modes(mode: str) -> None:
    image = noise((90, 70), mode)
    expected = CLIPImageProcessorPil().preprocess(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(ClipImageProcessor().preprocess(image, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_dropped(mode: str) -> None:
    """As Pillow and old transformers do, and the recordings show; transformers 5 puts white behind."""
    image = noise((90, 70), mode)
    expected = CLIPImageProcessorPil().preprocess(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(ClipImageProcessor().preprocess(image, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_center_crop": False, "size": {"height": 30, "width": 50}},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False},
        {"do_resize": False, "crop_size": {"height": 300, "width": 20}},  # cut one way, padded the other
        {"do_resize": False, "crop_size": {"height": 101, "width": 99}},
        {"resample": 2},
        {"rescale_factor": 1 / 127},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.5, 0.25, 3.0]},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 57, "width": 57}},
    ],
    ids=str,
)
def test_options_as_transformers_has_them(options: dict) -> None:
    image = noise((120, 64))
    expected = CLIPImageProcessorPil(**options).preprocess(image, return_tensors="np")["pixel_values"]
    by_call = ClipImageProcessor().preprocess(image, return_tensors="np", **options)["pixel_values"]
    by_config = ClipImageProcessor.from_dict(options)(image, return_tensors="np")["pixel_values"]
    for ours in (by_call, by_config):
        assert ours.dtype == expected.dtype
        assert np.array_equal(ours, expected)


def test_arrays_tensors_lists_and_films() -> None:
    processor = ClipImageProcessor().with_side(28)
    image = noise((64, 48))
    array = np.asarray(image)
    expected = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 28, 28)
    assert expected.dtype == torch.float32
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()), [image], array[None]):
        assert torch.equal(processor.preprocess(same, return_tensors="pt")["pixel_values"], expected)
    film = processor(np.stack([array] * 4), return_tensors="np").pixel_values
    assert film.shape == (4, 3, 28, 28)
    plain = processor.preprocess([image, image])["pixel_values"]
    assert isinstance(plain, list)
    assert np.array_equal(plain[1], expected[0].numpy())
    batch = processor.preprocess(image, return_tensors="pt").to(torch.float16)
    assert batch.pixel_values.dtype == torch.float16


OLD = {
    "crop_size": 56,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 56,
}
NEW = {
    **{key: value for key, value in OLD.items() if key != "feature_extractor_type"},
    "image_processor_type": "CLIPImageProcessorFast",
    "crop_size": {"height": 56, "width": 56},
    "size": {"shortest_edge": 56},
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
}


def test_old_and_new_files_mean_the_same() -> None:
    assert ClipImageProcessor.from_dict(OLD) == ClipImageProcessor.from_dict(NEW) == ClipImageProcessor().with_side(56)
    pair = ClipImageProcessor.from_dict({"image_processor_type": "SiglipImageProcessor", "size": [30, 40]})
    assert pair.size == {"height": 30, "width": 40}
    assert ClipImageProcessor.from_dict({"size": 112}).size == {"shortest_edge": 112}


@pytest.mark.parametrize("kind", list(THEIRS))
def test_files_there_and_back(kind: str, tmp_path: Path) -> None:
    ours = ClipImageProcessor.from_dict(
        {"image_processor_type": kind, "size": 40, "crop_size": 40, "unheard_of": {"a": 1}}
    )
    [written] = ours.save_pretrained(tmp_path / "ours")
    assert Path(written).name == "preprocessor_config.json"
    assert ClipImageProcessor.from_pretrained(tmp_path / "ours") == ours
    assert ours.extra == {"unheard_of": {"a": 1}}
    image = noise((70, 50))
    theirs = THEIRS[kind].from_pretrained(tmp_path / "ours")
    expected = theirs.preprocess(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(ours.preprocess(image, return_tensors="np").pixel_values, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = ClipImageProcessor.from_pretrained(tmp_path / "theirs")
    assert replace(again, extra={}) == replace(ours, extra={})


def test_other_places_of_the_config(tmp_path: Path) -> None:
    nested, usual, siglip, empty = (tmp_path / name for name in ("nested", "usual", "siglip", "empty"))
    for folder in (nested, usual, siglip, empty):
        folder.mkdir()
    (nested / "processor_config.json").write_text(json.dumps({"image_processor": NEW, "patch_size": 14}))
    assert ClipImageProcessor.from_pretrained(nested) == ClipImageProcessor.from_dict(NEW)
    (usual / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"image_size": 56}}))
    assert ClipImageProcessor.from_pretrained(usual) == ClipImageProcessor.from_dict(NEW)
    (siglip / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", "image_size": 384}))
    processor = ClipImageProcessor.from_pretrained(str(siglip))
    assert (processor.size, processor.do_center_crop) == ({"height": 384, "width": 384}, False)
    assert processor.image_mean == (0.5, 0.5, 0.5)
    (usual / "config.json").write_text(json.dumps({"model_type": "beit", "image_size": 56}))
    with pytest.raises(InputError, match="beit"):
        ClipImageProcessor.from_pretrained(usual)
    with pytest.raises(InputError, match="neither"):
        ClipImageProcessor.from_pretrained(empty)
    (empty / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="JSON"):
        ClipImageProcessor.from_pretrained(empty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_processor_type": "DonutImageProcessor"}, "DonutImageProcessor"),
        ({"size": {"longest_edge": 3}}, "longest_edge"),
        ({"size": "336"}, "'336'"),
        ({"size": 0}, "size"),
        ({"crop_size": {"height": 3}}, "crop_size"),
        ({"image_std": [1.0, 0.0, 1.0]}, "zero"),
        ({"image_mean": [0.5]}, "three numbers"),
        ({"resample": 9}, "filters"),
    ],
    ids=str,
)
def test_configs_that_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClipImageProcessor.from_dict(options)


def test_inputs_that_cannot_work() -> None:
    processor = ClipImageProcessor()
    image = noise((8, 8))
    for bad, message in (
        ("photo.jpg", "load_image"),
        (np.zeros((4, 4, 3), dtype=np.float32), "float32"),
        (np.zeros((4, 4, 7), dtype=np.uint8), r"\(4, 4, 7\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\(0, 4, 3\)"),
    ):
        with pytest.raises(InputError, match=message):
            processor.preprocess(bad)
    with pytest.raises(InputError, match="'tf'"):
        processor.preprocess(image, return_tensors="tf")
    with pytest.raises(InputError, match="'croop'"):
        processor.preprocess(image, croop=True)
    with pytest.raises(InputError, match="do not stack"):
        processor.preprocess([image, noise((8, 9))], return_tensors="pt", do_center_crop=False)
    with pytest.raises(InputError, match="do not stack"):
        processor.preprocess([], return_tensors="pt")
    with pytest.raises(InputError, match="do_convert_rgb"):
        processor.preprocess(image.convert("L"), do_convert_rgb=False)


def test_light_import() -> None:
    heavy = "('torch', 'transformers', 'PIL')"
    code = f"import sys, {ClipImageProcessor.__module__}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
