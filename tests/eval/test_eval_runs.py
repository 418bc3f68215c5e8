"""`llava eval` from questions to a report: shards, kills, resuming, judges, comparison, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import eval_kit as kit
import pytest
import torch

from llava.eval.harness import runner
from llava.eval.harness.main import main

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "playground" / "data" / "eval"
DRAWN = "tiny-scenes,tiny-reading,tiny-yes-no"
LIMIT = "12"


def flags(out: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--data-dir", str(DATA), "--out", str(out), "--limit", LIMIT, "--quiet", *more]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three tasks, in one process."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main([DRAWN, *flags(out)]) == 0
    return out


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_answers_results_and_a_manifest(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    manifest = json.loads((finished / "manifest.json").read_text())
    assert [task["task"] for task in results["tasks"]] == DRAWN.split(",")
    assert results["tasks"][0]["headline"]["value"] > 80  # the model knows its colours
    assert manifest["template"] == "v1"
    assert set(manifest["settings"]["prompts"]) == set(DRAWN.split(","))
    assert re.fullmatch("[0-9a-f]{64}", manifest["settings"]["model"]["hash"])
    assert {"python", "llava", "torch", "transformers"} <= set(manifest["versions"])
    rows = kit.rows_of(finished / "tiny-scenes/answers.jsonl")
    assert [row["question_id"] for row in rows] == [
        row["question_id"] for row in kit.rows_of(DATA / "tiny/scenes.jsonl")
    ][: int(LIMIT)]
    assert "| Drawn scenes | match, % |" in (finished / "results.md").read_text()


def test_a_finished_run_is_scored_again_without_the_model(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded, though every question is answered")

    before = (finished / "results.json").read_text()
    monkeypatch.setattr("llava.eval.harness.client.EvalClient.open", fail)
    assert main([DRAWN, *flags(finished)]) == 0
    tasks = [json.loads(text)["tasks"] for text in (before, (finished / "results.json").read_text())]
    assert tasks[0] == tasks[1]


@pytest.mark.slow
def test_shards_give_the_same_files(finished: Path, tmp_path: Path) -> None:
    assert main([DRAWN, *flags(tmp_path, "--shards", "2")]) == 0
    for task in DRAWN.split(","):
        assert (tmp_path / task / "answers.jsonl").read_bytes() == (finished / task / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13])
def test_shares_lose_nothing(count: int) -> None:
    numbered: list[Any] = [(number, None) for number in range(12)]
    parts = [runner.shard_of(numbered, index, count) for index in range(count)]
    assert [pair for part in parts for pair in part] == numbered


KILLED = """\
import os, signal, sys
from llava.eval.harness import answer_log
from llava.eval.harness.main import main

write, written = answer_log.RowWriter.write, []

def dying(self, row):
    write(self, row)
    written.append(row)
    if len(written) == 7:
        self._out.write('{"question_id": "half a li')
        self._out.flush()
        os.kill(os.getpid(), signal.SIGKILL)

answer_log.RowWriter.write = dying
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_without_repeating_or_losing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED, DRAWN, *flags(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    part = tmp_path / "tiny-scenes/parts/0.jsonl"
    assert part.read_bytes().count(b"\n") == 7
    assert not part.read_bytes().endswith(b"\n")
    asked = []
    answer = runner.EvalClient._answer_one
    monkeypatch.setattr(
        runner.EvalClient,
        "_answer_one",
        lambda self, question, limit: (asked.append(question.id), answer(self, question, limit))[1],
    )
    assert main([DRAWN, *flags(tmp_path)]) == 0
    assert len(asked) == 3 * int(LIMIT) - 7
    for task in DRAWN.split(","):
        assert (tmp_path / task / "answers.jsonl").read_bytes() == (finished / task / "answers.jsonl").read_bytes()
    assert not part.exists()


def dying_shard(index: int, jobs: Any, missing: Any, settings: Any, events: Any) -> None:
    os._exit(9) if index else events.put(runner.ShardEvent("end", index))


def test_a_shard_that_dies_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "_shard", dying_shard)
    assert main(["tiny-scenes", *flags(tmp_path, "--shards", "2")]) == 2
    assert "process 1 of 2 ended with exit status 9" in capsys.readouterr().err


