"""Recorded numbers of LLaVA-NeXT itself: images in every tile layout, several images, and videos, checkpoint by checkpoint.

The checkpoints have the published configs and tensor names, tiny and random. What the original does wrong is in `OURS`, with
what happens here instead; docs/differences.md lists it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import HERE
from next_models import next_model
from torch import Tensor

from llava.errors import InputError
from llava.mm_utils import process_images

NEXT = HERE / "next"
SMALL = ("onevision-siglip28-qwen", "llama3-next-clip28", "llava-video-siglip28-qwen", "next-video-clip28-llama")
LARGE = "onevision-siglip384-qwen"

# Cases where the original errs: a sentence of ours, or None where ours computes something else, which other tests check.
OURS: dict[str, str | None] = {
    "wrong_image_size_falls_to_2x2": "has no pixels",
    "fewer_images_than_tokens": "2 <image> placeholders but 1 image",
    "more_images_than_tokens": "1 <image> placeholder but 2 images",
    "video4_faster": "needs the model's faster_token",
    "video4_bad_position": "mm_newline_position is 'nowhere'",
    "video4_bad_pool": "mm_spatial_pool_mode is 'mean'",
    "video4_modality_image": r"say modalities=\['video'\]",
    "mixed_batch_default_modalities": None,  # the original drops all rows but the first
    "video4_stride4_config": None,  # the original reduces by 2 whatever the config says
}


def record(name: str) -> dict[str, Any]:
    return json.loads((NEXT / "checkpoint_outputs" / f"{name}.json").read_text())


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(NEXT / "checkpoint_outputs" / f"{name}.npz") as data:
        return dict(data)


@functools.cache
def pixels(name: str) -> dict[str, Tensor]:
    with np.load(NEXT / "checkpoint_outputs" / f"{name}.pixels.npz") as data:
        return {key: torch.from_numpy(value) for key, value in data.items()}


@pytest.fixture
def overridden() -> Iterator[Any]:
    undo = pytest.MonkeyPatch()

    def apply(model: Any, overrides: dict[str, Any]) -> None:
        for key, value in overrides.items():
            undo.setattr(model.config, key, value, raising=False)

    yield apply
    undo.undo()


def cases(*names: str) -> list[Any]:
    return [pytest.param(name, case, id=f"{name}-{case}") for name in names for case in record(name)["cases"]]


def recorded_image(width: int, height: int, seed: int) -> np.ndarray:
    """The recording's images: a gradient with noise."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 255 * ((x + y) % 32) / 31], -1)
    return np.clip(base * 0.7 + random.randint(0, 77, (height, width, 3)), 0, 255).astype(np.uint8)


def close(ours: Tensor, theirs: Tensor | np.ndarray, atol: float, rtol: float = 0) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "case"), cases(*SMALL))
def test_case(name: str, case: str, overridden: Any) -> None:
    check_case(name, case, overridden, None)


@pytest.mark.parametrize(("name", "case"), cases(LARGE))
def test_case_of_real_geometry(name: str, case: str, overridden: Any) -> None:
    """384-pixel tiles of 27 x 27 features, up to 31 of them reduced to 7,290 features; pixels are made here."""
    loaded, recorded = next_model(name), record(name)
    from PIL import Image

    about = recorded["pictures"][case.removeprefix("image_")]
    image = Image.fromarray(recorded_image(*about["size"], about["picture_seed"]))
    images = process_images([image], loaded.image_processor, loaded.model.config)
    check_case(name, case, overridden, list(images))


