"""The original's scoring scripts and converters against recordings of it: arguments, exit status, output, files."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_kit import load_script
from golden_data import HERE, golden

ROOT = HERE.parents[1]
RECORDED = json.loads(golden("eval.json").read_text(encoding="utf-8"))
RUNS = {run["name"]: run for run in RECORDED["runs"] if isinstance(run["inputs"], dict)}
FLAGS = json.loads(golden("eval_flags.json").read_text(encoding="utf-8"))
# Where the original ends with a Python error, ours goes on or says why not.
CURED = {"sqa_no_images", "seed"}
REFUSED = {"pope_bad_file", "textvqa_bad_prompt", "vizwiz_missing", "seed_missing"}


def write_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    for name, content in inputs.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(json.dumps, content)) + "\n" if isinstance(content, list) else json.dumps(content)
        file.write_text(text, encoding="utf-8")


@pytest.fixture
def run_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    def run(name: str) -> tuple[int, str, str]:
        recorded = RUNS[name]
        write_inputs(tmp_path, recorded["inputs"])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [recorded["script"], *recorded["args"]])
        status = load_script(recorded["script"]).main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def sections(text: str) -> list[str]:
    """POPE's report by split; the original prints them in the order of the folder."""
    return sorted(text.split("====================================\n"))


@pytest.mark.parametrize("name", [name for name in RUNS if name not in CURED | REFUSED])
def test_same_output_as_recorded(
    name: str, run_recorded: Callable[[str], tuple[int, str, str]], tmp_path: Path
) -> None:
    status, out, _ = run_recorded(name)
    recorded = RUNS[name]
    assert status == recorded["returncode"] == 0
    assert sections(out) == sections(recorded["stdout"]) if name == "pope" else out == recorded["stdout"]
    for file, content in recorded["outputs"].items():
        text = (tmp_path / file).read_text(encoding="utf-8")
        if isinstance(content, list) and file.endswith(".jsonl"):
            assert [json.loads(line) for line in text.splitlines()] == content
        else:
            assert json.loads(text) == content


def test_scienceqa_without_images_is_scored(run_recorded: Any, tmp_path: Path) -> None:
    status, out, _ = run_recorded("sqa_no_images")
    assert status == 0
    assert out == "Total: 2, Correct: 2, Accuracy: 100.00%, IMG-Accuracy: none (no question has an image)\n"
    assert json.loads((tmp_path / "or.json").read_text())["results"] == {"1": 0, "2": 1}


def test_seed_with_a_type_never_right_is_scored(run_recorded: Any, tmp_path: Path) -> None:
    status, out, _ = run_recorded("seed")
    recorded = RUNS["seed"]["stdout"]
    assert status == 0
    assert out == recorded + "video accuracy: 0.00%\n"
    assert len((tmp_path / "u.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("pope_bad_file", "coco_pope_SPLIT.json"),
        ("textvqa_bad_prompt", "'one line'"),
        ("vizwiz_missing", "2 of 4 are not, the first is 2"),
        ("seed_missing", "1 of 9 questions have no answer (the first is '108')"),
    ],
)
def test_what_the_original_ends_with_an_error_is_refused_in_a_sentence(
    name: str, named: str, run_recorded: Any
) -> None:
    status, out, err = run_recorded(name)
    assert status == 2
    assert err.count("\n") == 1
    assert named in err
    if name in ("vizwiz_missing", "seed_missing"):
        assert out == RUNS[name]["stdout"]


@pytest.mark.parametrize("script", sorted(FLAGS))
def test_every_recorded_flag_is_accepted(script: str) -> None:
    if script == "scripts/convert_sqa_to_llava.py":
        pytest.skip("the original's flags come from python-fire; test_same_output_as_recorded runs it")
    parser = load_script(script).build_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    for recorded in FLAGS[script]:
        for flag in recorded["flags"]:
            assert flag in actions, flag
        action = actions[recorded["flags"][0]]
        assert action.dest == recorded["dest"]
        assert action.nargs == recorded["nargs"]
        if recorded["default"] not in (None, "facebook/opt-350m"):
            assert action.default == recorded["default"]


# Units


@pytest.mark.parametrize("row", RECORDED["answer_processor"], ids=lambda row: repr(row["in"])[:30])
def test_normalisation(row: dict[str, str]) -> None:
    from llava.eval.m4c_evaluator import EvalAIAnswerProcessor

    assert EvalAIAnswerProcessor()(row["in"]) == row["out"]


@pytest.mark.parametrize("row", RECORDED["answer_processor_stages"], ids=lambda row: repr(row["in"])[:30])
def test_normalisation_by_stages(row: dict[str, str]) -> None:
    from llava.eval.m4c_evaluator import EvalAIAnswerProcessor

    processor = EvalAIAnswerProcessor()
    assert processor.word_tokenize(row["in"]) == row["word_tokenize"]
    assert processor.process_punctuation(row["in"]) == row["punct"]
    assert processor.process_digit_article(row["in"]) == row["digit_article"]


def test_the_quirk_of_full_stops_is_behind_a_switch() -> None:
    from llava.eval.metrics.vqa import normalise

    assert normalise("x" + "." * 40) == "x" + "." * 8  # as the official code
    assert normalise("x" + "." * 40, strict=False) == "x"
    assert normalise("1,000/b", strict=False) == normalise("1,000/b") == "1000 b"


def test_people_s_votes() -> None:
    from llava.errors import InputError
    from llava.eval.metrics.vqa import answer_scores

    for row in RECORDED["textvqa_answer_scores"]:
        assert answer_scores(row["answers"]) == row["scores"]
    with pytest.raises(InputError, match="10 people"):
        answer_scores(["x"] * 9)


def test_stvqa_and_anls() -> None:
    from llava.eval import m4c_evaluator

    recorded = RECORDED["stvqa"]
    assert m4c_evaluator.TextVQAAccuracyEvaluator().eval_pred_list(recorded["in"]) == recorded["textvqa"]
    assert m4c_evaluator.STVQAAccuracyEvaluator().eval_pred_list(recorded["in"]) == recorded["stvqa_accuracy"]
    evaluator = m4c_evaluator.STVQAANLSEvaluator()
    assert evaluator.eval_pred_list(recorded["in"]) == recorded["anls"]
    for row in recorded["anls_units"]:
        assert evaluator.get_anls(row["a"], row["b"]) == row["anls"]
    assert evaluator.get_anls("", "") == 1.0  # the original divides by zero


@pytest.mark.parametrize("row", RECORDED["parse_score"], ids=lambda row: repr(row["in"])[:30])
def test_judges_scores(row: dict[str, Any]) -> None:
    from llava.eval.metrics.gpt_review import parse_score

    assert list(parse_score(row["in"])) == row["out"]


def test_repeated_and_failed_reviews_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llava.eval import summarize_gpt_review

    rows = [{"question_id": n, "category": "conv", "tuple": pair} for n, pair in enumerate([[8, 4], [-1, -1], [0, 0]])]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    assert summarize_gpt_review.main(["-f", str(tmp_path / "r.jsonl")]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1] == "all 50.0 40.0 20.0"
    assert re.search(r"1 reviews without scores \(first: 1\)", printed.err)
    assert "1 broken lines" in printed.err
    assert summarize_gpt_review.main(["-f", str(tmp_path / "r.jsonl"), "--count-failed"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "all 42.9 23.3 10.0"
