"""A replaced `prepare_inputs_labels_for_multimodal` reaches `forward` and `generate` alike, as research code expects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build
from torch import Tensor

from llava.engine.decoder import unsupported_reason
from llava.engine.selection import HFEngine, open_engine
from llava.errors import InputError
from llava.model.builder import LoadedModel, load
from llava.model.llava_arch import OWN_PREPARE, LlavaMetaForCausalLM

NAME = "prepare_inputs_labels_for_multimodal"
IDS = torch.tensor([[5, 6, -200, 8, 9]])
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return load(build(tmp_path / "model"), device="cpu", dtype="fp32")


def pruned(calls: list[int]) -> Callable[..., Any]:
    """Token pruning: the second half of the image's four features is left out."""

    def prepare(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        calls.append(1)
        ids, positions, mask, past, embeds, labels = OWN_PREPARE(self, *args, **kwargs)
        if embeds is None:
            return ids, positions, mask, past, embeds, labels
        kept = torch.tensor([index for index in range(embeds.shape[1]) if index not in (4, 5)])
        return ids, positions, None if mask is None else mask[:, kept], past, embeds[:, kept], labels

    return prepare


def replace_on(place: str, model: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "the class":
        monkeypatch.setattr(LlavaMetaForCausalLM, NAME, pruned(calls))
    elif place == "the instance":
        setattr(model, NAME, pruned(calls).__get__(model))
    else:
        model.__class__ = type("Pruned", (type(model),), {NAME: pruned(calls)})


def next_token(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, images=PIXELS).logits[:, -1].argmax(-1)


@pytest.mark.parametrize("place", ["the class", "the instance", "a subclass"])
def test_forward_and_generate_call_it(place: str, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = loaded.model, []
    assert unsupported_reason(model) is None
    whole = model(IDS, images=PIXELS).logits
    replace_on(place, model, calls, monkeypatch)
    assert model(IDS, images=PIXELS).logits.shape[1] == whole.shape[1] - 2
    assert len(calls) == 1
    calls.clear()
    answer = model.generate(IDS, images=PIXELS, max_new_tokens=1, do_sample=False)
    assert len(calls) == 1
    assert torch.equal(answer[0], next_token(model))
    assert NAME in str(unsupported_reason(model))
    assert isinstance(open_engine(loaded), HFEngine)
    with pytest.raises(InputError, match=NAME):
        model(IDS, images=PIXELS, packed=True, labels=IDS)


def test_rows_of_a_batch_are_padded_on_the_left(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner function pads on the right, where a new token must not follow."""
    model = loaded.model
    long, short = [5, 6, -200, 8, 9, 10, 11], [7, -200, 9]
    ids = torch.tensor([long, [*short, *[0] * 4]])
    arguments = {"images": PIXELS.expand(2, -1, -1, -1), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, attention_mask=ids.ne(0), **arguments)
    monkeypatch.setattr(LlavaMetaForCausalLM, NAME, lambda self, *args: OWN_PREPARE(self, *args))
    assert model.replaces_prepare
    assert torch.equal(model.generate(ids, attention_mask=ids.ne(0), **arguments), want)


def test_text_alone(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = loaded.model, torch.tensor([[5, 6, 8, 9]])
    want = model.generate(ids, max_new_tokens=3, do_sample=False)
    monkeypatch.setattr(LlavaMetaForCausalLM, NAME, lambda self, *args: OWN_PREPARE(self, *args))
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), want)
    with pytest.raises(InputError, match="no images were given"):
        model.generate(IDS, max_new_tokens=3)
