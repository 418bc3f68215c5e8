"""Judged tasks against a small server with OpenAI's API: what is asked, kept and replayed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import eval_kit as kit
import pytest
import torch

from llava.errors import InputError
from llava.eval.harness.main import main


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


class FakeJudge(BaseHTTPRequestHandler):
    """Busy at first; then two scores for comparisons and one for grades."""

    def __init__(self, asked: list[dict[str, Any]], *args: Any) -> None:
        self.asked = asked
        super().__init__(*args)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        if len(self.asked) == 1:
            self.send_response(429)
            self.end_headers()
            return
        content = "8 6\nBecause." if len(body["messages"]) == 2 else "0.5"
        reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(FakeJudge, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_once_and_replayed(
    judge: tuple[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, asked = judge
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("llava.eval.harness.judge.time.sleep", lambda seconds: None)
    data, out = tmp_path / "data", tmp_path / "out"
    kit.llava_bench(data)
    kit.mmvet(data)
    for place in ("llava-bench-in-the-wild/images/1.jpg", "mm-vet/images/i.jpg"):
        (data / place).parent.mkdir(parents=True)
        (data / place).write_bytes(kit.png())
    words = [
        "llava-bench,mmvet",
        "--device",
        "cpu",
        "--data-dir",
        str(data),
        "--out",
        str(out),
        "--max-new-tokens",
        "8",
        "-q",
    ]
    assert main([*words, "--judge-url", url, "--judge-model", "some-judge"]) == 0
    assert len(asked) == 1 + 2 + 2
    first, grade = asked[1], asked[3]
    assert (first["path"], first["key"], first["model"]) == ("/v1/chat/completions", "Bearer secret", "some-judge")
    text = kit.rows_of(out / "llava-bench/answers.jsonl")[0]["text"]
    assert first["messages"][1]["content"].startswith(
        f"[Context]\nA red square.\n\n[Question]\nTell 0\n\n[Assistant 1]\nReference 0\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n[System]\nWe would like to request your feedback"
    )
    assert grade["messages"][0]["content"].endswith(
        f"\nWhat? | a <AND> b | {kit.rows_of(out / 'mmvet/answers.jsonl')[0]['text']} | "
    )
    review = kit.rows_of(out / "llava-bench/reviews.jsonl")[0]
    assert (review["content"], review["tuple"], review["judge"]) == ("8 6\nBecause.", [8.0, 6.0], "some-judge")
    values = [task["headline"]["value"] for task in json.loads((out / "results.json").read_text())["tasks"]]
    assert values == [75.0, 50.0]
    assert main(words) == 0  # from the replies that are kept
    assert len(asked) == 5
    assert [task["headline"]["value"] for task in json.loads((out / "results.json").read_text())["tasks"]] == values
    capsys.readouterr()
    reviews = str(out / "llava-bench/reviews.jsonl")
    assert main(["score", "llava-bench", "--answers", reviews, "--data-dir", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["headline"]["value"] == 75.0
    assert "secret" not in (out / "manifest.json").read_text()


def test_the_original_s_review_scripts_ask_the_same_judge(
    judge: tuple[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.eval import eval_gpt_review, eval_gpt_review_bench, eval_gpt_review_visual, qa_baseline_gpt35

    url, asked = judge
    monkeypatch.setattr("llava.eval.harness.judge.time.sleep", lambda seconds: None)
    kit.llava_bench(tmp_path)
    home = tmp_path / "llava-bench-in-the-wild"
    kit.answers(home / "ours.jsonl", {0: "x", 1: "y"}, answer_id="id")
    boxes = {"image": "1.jpg", "captions": ["A square."], "instances": [{"category": "square", "bbox": [0, 0, 1, 1]}]}
    kit.write_lines(home / "boxes.jsonl", [boxes])
    common = ["-q", str(home / "questions.jsonl"), "-a", str(home / "answers_gpt4.jsonl"), str(home / "ours.jsonl")]
    common += ["--judge-url", url, "--judge-model", "j"]
    bench = [*common, "-c", str(home / "context.jsonl"), "-o", str(home / "bench.jsonl")]
    assert eval_gpt_review_bench.main(bench) == 0
    assert list(kit.rows_of(home / "bench.jsonl")[0]) == [
        "id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple", "judge", "prompt_sha256",
    ]  # fmt: skip
    assert kit.rows_of(home / "bench.jsonl")[0]["category"] == "llava_bench_conv"
    number = len(asked)
    assert eval_gpt_review_bench.main(bench) == 0  # nothing is asked twice
    assert len(asked) == number
    assert (
        eval_gpt_review_visual.main([*common, "-c", str(home / "boxes.jsonl"), "-o", str(home / "visual.jsonl")]) == 0
    )
    assert asked[-1]["messages"][1]["content"].startswith(
        "[Context]\nA square.\n\nsquare: [0, 0, 1, 1]\n\n[Question]\n"
    )
    assert eval_gpt_review.main([*common, "-o", str(home / "text.jsonl")]) == 0
    assert asked[-1]["messages"][1]["content"].startswith("[Question]\nTell 1\n\n[Assistant 1]\nReference 1\n\n")
    assert qa_baseline_gpt35.main([*common[:2], "-o", str(home / "qa.jsonl"), *common[5:]]) == 0
    assert [row["question_id"] for row in kit.rows_of(home / "qa.jsonl")] == [0, 1]


def test_a_judge_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.eval.harness import judge

    monkeypatch.setattr(judge, "NUM_TRIES", 1)
    with pytest.raises(InputError, match=r"did not answer in 1 tries"):
        judge.Judge("http://127.0.0.1:9/v1", "m").reply([], max_tokens=1, temperature=0)
