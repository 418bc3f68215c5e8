"""The original's answering scripts: prompts, ids and answer rows as recorded, batched or not."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import eval_kit as kit
import pytest
import torch
from eval_kit import load_script
from golden_data import HERE, golden

RUNS = {run["name"]: run for run in json.loads(golden("script_runs.json").read_text(encoding="utf-8"))}
IMAGES = ["grad_64x48.png", "noise_40x90.png", "checker_233x700.png", "grad_64x48.png", "noise_40x90.png"]
QUESTIONS = ["What color is it?", "Read the text.\nAnswer briefly.", "你好?", "Is it RGBA?", "Gray?"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recorded checkpoints and images in it, and questions in each script's form."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints", "images"):
        (tmp_path / name).symlink_to(HERE / name)
    rows = [{"question_id": 10 + n, "image": IMAGES[n], "text": text} for n, text in enumerate(QUESTIONS)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    samples = [
        {"id": "7", "image": IMAGES[0], "conversations": [{"from": "human", "value": "<image>\nWith one"}]},
        {"id": "8", "conversations": [{"from": "human", "value": "Text only question"}]},
        {"id": "9", "image": IMAGES[1], "conversations": [{"from": "human", "value": "With another\n<image>"}]},
    ]
    (tmp_path / "s.json").write_text(json.dumps(samples))
    image = base64.b64encode((HERE / "images" / IMAGES[0]).read_bytes()).decode()
    table = "index\tquestion\thint\tA\tB\tC\tD\timage\n" + "".join(
        f"{n}\tWhich one?\tA hint here\tred\tblue\tgreen\t\t{image}\n" for n in (1, 2, 3)
    )
    (tmp_path / "mb.tsv").write_text(table)
    return tmp_path


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every prompt that is turned into ids, with the ids; each once, since the first is also measured."""
    from llava.conversation import Conversation
    from llava.processor import Processor

    seen: list[dict[str, Any]] = []
    encode, encode_ids = Processor.encode, Processor.encode_ids

    def record(conversation: Any, ids: list[int]) -> None:
        text = conversation.get_prompt() if isinstance(conversation, Conversation) else conversation
        row = {"prompt": text, "ids": list(ids)}
        seen.extend([] if row in seen else [row])

    def watched(self: Processor, conversation: Any, num_images: int) -> Any:
        ids, labels = encode(self, conversation, num_images)
        record(conversation, ids)
        return ids, labels

    def watched_ids(self: Processor, conversation: Any, num_images: int) -> Any:
        ids = encode_ids(self, conversation, num_images)
        record(conversation, ids)
        return ids

    monkeypatch.setattr(Processor, "encode", watched)
    monkeypatch.setattr(Processor, "encode_ids", watched_ids)
    return seen


