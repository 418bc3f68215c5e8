"""Make a web page of a table of questions, models' answers and reviews.

    python llava/eval/generate_webpage_data_from_table.py --table llava/eval/table --output webpage

Reads `question.jsonl`, `answer/answer_MODEL.jsonl` and, where there are some, `review/review_MODEL_BASELINE.jsonl`. Writes
`data.json` (questions, each with the models' answers, reviews and scores) and `index.html`, which shows them without a server.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from html import escape
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import EvalScript, ScriptFlag, report_faults
from llava.eval.files import Faults, find_optional, need, read_json_lines, write_json
from llava.eval.metrics.gpt_review import NO_SCORE, pair_of
from llava.eval.types import JsonRow, QuestionId
from llava.files import script_json

PAGE = Path(__file__).resolve().parent / "webpage" / "table.html"

FLAGS = (
    ScriptFlag("--table", "folder with question.jsonl and answer/", Path("table")),
    ScriptFlag("--output", "folder to write to", Path("webpage")),
)


def run(args: Namespace) -> None:
    faults = Faults()
    data = collect(args.table, faults)
    write_json(args.output / "data.json", data)
    page = PAGE.read_text(encoding="utf-8").replace("<!--TITLE-->", escape(", ".join(data["models"])))
    (args.output / "index.html").write_text(page.replace("<!--DATA-->", script_json(data)), encoding="utf-8")
    print(f"{len(data['questions'])} questions, {len(data['models'])} models: {args.output / 'index.html'}")
    report_faults(faults)


def collect(table: Path, faults: Faults) -> JsonRow:
    """Gather a table's folder by question."""
    questions = read_json_lines(table / "question.jsonl", "file of questions")
    answers = _by_model(table / "answer", "answer_")
    if not answers:
        raise InputError(f"there are no answers in {str(table / 'answer')!r}: no answer_MODEL.jsonl")
    reviews = _by_model(table / "review", "review_")
    models = find_optional(table, ("model.jsonl",))
    listed = read_json_lines(models) if models else []
    names = {row["model_id"].split(":")[0]: row.get("model_name", row["model_id"]) for row in listed}
    records = []
    for number, question in enumerate(questions, start=1):
        name = need(question, "question_id", f"question {number}")
        record: JsonRow = {
            "id": name,
            "category": question.get("category", ""),
            "question": need(question, "text", f"question {name!r}"),
            "answers": {model: rows[name]["text"] for model, rows in answers.items() if name in rows},
            "evaluations": {},
            "scores": {},
        }
        for model in answers:
            if model not in record["answers"]:
                faults.add("questions without an answer of every model", "the page has a gap", f"{name!r}, {model}")
        for model, rows in reviews.items():
            if name in rows:
                record["evaluations"][model] = review_text(rows[name])
                if pair_of(rows[name]) != NO_SCORE:
                    record["scores"][model] = list(pair_of(rows[name]))
        records.append(record)
    return {"questions": records, "models": {model: names.get(model, model) for model in answers}}


def _by_model(folder: Path, start: str) -> dict[str, dict[QuestionId, JsonRow]]:
    """Read the rows of every `START_MODEL.jsonl`, by question."""
    return {
        file.stem.removeprefix(start): {row["question_id"]: row for row in read_json_lines(file)}
        for file in sorted(folder.glob(f"{start}*.jsonl"))
    }


def review_text(review: JsonRow) -> str:
    """Return a review without its first line, which has the scores, and with the assistants' names in bold."""
    _, _, text = str(review.get("content", review.get("text", ""))).strip().partition("\n")
    return text.strip().replace("Assistant 1", "**Assistant 1**").replace("Assistant 2", "**Assistant 2**")


SCRIPT = EvalScript("generate_webpage_data_from_table.py", "A page of questions and answers.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
