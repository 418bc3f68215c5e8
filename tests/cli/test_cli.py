"""The original command line: its flags, its choice of template, its prompts and ids, its look, as recorded."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import pytest
from cli_kit import CHECKPOINT, IMAGE, run_llava, run_python
from golden_data import HERE, golden

from llava.conversation import Conversation, conv_mode_for_model_name
from llava.processor import Processor
from llava.serve import cli

RECORDED = json.loads(golden("cli/recorded.json").read_text())
RUNS = RECORDED["runs"]
NAMES = json.loads(golden("model_names.json").read_text())["conv_mode_by_model_name"]


def test_every_recorded_flag_is_there() -> None:
    actions = {action.option_strings[0]: action for action in cli.build_parser()._actions}
    for row in RECORDED["flags"]:
        action = actions[row["flags"][0]]
        assert action.option_strings == row["flags"]
        assert action.dest == row["dest"]
        assert (action.type.__name__ if action.type else None) == row["type"]
        assert action.required == row["required"]
        assert action.choices == row["choices"]
        assert action.nargs == row["nargs"]
        assert type(action).__name__ == f"_{row['action']}Action"
        # The original's default model is a language model that this program cannot use.
        assert action.default == (None if action.dest == "model_path" else row["default"])


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row["model_name"])
def test_template_by_model_name(row: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    inferred = conv_mode_for_model_name(row["model_name"])
    for key, expected in row.items():
        if not key.startswith("cli|--conv-mode="):
            continue
        given = key.removeprefix("cli|--conv-mode=")
        assert cli.choose_conv_mode(None if given == "None" else given, inferred) == expected
        assert capsys.readouterr().out.rstrip("\n") == row.get(f"cli|warning|{given}", "")


def replay(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[tuple[str, list[int]]]:
    """Run a recorded conversation in this process; gives the prompts and ids that reached the model."""
    asked: list[tuple[str, list[int]]] = []
    plain = Processor.encode

    def recording(self: Processor, conversation: Conversation, num_images: int) -> Any:
        ids, labels = plain(self, conversation, num_images)
        asked.append((conversation.get_prompt(), ids))
        return ids, labels

    lines = iter(run["stdin"].splitlines())

    def typed(prompt: str) -> str:
        print(prompt, end="")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Processor, "encode", recording)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.chdir(HERE)
    arguments = vars(cli.build_parser().parse_args(run["args"])) | changes
    assert cli.main(Namespace(**arguments)) == 0
    return asked


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_recorded_conversations(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replay(run, monkeypatch)
    assert len(asked) == len(run["prompts"])
    recorded = run["prompts"][0]
    assert asked[0] == (recorded["prompt"], recorded["ids"])
    for (prompt, _), recorded in zip(asked[1:], run["prompts"][1:], strict=True):
        # Version 4 of transformers put a begin token before an answer, and the original kept its text in the history.
        assert prompt == recorded["prompt"].replace("ASSISTANT: <s>", "ASSISTANT: ")
    shown = capsys.readouterr().out.splitlines()
    expected = run["stdout"].splitlines()
    assert len(shown) == len(expected)
    assert shown[0] == expected[0]  # later answers follow from a history without that token
    assert shown[-1] == expected[-1] == "USER: exit..."
    assert all(line.startswith("USER: ASSISTANT: ") for line in shown[:-1])


def test_debug_shows_prompt_and_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = RUNS[0]
    replay(run | {"stdin": "What is it?\n"}, monkeypatch, debug=True)
    line = next(line for line in capsys.readouterr().out.splitlines() if "'prompt'" in line)
    answer = run["stdout"].splitlines()[0].removeprefix("USER: ASSISTANT: ")
    assert line.strip() == str({"prompt": run["prompts"][0]["prompt"], "outputs": answer})


def test_markup_of_images_and_roles_of_mpt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = RUNS[0] | {"stdin": "Hi\n"}
    (prompt, _), *_ = replay(run, monkeypatch, model_path="checkpoints/llava-v1-tiny-linear")
    assert "USER: <im_start><image><im_end>\nHi ASSISTANT:" in prompt
    capsys.readouterr()
    (prompt, _), *_ = replay(run, monkeypatch, model_path="checkpoints/llava-tiny-mpt")
    assert "<|im_start|>user\n<image>\nHi<|im_end|><|im_start|>assistant\n" in prompt
    assert capsys.readouterr().out.startswith("user: assistant: ")


def test_errors_of_a_call_are_raised_and_of_a_program_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--image-file", "no.png", "--model-path", CHECKPOINT]
    with pytest.raises(ValueError, match=r"no\.png"):
        cli.main(cli.build_parser().parse_args(arguments))
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("llava cli: error: ")


@pytest.mark.parametrize("start", [["-m", "llava.serve.cli"], ["-m", "llava", "cli"]], ids=" ".join)
def test_as_a_program(start: list[str]) -> None:
    arguments = ["--model-path", CHECKPOINT, "--image-file", IMAGE, "--device", "cpu", "--temperature", "0"]
    done = run_python(*start, *arguments, "--max-new-tokens", "8", stdin="What is it?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [RUNS[0]["stdout"].splitlines()[0], "USER: exit..."]


def test_flags_in_any_spelling_that_argparse_takes() -> None:
    assert cli.build_parser().parse_args(["--image-file=a.png", "--temp", "0"]).temperature == 0
    done = run_llava("cli", "--image-file", "a.png", "--temperature", "warm")
    assert done.returncode == 2
    assert "--temperature" in done.stderr
    assert "'warm'" in done.stderr
