"""The proof of a conversion counts every stored tensor of its source: compared with the target, or left out by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_data import HERE, golden
from safetensors.torch import load_file, save_file
from tiny import build, save_tower

from llava.convert.convert import ConversionOptions, ConversionReport, convert
from llava.errors import InputError
from llava.model.builder import load
from llava.model.checkpoints.inspect import inspect

TENSORS_ONLY = ConversionOptions(verification="tensors")


def report_of(folder: Path, target: Path, to: str = "original", **options: object) -> ConversionReport:
    report = convert(folder, target, to=to, options=TENSORS_ONLY, **options)
    recorded = json.loads((target / "conversion.json").read_text())["left_out"]
    assert recorded == {reason: list(names) for reason, names in report.left_out.items()}
    assert all(reason in report.summary() for reason in report.left_out)
    return report


def test_a_whole_model_leaves_nothing_out(tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    report = report_of(folder, tmp_path / "target")
    assert report.left_out == {}
    assert report.tensors.num_tensors == len(inspect(folder).tensors)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_stored_tower_that_is_not_used_is_left_out_by_name(tmp_path: Path, seed: int) -> None:
    """Equal to the one that is used, or another one: the reason says which."""
    folder = build(tmp_path / "model", unfreeze_mm_vision_tower=True)
    save_tower(folder / "tower", seed=seed)
    state = load_file(folder / "model.safetensors")
    if seed == 0:
        public = load_file(folder / "tower" / "model.safetensors")
        state |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in public.items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"unfreeze_mm_vision_tower": False}
    (folder / "config.json").write_text(json.dumps(config))
    report = report_of(folder, tmp_path / "target")
    word = "equal to" if seed == 0 else "differs from"
    stored, buffers, own = (next(r for r in report.left_out if part in r) for part in (word, "buffers", "stays in"))
    assert len(report.left_out) == 3
    assert report.left_out[buffers] == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert len(report.left_out[stored]) == len(report.left_out[own]) == 55
    in_model = {name for name in state if "vision_tower" not in name and "inv_freq" not in name}
    assert report.tensors.num_tensors == len(in_model) + 55


def test_a_base_s_replaced_tensors_and_unmerged_biases_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    lora = golden("checkpoints/llava-v1.5-tiny-lora")
    report = report_of(lora, tmp_path / "merged", base="checkpoints/vicuna-tiny-base")
    assert all("stays in" in reason or "of the base" in reason for reason in report.left_out)
    projector = report_of(build(tmp_path / "model"), tmp_path / "projector", "projector")
    ((reason, names),) = projector.left_out.items()
    assert reason.startswith("language model and vision tower")
    assert len(names) + projector.tensors.num_tensors == len(inspect(tmp_path / "model").tensors)


def test_tied_weights_that_differ_are_an_error(tmp_path: Path) -> None:
    """Only one of them can be used, and none is preferred in silence."""
    folder = build(tmp_path / "model", tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder, device="cpu")
    shutil.copytree(folder, tmp_path / "other")
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for options in ({}, {"device_map": {"": "cpu"}}):
        with pytest.raises(InputError, match="ties them"):
            load(tmp_path / "other", device="cpu", **options)
