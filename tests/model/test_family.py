"""What each published checkpoint of the family is: every command says the same, and so does docs/checkpoints.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from family import FAMILY, OTHERS, READ, REFUSED
from repository import ROOT

from llava.__main__ import main
from llava.convert.convert import ConversionOptions, convert
from llava.convert.describe import describe_checkpoint
from llava.data.reader import read_model
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.errors import InputError
from llava.model.builder import load
from llava.model.checkpoints.inspect import inspect, survey

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a program in this process; returns what it prints, and checks its exit status."""

    def call(*argv: str, status: int) -> str:
        capsys.readouterr()
        assert main(list(argv)) == status
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return out + err

    return call


@pytest.mark.parametrize("name", [*REFUSED, *OTHERS])
def test_a_model_that_is_not_read_is_refused_by_one_sentence(name: str, tmp_path: Path, run: Run) -> None:
    folder = (REFUSED | OTHERS)[name](tmp_path / "model")
    with pytest.raises(InputError) as refusal:
        inspect(folder)
    said = str(refusal.value)
    assert said.startswith(f"{folder} holds ")
    assert "\n" not in said
    assert len(said) < 400
    for use in (load, read_model, lambda path: convert(path, tmp_path / "target", to="original")):
        with pytest.raises(InputError) as again:
            use(folder)
        assert str(again.value) == said
    assert describe_checkpoint(folder).readers["llava"] == f"no: {said}"
    for quick in (True, False):
        (finding,) = examine_checkpoint(folder, quick=quick).findings
        assert (finding.code, finding.what) == ("model-type", said)
    target, path = str(tmp_path / "target"), str(folder)
    for argv in (
        ["chat", "-m", path],
        ["serve", "-m", path],
        ["bench", "-m", path],
        ["convert", path, target, "--to", "transformers"],
    ):
        assert run(*argv, status=2).strip().endswith(f"error: {said}")
    assert said in run("info", path, status=0)


@pytest.mark.parametrize("name", READ)
def test_a_model_that_is_read_is_described_as_it_is_loaded(name: str, tmp_path: Path) -> None:
    folder = READ[name](tmp_path / "model")
    loaded = load(folder, device="cpu", dtype="fp32")
    found = describe_checkpoint(folder)
    assert found.readers["llava"] == "yes"
    assert (found.facts["context"], found.facts["template"]) == (loaded.context_len, loaded.conv_mode)
    assert found.missing == ()
    assert not {"model-type", "load-fails", "weights-config"} & set(examine_checkpoint(folder, quick=True).codes)
    report = convert(folder, tmp_path / "target", to="original", options=ConversionOptions(verification="tensors"))
    assert report.tensors.is_exact
    assert load(tmp_path / "target", device="cpu", dtype="fp32").context_len == loaded.context_len


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["checkpoints.md", "checkpoints.zh-CN.md"])
def test_the_table_names_every_published_checkpoint(page: str, tmp_path: Path) -> None:
    """A row is `| checkpoint | loads |`, or `| checkpoint | what it is: why not | what reads it |`."""
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / page).read_text(), re.MULTILINE))
    assert set(FAMILY) <= set(rows)
    for index, (name, make) in enumerate(FAMILY.items()):
        model = survey(make(tmp_path / str(index))).foreign
        if model is None:
            assert rows[name].startswith(("loads", "能加载"))
        else:
            assert rows[name] == f"{model.name}: {model.reason}; use {' or '.join(model.readers)}"