def check_case(name: str, case: str, overridden: Any, images: list[Tensor] | None) -> None:
    about, model = record(name)["cases"][case], next_model(name).model
    given = {key.removeprefix(f"{case}/"): value for key, value in arrays(name).items() if key.startswith(f"{case}/")}
    overridden(model, about["config_overrides"])
    ids, mask, labels = (
        torch.from_numpy(given[key]) if key in given else None for key in ("input_ids", "attention_mask", "labels")
    )
    if images is None and about.get("images") is not None:
        images = [pixels(name)[key] for key in about["images"]]
    sizes, modalities = about["image_sizes"], about["modalities"]
    shown = {"images": images, "image_sizes": sizes, "modalities": modalities}
    if OURS.get(case):
        with pytest.raises(InputError, match=OURS[case]), torch.no_grad():
            model(ids, attention_mask=mask, **shown)
        return
    with torch.no_grad():
        if case in OURS:
            assert model(ids, attention_mask=mask, **shown).logits.shape[0] == len(ids)
            return
        positions = torch.arange(ids.numel()).view(ids.shape)
        *_, kept, _, embeds, source = model.prepare_inputs_labels_for_multimodal(
            ids, None, mask, None, positions, images, modalities, sizes
        )
        output = model(ids, attention_mask=mask, labels=labels, **shown)

    if embeds is None:
        assert about["prepare"].startswith("returns its input unchanged")
        embeds, kept = output.logits, None
    else:
        assert list(embeds.shape) == about["new_input_embeds"]["shape"]
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool) if kept is None else kept.bool()
        recorded_source = torch.from_numpy(given["source_index"])[valid]
        # Positions count within a row there.
        ours = source[valid]
        assert torch.equal(ours < 0, recorded_source < 0)
        if kept is None:
            assert torch.equal(ours, recorded_source.long())
        close(embeds.sum(-1)[valid], given["embeds_row_sum"].astype(np.float32)[valid.numpy()], 5e-5)
        close(embeds.square().sum(-1)[valid], given["embeds_row_sq"].astype(np.float32)[valid.numpy()], 1e-4, rtol=2e-6)
        for key, rows in given.items():
            if key.startswith("embeds_every_"):
                some = embeds[0] if embeds.shape[0] == 1 else embeds
                step = int(key.rsplit("_", 1)[1])
                if embeds.shape[0] == 1:
                    close(some[::step], rows.reshape(-1, rows.shape[-1]), 1e-5)
    valid = torch.ones(embeds.shape[:2], dtype=torch.bool) if kept is None else kept.bool()
    close(output.logits.logsumexp(-1)[valid], given["logits_logsumexp"][valid.numpy()], 2e-5)
    assert torch.equal(output.logits.argmax(-1)[valid], torch.from_numpy(given["argmax"])[valid].long())
    if kept is None:
        close(output.logits[:, -4:], given["logits_last4"], 2e-5)
    assert float(output.loss) == pytest.approx(about["loss"], abs=1e-5)
    if "generated" in about:
        tokens = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=12, min_new_tokens=12, **shown
        )
        assert tokens.tolist() == about["generated"]


@pytest.mark.parametrize("name", SMALL)
def test_tower_and_projector(name: str) -> None:
    """The trained tower inside of the checkpoint is used, without the last layer and the head that LLaVA-NeXT takes off."""
    about, model = record(name), next_model(name).model
    tiles = pixels(name)[about["tower_features"]["pixels"]][:2]
    with torch.no_grad():
        close(model.get_vision_tower()(tiles), arrays(name)["tower_features"], 1e-5)
        close(model.encode_images(tiles), arrays(name)["encode_images"], 1e-5)


def test_a_batch_without_modalities_equals_one_with_them() -> None:
    """The original drops the rows behind the first where `modalities` are left at their default."""
    name = "onevision-siglip28-qwen"
    model, about = next_model(name).model, record(name)["cases"]["mixed_batch_default_modalities"]
    data = arrays(name)
    ids, mask = (
        torch.from_numpy(data[f"mixed_batch_default_modalities/{key}"]) for key in ("input_ids", "attention_mask")
    )
    shown = {"images": [pixels(name)[key] for key in about["images"]], "image_sizes": about["image_sizes"]}
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, **shown).logits
        for modalities in (["image"], ["image", "text", "image", "image"]):
            assert torch.equal(model(ids, attention_mask=mask, modalities=modalities, **shown).logits, plain)
