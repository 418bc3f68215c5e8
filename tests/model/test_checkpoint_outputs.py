"""Recorded numbers of the original software, checkpoint by checkpoint and case by case.

The copy beside the tests holds ids, labels, masks, logsumexp, argmax and tokens; with LLAVA_GOLDEN set, embeddings and logits
are compared too, and the one checkpoint that is not kept here.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import HERE

from llava.errors import InputError
from llava.model.builder import LoadedModel, load

ROOT = Path(os.environ.get("LLAVA_GOLDEN") or HERE)
TOLERANCE = 1e-4
CHECKPOINTS = (
    "llava-tiny-mpt",
    "llava-v1-tiny-linear",
    "llava-v1.5-tiny-full-ft",
    "llava-v1.5-tiny-lora",
    "llava-v1.5-tiny-pretrain",
    "llava-v1.5-tiny-vicuna",
    "llava-v1.6-tiny-vicuna",
)
# Cases that ours refuses although the original computed something: it left the third image out without a word.
REFUSED = ("too_many_images",)


def recorded(checkpoint: str) -> dict[str, Any]:
    return json.loads((ROOT / "checkpoint_outputs" / f"{checkpoint}.json").read_text())


@functools.cache
def arrays(checkpoint: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "checkpoint_outputs" / f"{checkpoint}.npz") as data:
        return {name: data[name] for name in data.files if not name.startswith("native_fp16")}


@functools.cache
def pixels(side: int) -> dict[str, torch.Tensor]:
    with np.load(ROOT / "checkpoint_outputs" / f"inputs_{side}.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}


@functools.cache
def loaded(checkpoint: str) -> LoadedModel:
    if not (ROOT / "checkpoints" / checkpoint).is_dir():
        pytest.skip(f"{checkpoint} is not kept here; set LLAVA_GOLDEN to the folder that holds it")
    record = recorded(checkpoint)
    before = Path.cwd()
    os.chdir(ROOT)  # the configs name tower and base relative to it
    try:
        return load(record["checkpoint"], base=record["model_base"], device="cpu")
    finally:
        os.chdir(before)


def images_of(case: dict[str, Any], side: int) -> Any:
    """The pixel inputs that a case names, in the form in which the original was given them."""
    source, spec = pixels(side), case["images"]
    if spec is None:
        return None
    if isinstance(spec, list):
        return [_named(entry, source) for entry in spec]
    if match := re.match(r"stack of (\S+) twice", spec):
        return torch.stack([source[match[1]]] * 2)
    return _named(spec, source)


def _named(text: str, source: dict[str, torch.Tensor]) -> torch.Tensor:
    match = re.match(r"pad\[(\d+)(?::(\d+))?\]", text)
    if match is None:
        return source[text]
    return source["pad"][int(match[1])] if match[2] is None else source["pad"][int(match[1]) : int(match[2])]


@pytest.fixture
def overridden(monkeypatch: pytest.MonkeyPatch) -> Any:
    def apply(model: Any, overrides: dict[str, Any]) -> None:
        for key, value in overrides.items():
            owner = model.get_vision_tower() if key.startswith("tower.") else model.config
            monkeypatch.setattr(owner, key.removeprefix("tower."), value, raising=False)

    return apply


def cases() -> list[Any]:
    return [
        pytest.param(checkpoint, name, id=f"{checkpoint}-{name}")
        for checkpoint in CHECKPOINTS
        for name in recorded(checkpoint)["cases"]
        if name != "tune_and_start_end"  # a training setting, which changes nothing in forward
    ]


@pytest.mark.parametrize(("checkpoint", "name"), cases())
def test_case(checkpoint: str, name: str, overridden: Any) -> None:
    record, data = recorded(checkpoint), arrays(checkpoint)
    case, model = record["cases"][name], loaded(checkpoint).model
    overridden(model, case["overrides"])

    def given(leaf: str) -> torch.Tensor | None:
        value = data.get(f"{name}/{leaf}")
        if value is None:
            return None
        return torch.from_numpy(value if value.dtype == bool else value.astype(np.int64))

    ids, mask, labels = given("input_ids"), given("attention_mask"), given("labels")
    images = images_of(case, record["image_size"])
    call = {"attention_mask": mask, "labels": labels, "images": images, "image_sizes": case["image_sizes"]}
    if not case["ok"] or name in REFUSED:
        with pytest.raises(InputError), torch.no_grad():
            model(ids, **call)
        return

    with torch.no_grad():
        _, positions, p_mask, _, embeds, p_labels = model.prepare_inputs_labels_for_multimodal(
            ids, None, mask, None, labels, images, image_sizes=case["image_sizes"]
        )
        output = model(ids, **call)
    valid = given("p_attention_mask")
    valid = torch.ones(output.logits.shape[:2], dtype=torch.bool) if valid is None else valid
    for leaf, ours in (("p_labels", p_labels), ("p_attention_mask", p_mask), ("p_position_ids", positions)):
        assert (ours is None) == (case[leaf] is None), leaf
        if ours is not None:
            assert torch.equal(ours.long(), given(leaf).long()), leaf
    assert (embeds is None) == (case["p_inputs_embeds"] is None)
    if embeds is not None:
        assert list(embeds.shape) == case["p_inputs_embeds"]
    if f"{name}/p_inputs_embeds" in data:
        close(embeds[valid], torch.from_numpy(data[f"{name}/p_inputs_embeds"])[valid])

    assert list(output.logits.shape) == case["logits_shape"]
    close(output.logits.logsumexp(-1)[valid], torch.from_numpy(data[f"{name}/logits_logsumexp"])[valid])
    assert torch.equal(output.logits.argmax(-1)[valid], given("argmax")[valid])
    if f"{name}/logits" in data:
        close(output.logits[valid], torch.from_numpy(data[f"{name}/logits"])[valid])
    if "loss" in case:
        close(output.loss, torch.tensor(case["loss"]))
    check_tokens(checkpoint, name, ids, mask, images)


def check_tokens(checkpoint: str, name: str, ids: torch.Tensor, mask: Any, images: Any) -> None:
    """Greedy tokens. The original put BOS in front of them, and went on after the padding of right-padded rows."""
    record, data = recorded(checkpoint), arrays(checkpoint)
    case, model = record["cases"][name], loaded(checkpoint).model
    if name == "batch_gen_right":
        name = "batch_gen_left"
    if f"{name}/generated" in data:
        want = data[f"{name}/generated"][:, 1:].astype(np.int64)
    elif f"{name}/greedy_by_hand" in data:
        want = data[f"{name}/greedy_by_hand"].astype(np.int64).reshape(len(ids), -1)
    else:
        return
    got = model.generate(
        ids,
        attention_mask=mask,
        images=images,
        image_sizes=case["image_sizes"],
        do_sample=False,
        max_new_tokens=20,
        min_new_tokens=want.shape[1] if f"{name}/greedy_by_hand" in data else None,
        use_cache=True,
        pad_token_id=0,
    ).numpy()
    width = max(got.shape[1], want.shape[1])
    assert np.array_equal(filled(got, width), filled(want, width))


def filled(rows: np.ndarray, width: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0, equal_nan=True)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_features_and_facts(checkpoint: str) -> None:
    record, data, ours = recorded(checkpoint), arrays(checkpoint), loaded(checkpoint)
    images = pixels(record["image_size"])["pad"][:2]
    with torch.no_grad():
        close(ours.model.encode_images(images), torch.from_numpy(data["encode_images"]))
        close(ours.model.get_vision_tower()(images), torch.from_numpy(data["vision_tower_features"]))
    # The original's 2048 is more than MPT's ALiBi table has.
    assert ours.context_len == min(record["context_len"], getattr(ours.model.config, "max_seq_len", 2048))
    assert len(ours.tokenizer) == record["tokenizer_len"]
    assert ours.model.get_input_embeddings().weight.shape[0] == record["vocab_rows"]
    assert type(ours.model).__name__ == record["class"]
