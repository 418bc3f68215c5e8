"""`llava selftest`: five items that hold on good models, and each of which fails where what it shows is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
import torch
from golden_data import HERE, golden
from repository import ROOT, defined_in

from llava.diagnose import selftest
from llava.diagnose.checks import projector_exercise as exercise
from llava.diagnose.selftest import examine
from llava.model.builder import load


@pytest.fixture(autouse=True)
def among_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def states(path: Path, *, steps: int = 0) -> list[bool | None]:
    """Whether each item holds; None where it was left out."""
    items = examine(load(path, device="cpu"), str(path), steps=steps)
    for item in items:
        for place in item.where:
            file, _, name = place.partition(":")
            assert name in defined_in(ROOT / file), place
    return [None if item.skipped else item.passed for item in items]


@pytest.mark.parametrize(
    "name",
    [
        "llava-v1.5-tiny-vicuna",
        "llava-v1-tiny-linear",
        "llava-v1.6-tiny-vicuna",
        "llava-tiny-mpt",
        "llava-v1.5-tiny-lora",
    ],
)
def test_recorded_models_hold(name: str) -> None:
    assert states(golden(f"checkpoints/{name}")) == [True, True, True, None, True]


def test_the_embedded_model_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """With a short exercise: the loss has to fall, and mm_projector.bin has to load over its base."""
    assert selftest.main(["--steps", "4", "--json"]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert [item["state"] for item in items] == ["passed"] * 5
    lengths = [check["text"] for check in items[1]["checks"]]
    assert lengths[2].startswith("16 + 64 + 64 = 144; embeddings 144, mask 144")
    projector = {check["label"]: check["text"] for check in items[3]["checks"]}
    assert projector["exchanged"] == "0.weight [320, 320], 2.weight [320, 320], 4.weight [320, 320]"
    assert projector["trained"].startswith("308,160 of")


@pytest.mark.parametrize("settings", [{}, tiny.ANYRES], ids=["pad", "anyres"])
def test_the_exercise_works_on_a_built_model(settings: dict[str, Any], tmp_path: Path) -> None:
    assert states(tiny.build(tmp_path / "model", conv_mode="llava_v1", **settings), steps=8) == [True] * 5


# Each item can fail


def test_a_splice_that_mixes_things_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.model import llava_arch

    def reversed_features(ids: Any, valid: Any, features: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(ids, valid, [feature.flip(0) for feature in features], *args, **kwargs)

    plain = llava_arch.splice
    monkeypatch.setattr(llava_arch, "splice", reversed_features)
    assert states(golden("checkpoints/llava-v1.5-tiny-vicuna"))[:2] == [False, True]


def test_a_feature_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.model.llava_arch import LlavaMetaForCausalLM

    plain = LlavaMetaForCausalLM.encode_images
    monkeypatch.setattr(
        LlavaMetaForCausalLM,
        "encode_images",
        lambda self, images: torch.cat([f := plain(self, images), f[:, :1]], dim=1),
    )
    assert states(golden("checkpoints/llava-v1.5-tiny-vicuna"))[1] is False


def test_questions_that_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    import llava.text.labels

    def all_trained(*args: Any, **kwargs: Any) -> Any:
        ids, _ = plain(*args, **kwargs)
        return ids, ids

    plain = llava.text.labels.encode_spans
    monkeypatch.setattr(llava.text.labels, "encode_spans", all_trained)
    assert states(golden("checkpoints/llava-v1.5-tiny-vicuna"))[2] is False


def test_a_projector_that_learns_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exercise, "_replace_projector", lambda model: None)
    assert states(tiny.build(tmp_path / "model"), steps=2)[3] is False


def test_an_end_mark_that_stays(tmp_path: Path) -> None:
    folder = faults.good(faults.MPT, tmp_path / "model")
    faults.ordinary_end_mark(folder)
    assert states(folder) == [True, True, True, None, False]


# The program


def test_text_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["checkpoints/llava-v1.5-tiny-vicuna", "--skip-training"]) == 0
    text = capsys.readouterr().out
    assert "4 of 5 items hold (4 skipped)" in text
    assert "\033" not in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["no/such/folder/here"], "there is no model folder"),
        (["checkpoints/vicuna-tiny-base"], "without a vision tower"),
        (["--steps", "0"], "--steps is 0"),
    ],
)
def test_a_wrong_call_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_a_failure_is_a_status(tmp_path: Path) -> None:
    folder = faults.good(faults.MPT, tmp_path / "model")
    faults.ordinary_end_mark(folder)
    assert selftest.main([str(folder), "--skip-training"]) == 1