def test_sampled_answers_do_not_depend_on_what_else_is_asked(tmp_path: Path) -> None:
    sampled = ("--temperature", "1.5")
    assert main(["tiny-reading", *flags(tmp_path / "all", *sampled)]) == 0
    part = flags(tmp_path / "part", *sampled)
    part[part.index(LIMIT)] = "5"
    assert main(["tiny-reading", *part]) == 0
    whole = kit.rows_of(tmp_path / "all/tiny-reading/answers.jsonl")
    assert kit.rows_of(tmp_path / "part/tiny-reading/answers.jsonl") == whole[:5]
    assert main(["tiny-reading", *flags(tmp_path / "other", *sampled, "--seed", "1")]) == 0
    assert kit.rows_of(tmp_path / "other/tiny-reading/answers.jsonl") != whole


# --- what is refused ------------------------------------------------------------------------------------------------


def test_another_run_s_folder_is_not_gone_on_with(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([DRAWN, *flags(finished, "--temperature", "0.5")]) == 2
    assert "sampling.temperature: 0.0 and 0.5" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava.eval.harness.run import locked

    with locked(finished):
        assert main([DRAWN, *flags(finished)]) == 2
    assert "another run is writing to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["popee"], "did you mean 'pope'?"),
        (["tiny-scenes", "--conv-mode", "vicuna"], "'vicuna'"),
        (["tiny-scenes", "--shards", "0"], "shards is 0"),
        (["tiny-scenes", "--judge-model", "x"], "--judge-url and --judge-model go together"),
        (["tiny-scenes", "--data-dir", "/nowhere"], "'/nowhere'"),
        (["tiny-scenes", "--model-path", "/nowhere"], "'/nowhere'"),
        (["tiny-scenes", "--max-tokens", "3"], "unknown flag '--max-tokens'"),
        (["score", "seed", "--answers", "/nowhere"], "'/nowhere'"),
        (["compare", "/nowhere", "/nowhere"], "'/nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(words if words[0] in ("score", "compare") else [words[0], *flags(tmp_path), *words[1:]])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert named in error
    assert error.count("\n") == 1


def test_missing_images_are_named_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    kit.seed(data)
    words = ["seed", "--device", "cpu", "--data-dir", str(data), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 2
    assert f"SEED-Bench: 1 images are missing, the first is '{data}/seed_bench/i.jpg'" in capsys.readouterr().err
    (data / "seed_bench/i.jpg").write_bytes(b"no image")
    assert main(words) == 2
    assert "SEED-Bench: none of its 2 questions could be asked; '100': " in capsys.readouterr().err


def test_a_broken_image_is_counted_and_its_question_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.png").write_bytes(kit.png())
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"image": f"{name}.png", "question": "Which colour?", "answer": "red"} for name in ("good", "bad", "gone")]
    file = kit.write_lines(tmp_path / "mine.jsonl", rows)
    words = [str(file), *flags(tmp_path / "out"), "--data-dir", str(tmp_path)]
    assert main(words) == 2
    assert "1 images are missing" in capsys.readouterr().err
    assert main([*words, "--skip-missing-images"]) == 0
    printed = capsys.readouterr().out
    assert "1 questions without their image (first: 3)" in printed
    assert "1 questions that could not be asked (first: 2: " in printed
    assert "2 missing answers (first: 2): they count as wrong" in printed
    assert kit.rows_of(tmp_path / "out/mine/verdicts.jsonl")[1]["score"] == 0.0


# --- comparison -----------------------------------------------------------------------------------------------------


def changed_copy(finished: Path, folder: Path) -> Path:
    """A run in which three right answers have become wrong."""
    shutil.copytree(finished, folder)
    file = folder / "tiny-yes-no/verdicts.jsonl"
    rows = kit.rows_of(file)
    for row in [row for row in rows if row["score"] == 1][:3]:
        row |= {"score": 0.0, "text": "maybe"}
    kit.write_lines(file, rows)
    return folder


def test_compare_tells_what_changed_and_whether_it_matters(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed_copy(finished, tmp_path / "other")
    capsys.readouterr()
    assert main(["compare", str(finished), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == []
    scenes, _, yes_no = found["tasks"]
    assert (scenes["changed"], scenes["p_value"], scenes["low"], scenes["high"]) == (0, 1.0, 0, 0)
    assert (yes_no["changed"], len(yes_no["lost"]), yes_no["test"]) == (3, 3, "McNemar's exact test")
    assert yes_no["p_value"] == 0.25  # 2 * (1/2)^3
    assert yes_no["second"] - yes_no["first"] == pytest.approx(-25)
    assert main(["compare", str(finished), str(other)]) == 0
    assert "now 'maybe'" in capsys.readouterr().out


def test_significance() -> None:
    from llava.eval.harness.compare import bootstrap_interval, bootstrap_p_value, mcnemar

    assert mcnemar(10, 2) == 2 * (1 + 12 + 66) / 2**12
    assert mcnemar(0, 0) == 1.0
    low, high = bootstrap_interval([0.5] * 40 + [0.0] * 60)
    assert low < 0.2 < high
    assert bootstrap_p_value([0.5] * 40 + [0.0] * 60) < 0.01
    assert bootstrap_p_value([0.5, -0.5] * 30) > 0.5


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_report_needs_nothing_from_outside(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<svg") == 1
    assert "<!--" not in page


def test_the_report_shows_answers_in_a_browser(finished: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}", "--dump-dom",
               (finished / "report.html").as_uri()]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    cards = re.findall(r'<article class="card (right|wrong)">', page)
    scores = [row["score"] for task in DRAWN.split(",") for row in kit.rows_of(finished / task / "verdicts.jsonl")]
    assert len(cards) == len(scores)
    assert cards.count("wrong") == scores.count(0.0)
    assert page.count('<img src="data:image/jpeg;base64,') == len(cards)
    assert f"{len(cards)} of {len(cards)}" in page


def test_the_report_can_be_written_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == before


# --- other evaluators' classes --------------------------------------------------------------------------------------


def test_the_calls_of_vlmevalkit_s_class_give_our_answers(finished: Path) -> None:
    """As its LLaVA class loads, prepares and generates: a config object with one attribute, half precision pixels."""
    import abc

    from PIL import Image

    from llava.assets import embedded_model_path
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import (
        KeywordsStoppingCriteria,
        get_model_name_from_path,
        process_images,
        tokenizer_image_token,
    )
    from llava.model.builder import load_pretrained_model

    path = str(embedded_model_path())
    tokenizer, model, image_processor, _ = load_pretrained_model(
        model_path=path, model_base=None, model_name=get_model_name_from_path(path), device="cpu", device_map="cpu"
    )
    config = abc.abstractproperty()
    config.image_aspect_ratio = "pad"
    questions = {row["question_id"]: row for row in kit.rows_of(DATA / "tiny/scenes.jsonl")}
    for row in kit.rows_of(finished / "tiny-scenes/answers.jsonl")[:4]:
        question = questions[row["question_id"]]
        image = Image.open(DATA / "tiny" / question["image"]).convert("RGB")
        pixels = process_images([image], image_processor, config).to("cpu", dtype=torch.float16)
        prompt = f"USER: <image>\n{question['question']} ASSISTANT:"  # their own is one that this model never saw
        input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        stop = KeywordsStoppingCriteria(["</s>"], tokenizer, input_ids)
        with torch.inference_mode():
            output_ids = model.generate(
                input_ids, images=pixels, stopping_criteria=[stop], do_sample=False, temperature=0, max_new_tokens=16,
                top_p=None, num_beams=1, use_cache=True,
            )  # fmt: skip
        assert tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip() == row["text"]


# --- tables on a page -----------------------------------------------------------------------------------------------


def test_a_table_becomes_a_page(tmp_path: Path) -> None:
    from llava.eval import generate_webpage_data_from_table as program

    questions = [{"question_id": n, "text": f"Question {n}?", "category": "generic"} for n in (1, 2)]
    kit.write_lines(tmp_path / "table/question.jsonl", questions)
    kit.answers(tmp_path / "table/answer/answer_a-7b.jsonl", {1: "</script> A1", 2: "A2"})
    kit.answers(tmp_path / "table/answer/answer_b-7b.jsonl", {1: "B1", 2: "B2"})
    review = {"question_id": 1, "content": "8 6\nAssistant 1 is better.", "tuple": [8, 6]}
    kit.write_lines(tmp_path / "table/review/review_a-7b.jsonl", [review])
    assert program.main(["--table", str(tmp_path / "table"), "--output", str(tmp_path / "web")]) == 0
    data = json.loads((tmp_path / "web/data.json").read_text())
    assert data["questions"][0] == {
        "id": 1,
        "category": "generic",
        "question": "Question 1?",
        "answers": {"a-7b": "</script> A1", "b-7b": "B1"},
        "evaluations": {"a-7b": "**Assistant 1** is better."},
        "scores": {"a-7b": [8.0, 6.0]},
    }
    page = (tmp_path / "web/index.html").read_text()
    assert page.count("</script>") == 2  # an answer cannot end the page's own
