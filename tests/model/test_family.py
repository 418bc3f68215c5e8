"""What each published checkpoint of the family is: every command says the same, and so does docs/checkpoints.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from family import FAMILY, OTHERS, READ, REFUSED
from repository import ROOT

from llava.__main__ import main
from llava.convert.convert import LAYOUT_BUILDERS, ConversionOptions, convert
from llava.convert.describe import describe_checkpoint
from llava.convert.source import open_source
from llava.data.reader import read_model
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.engine.decoder import unsupported_reason
from llava.errors import InputError
from llava.model.builder import LoadedModel, load
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


# The table in docs/checkpoints.md: what can be done with each, in the words of the English and of the Chinese page.
PAGES = {
    "checkpoints.md": {},
    "checkpoints.zh-CN.md": {
        "yes": "能", "no": "不能", "packed": "打包", "padded": "补齐", "engine": "引擎", "generate": "`generate`", ", ": "、",
    },
}  # fmt: skip


def rows(page: str) -> dict[str, list[str]]:
    """The table's rows by their first cell, with the words of the English page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^\| ([^|\n]+) \| ([^|\n]+) \| ([^|\n]+) \| ([^|\n]+) \| ([^|\n]+) \|$", text, re.MULTILINE)
    return {name: cells for name, *cells in found}


def in_words_of(page: str, cell: str) -> str:
    for english, word in PAGES[page].items():
        cell = cell.replace(english, word)
    return cell


def abilities(folder: Path, loaded: LoadedModel) -> list[str]:
    """What can be done with a model that is read: load, train, serve, convert."""
    layouts = []
    for layout in ("original", "transformers", "gguf"):
        with suppress(InputError):
            LAYOUT_BUILDERS[layout](open_source(folder), ConversionOptions(), None)
            layouts.append(layout)
    try:
        loaded.model.check_packable()
        trains = "packed"
    except InputError:
        trains = "padded"
    serves = "engine" if unsupported_reason(loaded.model) is None else "generate"
    return ["yes", trains, serves, ", ".join(layouts)]


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
    able = abilities(folder, loaded)
    for program, layout in (("transformers", "transformers"), ("llama.cpp", "gguf")):
        assert (found.readers[program].partition(",")[0] != "no") == (layout in able[-1]) or found.layout == layout
    for page in PAGES:
        assert rows(page)[name] == [in_words_of(page, cell) for cell in able]


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_the_table_names_every_published_checkpoint(page: str, tmp_path: Path) -> None:
    """In a row of a model that is not read stands what it is, why not, and what reads it; models that are read: above."""
    found = rows(page)
    assert set(FAMILY) <= set(found)
    for index, (name, make) in enumerate(REFUSED.items()):
        model = survey(make(tmp_path / str(index))).foreign
        assert model is not None
        no = in_words_of(page, "no")
        assert found[name] == [f"{model.name}: {model.reason}; use {' or '.join(model.readers)}", no, no, no]
