"""Every program says in its errors the name by which it was called, which is the one that its `--help` shows.

Programs are found, not listed: the commands of `llava`, the modules of the package that end in a call of their `main`, and
the scripts with a parser of ours. They run in this process: runpy makes them `__main__` as Python itself does.
"""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cli_kit import run_python

from llava.__main__ import main
from llava.cli.commands import COMMANDS
from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.train import train_xformers

# runpy says so about every module that this process has loaded already.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")

ROOT = Path(__file__).parents[2]
IS_PROGRAM = 'if __name__ == "__main__":'


def with_programs(start: str, module: str) -> list[str]:
    """`start` and, where its first word picks another program, those."""
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    parts = import_module(module).PROGRAMS if "\nPROGRAMS" in source else ()
    return [start, *(f"{start} {part}" for part in parts)]


def programs() -> Iterator[str]:
    """What a user types, without flags."""
    yield "llava"
    for name, command in COMMANDS.items():
        yield from with_programs(f"llava {name}", command.module)
    for path in sorted((ROOT / "llava").rglob("*.py")):
        if path.name != "__main__.py" and IS_PROGRAM in path.read_text(encoding="utf-8"):
            file = path.relative_to(ROOT)
            module = ".".join(file.with_suffix("").parts)
            yield from with_programs(f"python -m {module}", module)
            yield from with_programs(f"python {file.as_posix()}", module)
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if IS_PROGRAM in text and "build_parser" in text:
            yield f"python {path.relative_to(ROOT).as_posix()}"


PROGRAMS = list(programs())


def name_of(program: str) -> str:
    """What it should call itself: a file goes by its name alone."""
    words = program.split()
    if words[0] == "llava" or words[1] == "-m":
        return program
    return " ".join([Path(words[1]).name, *words[2:]])


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest would take llava/serve/test_message.py for a file of tests, by its name.
    finders = [finder for finder in sys.meta_path if type(finder).__module__ != "_pytest.assertion.rewrite"]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.delitem(sys.modules, "llava.serve.test_message", raising=False)  # as another file's tests imported it
    # One program asks for this package before it looks at flags.
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.ModuleType("xformers.ops"))


def status_of(program: str, flags: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call a program as a user does, and give its exit status."""
    first, *words = [*program.split(), *flags]
    try:
        if first == "llava":
            return main(words)
        module = words[1] if words[0] == "-m" else None
        monkeypatch.setattr(sys, "argv", ["", *words[2 if module else 1 :]])
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    pytest.fail(f"{program} did not end with an exit status")


def test_programs_were_found() -> None:
    assert len(PROGRAMS) > 100
    for program in (
        "llava chat",
        "llava eval score",
        "python -m llava.data.program show",
        "python -m llava.train.train_mem",
    ):
        assert program in PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_unknown_flag(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = name_of(program)
    assert status_of(program, ["--nonsense"], monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{name}: error: unknown ")
    assert "--nonsense" in said.err
    assert said.err.count("\n") == 1
    assert status_of(program, ["--help"], monkeypatch) == 0
    said = capsys.readouterr()
    assert " ".join(said.out.split()).startswith(f"usage: {name} ")
    assert said.err == ""


class NoArguments:
    """What nobody can read."""

    def __getattribute__(self, name: str) -> NoReturn:
        raise InputError("nothing of\nthis works")


def reads_arguments(program: str) -> bool:
    """Training has another parser; the rest only print."""
    prints = program == "llava" or f"{program} show" in PROGRAMS or program.endswith(" list")
    return "train" not in program and not prints


@pytest.mark.parametrize("program", filter(reads_arguments, PROGRAMS))
def test_what_is_found_while_running(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ArgumentParser, "parse_args", lambda *_: NoArguments())
    assert status_of(program, [], monkeypatch) == 2
    assert capsys.readouterr().err == f"{name_of(program)}: error: nothing of this works\n"


def test_a_missing_package_is_found_by_the_program_that_was_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops")
    assert status_of("python -m llava.train.train_xformers", [], monkeypatch) == 2
    assert capsys.readouterr().err.startswith("python -m llava.train.train_xformers: error: this needs the package")
    assert train_xformers.main([]) == 2
    assert capsys.readouterr().err.startswith("llava train: error: this needs the package")


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        ("-m llava.serve.controller", ["--port", "-1"], "port"),
        (
            "-m llava.serve.sglang_worker",
            [],
            "required: --sgl-endpoint (all flags: python -m llava.serve.sglang_worker",
        ),
        ("-m llava.serve.sglang_worker", ["--sgl-endpoint", "http://127.0.0.1:1"], "http://127.0.0.1:1/v1/models"),
        ("llava/eval/model_vqa.py", ["--question-file", "no/questions.jsonl"], "'no/questions.jsonl'"),
        ("scripts/merge_lora_weights.py", ["--model-path", "absent", "--save-model-path", "there"], "absent"),
    ],
)
def test_in_a_process_of_its_own(program: str, flags: list[str], words: str) -> None:
    done = run_python(*program.split(), *flags, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name_of(f'python {program}')}: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_program_of_someone_else_that_calls_ours(tmp_path: Path) -> None:
    """Its own name would be a riddle: the flags are ours."""
    (tmp_path / "study.py").write_text("from llava.cli import bench\nbench.main(['--nonsense'])\n", encoding="utf-8")
    assert run_python("study.py", cwd=tmp_path).stderr.startswith("llava bench: error: unknown flag")
