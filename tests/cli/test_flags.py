"""Flags of all programs: help that answers at once, defaults from a configuration file, and completion by shells."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli_kit import run_python

from llava.cli import chat
from llava.cli.commands import COMMANDS
from llava.cli.shell_completion import SCRIPTS, KnownProgram, find_programs
from llava.serve import serve
from llava.train.short_help import FIRST_FLAGS, short_help

# Help


def test_help_imports_no_library() -> None:
    """One process for all commands: what none of them imports, each of them does not."""
    code = f"""
import contextlib, io, sys
from llava.__main__ import main
words = [["--help"], *([name, "--help"] for name in {[*COMMANDS]!r}), ["data", "check", "--help"], ["eval", "score", "--help"]]
for line in words:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main(line)
    assert shown.getvalue().startswith("usage: llava"), line
print([name for name in ("torch", "transformers", "numpy", "PIL", "fastapi", "gradio", "peft") if name in sys.modules])
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.replace("'", '"')) == []


@pytest.mark.parametrize("program", [chat, serve])
def test_the_first_flags_come_first_and_none_twice(program: Any) -> None:
    parser = program.build_parser()
    text = parser.format_help()
    assert text.index("most used:") < text.index("--dtype")
    for name in (name for action in parser._actions for name in action.option_strings if name.startswith("--")):
        heads = [line for line in text.splitlines() if re.match(rf"  (?:\S.*, )?{name}(?![\w-])", line)]
        assert len(heads) == 1, name


def test_the_short_help_of_training_names_flags_that_exist() -> None:
    from llava.train.arguments import build_parser

    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert {f"--{flag}" for flag in FIRST_FLAGS} <= known
    assert all(f"--{flag} " in short_help("llava train") for flag in FIRST_FLAGS)


# The configuration file


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/someone")
    return tmp_path / "llava.toml"


def test_a_file_has_defaults_for_chat_and_serve(config: Path) -> None:
    words: Any
    assert chat.build_parser().parse_args([]).temperature == 0.0
    config.write_text(
        '[chat]\ntemperature = 1\nmodel-path = "~/models/x"\nquiet = true\nload-4bit = true\n'
        '[serve]\nmodel = "y"\nport = 9000\nallow-origin = ["https://a.example", "https://b.example"]\nload_8bit = true\n'
    )
    read = chat.build_parser().parse_args([])
    assert (read.temperature, read.model_path, read.quiet, read.load_4bit) == (
        1.0,
        "/home/someone/models/x",
        True,
        True,
    )
    assert isinstance(read.temperature, float)
    read = chat.build_parser().parse_args(["--temperature", "0.5", "-m", "z", "--load-8bit"])
    assert (read.temperature, read.model_path, read.load_8bit, read.load_4bit) == (0.5, "z", True, False)
    read = serve.build_parser().parse_args([])
    assert (read.model, read.port, read.load_8bit) == ("y", 9000, True)
    assert read.allow_origin == ["https://a.example", "https://b.example"]
    assert serve.build_parser().parse_args(["own"]).model == "own"
    other = config.with_name("other.toml")
    other.write_text("[chat]\nseed = 3\n")
    for words in (["--config", str(other)], [f"--config={other}"]):
        read = chat.build_parser().parse_args(words)
        assert (read.seed, read.temperature) == (3, 0.0)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("[chat]\ntemperatur = 1", "did you mean 'temperature'"),
        ('[chat]\ntemperature = "hot"', "give a number"),
        ("[chat]\nmax-new-tokens = 1.5", "give a whole number"),
        ("[chat]\nmax-new-tokens = true", "give a whole number"),
        ("[chat]\nquiet = 1", "give true or false"),
        ('[chat]\nshow-images = "big"', "one of auto, kitty"),
        ('[chat]\nwords = "x"', "no flag"),
        ("temperature = 1", "put it below [chat]"),
        ("[chta]\na = 1", "did you mean 'chat'"),
        ("[chat", "cannot be read"),
        ("[chat]\nmodel-path = ['a']", "give a text"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    config: Path, content: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        chat.build_parser().parse_args([])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert word in message
    assert str(config) in message
    assert message.count("\n") == 1
    assert chat.build_parser().format_help()  # help is shown whatever the file holds


def test_a_file_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chat.build_parser().parse_args(["--config", str(tmp_path / "none.toml")])
    assert "none.toml" in capsys.readouterr().err


# Completion


@pytest.fixture(scope="module")
def programs() -> list[KnownProgram]:
    return find_programs()


def test_completion_knows_every_command_and_flag(programs: list[KnownProgram]) -> None:
    by_name = {program.words: program for program in programs}
    assert {name.split()[0] for name in by_name} == set(COMMANDS)
    parser = serve.build_parser()
    options = {option for action in parser._actions for option in action.option_strings}
    assert {name for flag in by_name["serve"].flags for name in flag.names} == options
    assert by_name["data"].programs == ("check", "show")
    assert by_name["completion"].programs == tuple(SCRIPTS)
    levels = next(flag for flag in by_name["serve"].flags if "--log-level" in flag.names)
    assert levels.choices == ("debug", "info", "warning", "error")
    assert "--learning_rate" in {name for flag in by_name["train"].flags for name in flag.names}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(programs: list[KnownProgram], tmp_path: Path) -> None:
    script = tmp_path / "llava.bash"
    script.write_text(SCRIPTS["bash"](programs))
    asked = {
        "llava|ch": ["chat"],
        "llava|chat|--top": ["--top-p", "--top-k"],
        "llava|serve|--log-level|": ["debug", "info", "warning", "error"],
        "llava|eval|": ["score", "compare", "report", "list"],
        "llava|eval|score|--ans": ["--answers"],
        "llava|data|check|--wor": ["--workers"],
        "llava|serve|--api-key-file|k": [],
        "llava|completion|": list(SCRIPTS),
        "llava|nothing|--x": [],
    }
    lines = [f"source {script}"]
    for words in asked:
        quoted = " ".join(f"'{word}'" for word in words.split("|"))
        lines.append(
            f'COMP_WORDS=({quoted}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); COMPREPLY=(); _llava; echo "${{COMPREPLY[*]}}"'
        )
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert [line.split() for line in done.stdout.splitlines()] == list(asked.values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_of_their_shell(programs: list[KnownProgram], shell: str, tmp_path: Path) -> None:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell](programs))
    assert subprocess.run([path, "-n", str(script)], capture_output=True, text=True, check=False).stderr == ""
