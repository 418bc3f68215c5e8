"""lmms-eval's `llava` model class, unchanged, on this package: its answers and log-likelihoods, compared with the engine's.

In: a Python with lmms-eval, torch and this package. Out: a table: for generation at batch sizes 1 and 4 how many answers are
equal, for log-likelihoods the largest difference (results/lmms_eval.md). The task is made from the embedded model's held-out
questions.

    python -m venv .lmms && .lmms/bin/pip install -c constraints.txt . datasets evaluate loguru pytz sacrebleu tenacity
    .lmms/bin/pip install --no-deps lmms_eval && .lmms/bin/python -m benchmarks.eval.lmms_eval
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.measure import add_output

DATA = ROOT / "playground" / "data" / "eval" / "tiny"
TEMPLATE = "v1"
MAX_NEW_TOKENS = 24
# A task of lmms-eval: `!function` names are looked up in the module beside the file.
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function images.open_images
doc_to_text: !function images.question
doc_to_target: answer
process_results: !function images.keep
metric_list: [{{metric: kept, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
lmms_eval_specific_kwargs: {{default: {{}}}}
"""
MODULE = """\
from PIL import Image
from benchmarks import ROOT
from benchmarks.measure import add_output

def open_images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def keep(doc, results):
    return {"kept": 1.0}
"""


def read_rows(limit: int) -> list[dict[str, Any]]:
    rows = []
    for name in ("scenes", "reading", "yes_no"):
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
        rows += [{**row, "image": str(DATA / row["image"])} for row in map(json.loads, lines)]
    return rows


def run_lmms_eval(folder: Path, rows: Sequence[dict[str, Any]], kind: str, batch_size: int) -> list[str]:
    """Return what the class gives for every row, in their order, as lmms-eval records it."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from llava.assets import embedded_model_path

    name = f"tiny_{kind}"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "images.py").write_text(MODULE)
    text = TASK.format(name=name, rows=folder / "rows.jsonl", kind=kind, tokens=MAX_NEW_TOKENS)
    (folder / f"{name}.yaml").write_text(text)
    found = evaluator.simple_evaluate(
        model="llava",
        model_args=f"pretrained={embedded_model_path()},device_map=auto,conv_template={TEMPLATE}",
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        log_samples=True,
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def our_answers(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[float]]:
    """Return the engine's answers, and the mean negative log-likelihoods of the right ones, end token included."""
    from PIL import Image

    from llava.assets import embedded_model_path
    from llava.engine.engine import Engine
    from llava.engine.request import Request, SamplingParams, ScoreRequest
    from llava.eval.harness.client import question_conversation
    from llava.model.builder import load

    loaded = load(embedded_model_path(), device="cpu")
    answers, losses = [], []
    with Engine.from_loaded(loaded) as engine:
        images = [Image.open(row["image"]).convert("RGB") for row in rows]
        asked = [question_conversation(TEMPLATE, row["question"], 1, "<image>") for row in rows]
        params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
        results = engine.generate([Request(c, [p], params) for c, p in zip(asked, images, strict=True)])
        answers = [result.text for result in results]
        scores = []
        for row, conversation, image in zip(rows, asked, images, strict=True):
            context = conversation.get_prompt()
            conversation.messages[-1][1] = row["answer"]
            scores.append(ScoreRequest(context, conversation.get_prompt().removeprefix(context), [image]))
        losses = [-score.total_logprob / len(score.logprobs) for score in engine.score(scores)]
    return answers, losses


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=20, help="questions of each of the three kinds (default: 20)")
    add_output(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    rows = read_rows(args.limit)
    answers, losses = our_answers(rows)
    lines = [
        f"lmms-eval {version('lmms_eval')}, its `llava` class unchanged; torch {version('torch')}, transformers "
        f"{version('transformers')}, {platform.machine()} CPU; {len(rows)} questions of the embedded model's held-out suite",
        "",
        "| what | batch size | compared with the engine |",
        "|---|---:|---|",
    ]
    failed = False
    for batch_size in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            theirs = run_lmms_eval(Path(folder), rows, "generate_until", batch_size)
        same = sum(a.strip() == b.strip() for a, b in zip(theirs, answers, strict=True))
        failed |= same < len(rows)
        lines.append(f"| generation | {batch_size} | {same} of {len(rows)} answers are the same |")
    with tempfile.TemporaryDirectory() as folder:
        theirs = run_lmms_eval(Path(folder), rows, "loglikelihood", 1)
    largest = max(abs(ast.literal_eval(reply)[0] - ours) for reply, ours in zip(theirs, losses, strict=True))
    failed |= largest > 0.01
    lines.append(
        f"| log-likelihood | 1 | largest difference of a mean over tokens {largest:.1e} (the class rounds pixels to fp16) |"
    )
    print("\n".join(lines))
    if args.output is not None:
        args.output.write_text(
            "\n".join(["# lmms-eval's LLaVA class on this package", "", *lines]) + "\n", encoding="utf-8"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
