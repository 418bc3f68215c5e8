"""Attention weights of tower and language model, and gradients of pixels, as research code asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import CLIPVisionModel

from llava.errors import InputError
from llava.model import transformers_internals
from llava.model.attention import VARLEN, register_varlen, varlen_kernel
from llava.model.builder import load

IDS = torch.tensor([[1, 40, -200, 70, 80]])
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tiny.build(tmp_path_factory.mktemp("tiny") / "llava-tiny"), device="cpu").model


def test_the_tower_gives_its_weights(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    transformers_internals._say_once.cache_clear()
    tower, batch = model.get_vision_tower(), PIXELS.repeat(2, 1, 1, 1)
    features, attentions = tower(batch, output_attentions=True)
    assert torch.allclose(features, tower(batch), atol=1e-5)
    # An independent model: transformers' own, with the same weights, built with eager attention.
    inner = tower.vision_tower.vision_model
    config = type(inner.config)(**inner.config.to_dict(), attn_implementation="eager")
    other = CLIPVisionModel(config).eval()
    other.load_state_dict(inner.state_dict())
    expected = other(batch, output_attentions=True).attentions
    assert len(attentions) == len(expected) == tiny.TOWER["num_hidden_layers"]
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(attentions, expected, strict=True))
    assert len(tower.vision_tower(batch, output_attentions=True).attentions) == len(expected)
    assert not tower.vision_tower(batch).attentions
    assert inner.config._attn_implementation == "sdpa"
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # said once
    with pytest.raises(InputError, match="one batch"):
        tower([PIXELS[0]], output_attentions=True)


@pytest.mark.parametrize("language_model", ["llama", "mistral", "qwen2"])
def test_the_language_model_gives_its_weights(language_model: str, tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model", language_model)
    model, eager = (load(folder, device="cpu", attn_implementation=name).model for name in ("sdpa", "eager"))
    expected = eager(IDS, images=PIXELS, output_attentions=True).attentions
    found = model(IDS, images=PIXELS, output_attentions=True).attentions
    length = expected[0].shape[-1]
    assert len(found) == 2
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(found, expected, strict=True))
    answer = model.generate(
        IDS, images=PIXELS, do_sample=False, max_new_tokens=3, min_new_tokens=3, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [step[0].shape[-2:] for step in answer.attentions] == [(length, length), (1, length + 1), (1, length + 2)]
    assert torch.allclose(answer.attentions[0][1], expected[1], atol=1e-5)
    plain = model.generate(IDS, images=PIXELS, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(answer.sequences, plain)
    assert model.config._attn_implementation == "sdpa"


def test_samples_of_a_packed_row_do_not_read_each_other(model: Any) -> None:
    ids, pixels = IDS.repeat(2, 1), torch.cat([PIXELS, -PIXELS])
    options: dict[str, Any] = {"images": pixels, "labels": ids.clamp(min=0), "packed": True}
    transformers_internals.set_attention(model.config, VARLEN)  # whose mask is of another form
    try:
        register_varlen(varlen_kernel())
        found = model(ids, output_attentions=True, loss_only=True, **options)
        assert transformers_internals.attention_of(model.config) == VARLEN
    finally:
        transformers_internals.set_attention(model.config, "sdpa")
    length = found.attentions[0].shape[-1] // 2
    assert not found.attentions[0][:, :, length:, :length].any()
    assert not found.attentions[0][:, :, :length, length:].any()
    assert torch.allclose(found.loss, model(ids, **options).loss, atol=1e-5)


def test_gradients_of_pixels(model: Any) -> None:
    """Of a frozen model, against differences; frozen modules keep no activations where nobody asks."""
    model.requires_grad_(False)
    labels = torch.tensor([[-100, -100, -100, 70, 80]])
    pixels = PIXELS.clone().requires_grad_()
    model(IDS, images=pixels, labels=labels).loss.backward()
    direction = torch.randn(PIXELS.shape, generator=torch.Generator().manual_seed(1))
    before, after = (model(IDS, images=PIXELS + step * direction, labels=labels).loss.item() for step in (-1e-2, 1e-2))
    slope = float((pixels.grad * direction).sum())
    assert slope == pytest.approx((after - before) / 2e-2, rel=0.05)
    assert abs(slope) > 1e-4
    assert not model.get_vision_tower()(PIXELS).requires_grad
    assert model.get_vision_tower()([pixels[0]])[0].requires_grad


def test_modalities_of_llava_next(model: Any) -> None:
    options = {"images": PIXELS, "do_sample": False, "max_new_tokens": 2}
    plain = model.generate(IDS, **options)
    for given in (["image"], ["image", "text"], [], None, "image"):
        assert torch.equal(model.generate(IDS, modalities=given, **options), plain)
    assert model(IDS, images=PIXELS, modalities=["image"]).logits.shape[0] == 1
    for call in (
        lambda: model.generate(IDS, modalities=["sound"], **options),
        lambda: model(IDS, images=PIXELS, modalities=["sound"]),
    ):
        with pytest.raises(InputError, match=r"modalities has 'sound'; known: image, video, text"):
            call()
