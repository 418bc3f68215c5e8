"""`llava doctor` on checkpoints: each broken one is named by its cause and by nothing else, good ones have no findings."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
import torch
from golden_data import HERE, golden
from repository import ROOT, defined_in

from llava.assets import embedded_model_path
from llava.diagnose import doctor as program
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.diagnose.checks.findings import CAUSES
from llava.errors import InputError

GOOD = [faults.VICUNA, faults.LINEAR, faults.ANYRES, faults.LORA, faults.PRETRAIN, faults.MPT, "vicuna-tiny-base"]


@pytest.fixture(autouse=True)
def among_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs of recorded checkpoints name their towers relative to this folder."""
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# Healthy


@pytest.mark.parametrize("name", GOOD)
def test_recorded_checkpoints_are_healthy(name: str) -> None:
    report = examine_checkpoint(golden(f"checkpoints/{name}"))
    assert report.codes == faults.also_found(name), report.findings
    assert "numbers" in report.checked
    assert "smoke test" in report.checked


def test_the_embedded_model_is_healthy() -> None:
    report = examine_checkpoint(embedded_model_path())
    assert report.codes == [], report.findings
    assert report.skipped == []


@pytest.mark.parametrize("language_model", ["llama", "mistral", "qwen2", "qwen3", "mpt", "gemma2"])
@pytest.mark.parametrize("settings", [{}, tiny.ANYRES], ids=["pad", "anyres"])
def test_built_models_are_healthy(language_model: str, settings: dict[str, object], tmp_path: Path) -> None:
    report = examine_checkpoint(tiny.build(tmp_path / "model", language_model, conv_mode="llava_v1", **settings))
    assert report.codes == [], report.findings
    assert "smoke test" in report.checked


# Broken


@pytest.mark.parametrize("name", faults.CHECKPOINT_FAULTS)
def test_a_broken_checkpoint_is_named_by_its_cause(name: str, tmp_path: Path) -> None:
    source, breaking, code = faults.CHECKPOINT_FAULTS[name]
    folder = faults.good(source, tmp_path / "model")
    breaking(folder)
    report = examine_checkpoint(folder)
    assert report.codes == [code, *faults.also_found(source)], report.findings
    finding = report.findings[0]
    assert finding.evidence
    assert finding.what
    assert finding.remedy


def test_every_cause_names_functions_that_exist() -> None:
    for code, cause in CAUSES.items():
        assert cause.where, code
        for place in cause.where:
            path, _, name = place.partition(":")
            assert (ROOT / path).is_file(), place
            assert name in defined_in(ROOT / path), place


# Faults of code and libraries rather than of files


def test_wrong_padding_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A splice whose mask says that padding is text."""
    from llava.model import llava_arch

    def careless(*args: Any, **kwargs: Any) -> Any:
        batch = plain_pad(*args, **kwargs)
        return dataclasses.replace(batch, mask=torch.ones_like(batch.mask))

    plain_pad = llava_arch.pad
    monkeypatch.setattr(llava_arch, "pad", careless)
    assert examine_checkpoint(tiny.build(tmp_path / "model")).codes == ["padding"]


def test_what_only_loading_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise InputError("there is not enough memory")

    monkeypatch.setattr("llava.model.builder.load", refuse)
    assert examine_checkpoint(tiny.build(tmp_path / "model")).codes == ["load-fails"]


def test_a_model_too_large_for_this_machine_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.diagnose.checks.checkpoint_weights.free_memory", lambda: 1000)
    report = examine_checkpoint(tiny.build(tmp_path / "model"))
    assert report.codes == []
    assert [check for check, _ in report.skipped] == ["smoke test"]


def test_every_cause_is_met_by_a_test() -> None:
    tables = (faults.CHECKPOINT_FAULTS, faults.DATA_FAULTS, faults.RUN_FAULTS, faults.SERVER_FAULTS)
    met = {entry[-1] for table in tables for entry in table.values()}
    assert set(CAUSES) - met == {"padding", "load-fails", "server-unreachable"}  # each has a test of its own
    assert len(faults.CHECKPOINT_FAULTS) > 60


# The program


def doctor(*words: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = program.main(list(words))
    return status, printed.getvalue()


def test_status_says_healthy_or_found(tmp_path: Path) -> None:
    assert doctor(f"checkpoints/{faults.VICUNA}")[0] == 0
    folder = tiny.build(tmp_path / "model", vocab_size=320)
    faults.config(mm_hidden_size=48)(folder)
    status, text = doctor(str(folder))
    assert status == 1
    assert "config-width" in text
    assert "llava/model/multimodal_projector/builder.py:build_vision_projector" in text
    assert "\033" not in text


def test_json_says_the_same(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model")
    faults.config(mm_hidden_size=48)(folder)
    status, text = doctor(str(folder), "--json", "--quick")
    content = json.loads(text)
    assert status == 1
    (finding,) = content["findings"]
    assert finding["code"] == "config-width"
    assert finding["evidence"] == {"projector_in": 32, "mm_hidden_size": 48, "tower_width": 32}
    assert finding["where"] == list(CAUSES["config-width"].where)
    assert finding["fixable"]
    assert {"check": "numbers", "because": "--quick leaves it out"} in content["not_looked_at"]


FIXABLE = [
    "a wrong width in the config",
    "another projector type",
    "another vocabulary size",
    "markers without rows",
    "no begin token",
    "another end token",
    "an index of another save",
    "an index without a map",
    "half a generation config",
    "an unknown padding side",
    "a limit beyond the positions",
    "an unknown template",
    "pixels of another size",
]


@pytest.mark.parametrize("name", FIXABLE)
def test_fix_repairs_a_copy(name: str, tmp_path: Path) -> None:
    source, breaking, code = faults.CHECKPOINT_FAULTS[name]
    folder, copied = faults.good(source, tmp_path / "model"), tmp_path / "copy"
    breaking(folder)
    before = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    status, text = doctor(str(folder), "--fix", str(copied), "--json")
    content = json.loads(text)
    assert status == 1
    assert [finding["code"] for finding in content["findings"]] == [code]
    assert content["fix"]["left"] == []
    assert before == {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    assert examine_checkpoint(copied).codes == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "say what to examine"),
        (["no/such/folder/here"], "there is no model folder"),
        (["images", "--fix", "images"], "exists already"),
        (["train_data/finetune.json", "--conv-mode", "v1"], "--model-path"),
    ],
)
def test_a_wrong_call_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(words) == 2
    errors = capsys.readouterr().err
    assert sentence in errors
    assert errors.count("\n") == 1


def test_the_list_has_every_cause() -> None:
    status, text = doctor("--list")
    assert status == 0
    assert [line.split()[0] for line in text.splitlines()] == list(CAUSES)
    table = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    assert [row.split("`")[1] for row in table.splitlines() if row.startswith("| `")] == list(CAUSES)