def run(name: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    recorded = RUNS[name]
    monkeypatch.setattr(sys, "argv", [recorded["script"], *recorded["args"], "--device", "cpu", *more])
    return load_script(recorded["script"]).main()


@pytest.mark.parametrize("name", ["loader", "loader anyres", "vqa", "science text-only", "mmbench"])
def test_prompts_and_rows_are_those_recorded(
    name: str, workplace: Path, prompts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.eval.model_vqa.FREE_TOKENS", 8)
    monkeypatch.setattr("llava.eval.model_vqa_science.FREE_TOKENS", 8)
    monkeypatch.setattr("llava.eval.model_vqa_mmbench.FREE_TOKENS", 8)
    assert run(name, monkeypatch) == 0
    recorded = RUNS[name]
    order = [row["prompt"] for row in recorded["prompts"]]
    assert sorted(prompts, key=lambda row: order.index(row["prompt"])) == recorded["prompts"]
    rows = kit.rows_of(workplace / "o/a.jsonl")
    assert [list(row) for row in rows] == [list(row) for row in recorded["answers"]]
    for row, expected in zip(rows, recorded["answers"], strict=True):
        assert re.fullmatch(r"[2-9A-HJ-NP-Za-km-z]{22}", row.pop("answer_id"))
        assert isinstance(row.pop("text"), str)
        assert row == {key: value for key, value in expected.items() if key not in ("answer_id", "text")}


@pytest.mark.parametrize("name", ["run_llava one", "run_llava custom sep", "run_llava conv override"])
def test_run_llava_asks_as_recorded(
    name: str,
    workplace: Path,
    prompts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(name, monkeypatch) == 0
    assert prompts == RUNS[name]["prompts"]
    warnings = [line for line in RUNS[name]["stdout"].splitlines() if line.startswith("[WARNING]")]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("[WARNING]")] == warnings


def test_more_chunks_than_the_original_could_make(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five questions in four chunks: the original ends with an IndexError at the last one."""
    name = "loader chunk 3 of 4 (empty-ish)"
    assert run(name, monkeypatch) == 0
    assert [row["question_id"] for row in kit.rows_of(workplace / "o/a.jsonl")] == [13, 14]


@pytest.mark.parametrize("num_items", range(12))
@pytest.mark.parametrize("num_chunks", [1, 3, 4, 7])
def test_chunks_lose_nothing(num_items: int, num_chunks: int) -> None:
    from llava.eval.harness.answer_file import get_chunk, split_list

    chunks = split_list(range(num_items), num_chunks)
    assert len(chunks) == num_chunks
    assert [question for chunk in chunks for question in chunk] == list(range(num_items))
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1
    assert chunks == [get_chunk(range(num_items), num_chunks, index) for index in range(num_chunks)]


def test_chunks_and_beams_give_the_answers_of_one_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched by the engine, in two chunks, and one by one through `generate`: the same greedy answers."""
    from llava.engine import selection

    assert run("loader", monkeypatch) == 0
    whole = kit.rows_of(workplace / "o/a.jsonl")
    parts = []
    for index in ("0", "1"):
        assert run("loader", monkeypatch, "--num-chunks", "2", "--chunk-idx", index) == 0
        parts += kit.rows_of(workplace / "o/a.jsonl")
    assert parts == whole
    monkeypatch.setattr(selection, "unsupported_reason", lambda model: "this test wants model.generate")
    assert run("loader", monkeypatch) == 0
    assert kit.rows_of(workplace / "o/a.jsonl") == whole


def test_every_order_of_options(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.eval.model_vqa_mmbench.FREE_TOKENS", 2)
    assert run("mmbench", monkeypatch, "--all-rounds") == 0
    rows = kit.rows_of(workplace / "o/a.jsonl")
    assert [(row["question_id"], row["round_id"]) for row in rows] == [(1, 0), (1, 1), (1, 2)]
    assert [row["options"] for row in rows][1] == ["blue", "green", "red"]
    assert [row["option_char"] for row in rows][1] == ["B", "C", "A"]
    assert rows[1]["prompt"].endswith("A. blue\nB. green\nC. red")


def test_model_qa_answers_text(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.eval import model_qa

    monkeypatch.setattr(model_qa, "FREE_TOKENS", 4)
    (workplace / "t.jsonl").write_text(json.dumps({"question_id": 1, "text": "Hello?", "category": "generic"}) + "\n")
    flags = ["--model-name", "checkpoints/vicuna-tiny-base", "--question-file", "t.jsonl", "--answers-file", "t.out"]
    assert model_qa.main([*flags, "--device", "cpu"]) == 0
    (row,) = kit.rows_of(workplace / "t.out")
    assert (row["question_id"], row["model_id"]) == (1, "vicuna-tiny-base")


def test_qbench_questions_come_back_with_responses(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.eval import model_vqa_qbench

    monkeypatch.setattr(model_vqa_qbench, "FREE_TOKENS", 4)
    question = {"img_path": IMAGES[0], "question": "Is it sharp?", "candidates": ["Yes", "No"], "correct_ans": "Yes"}
    (workplace / "qb.json").write_text(json.dumps([question]))
    flags = ["--model-path", "checkpoints/llava-v1.5-tiny-vicuna", "--image-folder", "images/", "--device", "cpu"]
    assert model_vqa_qbench.main([*flags, "--questions-file", "qb.json", "--answers-file", "qb.out"]) == 0
    (row,) = kit.rows_of(workplace / "qb.out")
    assert isinstance(row.pop("response"), str)
    assert row == question


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-chunks", "2", "--chunk-idx", "2"], "0 to 1"),
        (["--image-folder", "nowhere"], "3 images of the questions are missing; the first is"),
        (["--question-file", "none.jsonl"], "'none.jsonl'"),
        (["--conv-mode", "vicuna"], "'vicuna'"),
    ],
)
def test_bad_input_is_one_sentence(
    flags: list[str], named: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("loader", monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_a_broken_image_leaves_the_other_answers(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = workplace / "mine"
    images.mkdir()
    for name in set(IMAGES):
        (images / name).write_bytes((HERE / "images" / name).read_bytes())
    (images / IMAGES[2]).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert run("loader", monkeypatch, "--image-folder", "mine") == 2
    assert "1 of 5 questions could not be asked; the first is 12" in capsys.readouterr().err
    assert [row["question_id"] for row in kit.rows_of(workplace / "o/a.jsonl")] == [10, 11, 13, 14]
