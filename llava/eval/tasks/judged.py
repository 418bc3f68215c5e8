"""LLaVA-Bench-in-the-Wild and MM-Vet: free-form answers that a language model judges.

The questions are read and the judge's verdicts are scored here; the judge is asked by eval/harness/judge.py. Files of
verdicts, those of this package and the official ones, are scored without a judge.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import (
    Faults,
    find_file,
    find_optional,
    need,
    read_json_lines,
    read_json_object,
    read_text,
    write_json,
)
from llava.eval.metrics.gpt_review import NO_SCORE, by_category, pair_of, relative_scores
from llava.eval.tasks.short import read_questions
from llava.eval.tasks.task import Task, unscored
from llava.eval.types import AnsweredQuestion, JsonRow, Question, QuestionId, Scores

ASK_A_JUDGE = (
    "these answers need a judge: give --judge-url and --judge-model, or a file of reviews in place of the answers"
)


def unjudged(answered: Sequence[AnsweredQuestion]) -> Scores:
    return unscored(answered, ASK_A_JUDGE)


# --- LLaVA-Bench ----------------------------------------------------------------------------------------------------


def read_llava_bench(folder: Path) -> list[Question]:
    file = find_file(folder, ("questions.jsonl",), "file of LLaVA-Bench's questions")
    questions = read_questions(file, folder / "images")
    contexts = find_optional(folder, ("context.jsonl",))
    references = find_optional(folder, ("answers_gpt4.jsonl",))
    captions = {row["image"]: row["caption"] for row in read_json_lines(contexts)} if contexts else {}
    texts = {str(row["question_id"]): row["text"] for row in read_json_lines(references)} if references else {}
    return [
        Question(question.id, question.prompt, question.images, question.category, texts.get(str(question.id)),
             extra={**question.extra, "question": question.prompt, "caption": captions.get(question.extra.get("image"))})
        for question in questions
    ]  # fmt: skip


def score_reviews(path: Path, folder: Path, faults: Faults) -> Scores | None:
    """Score a file of reviews, with pairs in `tuple` or `score`; reviews without a pair are counted and left out."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    rows = read_json_lines(path, "file of reviews", faults=faults)
    if not rows or not any("tuple" in row or isinstance(row.get("score"), list) for row in rows):
        return None
    return summarise_reviews(rows, faults)


def summarise_reviews(rows: Sequence[JsonRow], faults: Faults) -> Scores:
    usable = []
    seen = set()
    for row in rows:
        name = repr(row.get("question_id"))
        if pair_of(row) == NO_SCORE:
            faults.add("reviews without scores", "the judge's first line had no two numbers; they are left out", name)
            continue
        if name in seen and "question_id" in row:
            faults.add("repeated reviews", "each of them counts, as in the original's summary", name)
        seen.add(name)
        usable.append(row)
    if not usable:
        raise InputError("none of the reviews has two scores, so there is nothing to summarise")
    groups = {name: relative_scores(pairs) for name, pairs in by_category(usable).items()}
    if not groups["all"]["first"]:
        faults.add("relative scores without meaning", "the first assistant's scores are all 0: they stand as 0", "all")
    figures = groups.pop("all")
    return Scores(figures, groups, headline=figures["relative"])


# --- MM-Vet ---------------------------------------------------------------------------------------------------------


def read_mmvet(folder: Path) -> list[Question]:
    data = find_optional(folder, ("mm-vet.json", "mm-vet/mm-vet.json"))
    truths = read_json_object(data) if data else {}
    file = find_optional(folder, ("llava-mm-vet.jsonl",))
    if file is None and data is None:
        raise InputError(f"MM-Vet is missing: neither llava-mm-vet.jsonl nor mm-vet.json in {str(folder)!r}")
    images = find_optional(folder, ("images", "mm-vet/images")) or folder / "images"
    if file is None:
        asked = [Question(name, row["question"], (images / row["imagename"],)) for name, row in truths.items()]
    else:
        asked = read_questions(file, images)
    found = []
    for question in asked:
        row = truths.get(mmvet_name(question.id), {})
        own = {"question": row.get("question", question.prompt), "capability": row.get("capability", [])}
        extra = {**question.extra, **own}
        found.append(Question(question.id, question.prompt, question.images, "", row.get("answer"), extra=extra))
    return found


def mmvet_name(question_id: QuestionId) -> str:
    """Return the official form of an id: `v1_0` for 0; an id of that form stays."""
    return str(question_id) if str(question_id).startswith("v1_") else f"v1_{question_id}"


def write_mmvet(answered: Sequence[AnsweredQuestion], home: Path, folder: Path) -> Path:
    file = folder / "mm-vet.json"
    write_json(file, {mmvet_name(one.question.id): one.text or "" for one in answered})
    return file


def score_grades(path: Path, folder: Path, faults: Faults) -> Scores | None:
    """Score the official evaluator's grades: {"v1_0": {"model": [...], "content": [...], "score": [...]}, ...}."""
    if path.suffix != ".json" or not path.is_file():
        return None
    text = read_text(path, "file of grades")
    try:
        grades = json.loads(text)
    except ValueError:
        return None
    if (
        not isinstance(grades, dict)
        or not grades
        or not all(isinstance(g, dict) and "score" in g for g in grades.values())
    ):
        return None
    data = read_json_object(find_file(folder, ("mm-vet.json", "mm-vet/mm-vet.json"), "file of MM-Vet's answers"))
    return summarise_grades({name: grade["score"] for name, grade in grades.items()}, data, faults)


def summarise_grades(grades: Mapping[str, Sequence[float]], data: JsonRow, faults: Faults) -> Scores:
    """Average grades in percent: of all, of each capability and of each set of them, over the runs that all questions have."""
    for name in grades:
        if name not in data:
            faults.add("grades of unknown questions", "no such question in mm-vet.json; they count nowhere", repr(name))
    for name in data:
        if name not in grades:
            faults.add("missing grades", "they count as 0", repr(name))
    num_runs = min((len(scores) for name, scores in grades.items() if name in data), default=0)
    if not num_runs:
        raise InputError("no grade belongs to a question of mm-vet.json, so there is nothing to summarise")
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * num_runs)
    counts: dict[str, int] = defaultdict(int)
    for name, row in data.items():
        capabilities = list(dict.fromkeys(need(row, "capability", f"MM-Vet's question {name!r}")))
        groups = [*capabilities, "total"] + (["_".join(sorted(capabilities))] if len(capabilities) > 1 else [])
        for group in groups:
            counts[group] += 1
            for run in range(num_runs):
                sums[group][run] += grades[name][run] if name in grades else 0.0
    means = {group: sum(value / counts[group] * 100 for value in values) / num_runs for group, values in sums.items()}
    categories = {name: {"score": mean, "questions": counts[name]} for name, mean in means.items() if name != "total"}
    verdicts = [sum(grades[name][:num_runs]) / num_runs if name in grades else 0.0 for name in data]
    figures = {"total": means["total"], "questions": counts["total"], "runs": num_runs}
    return Scores(figures, categories, verdicts, headline=means["total"])


LLAVA_BENCH = Task(
    "llava-bench", "LLaVA-Bench-in-the-Wild", "llava-bench-in-the-wild", read_llava_bench, unjudged,
    headline="score relative to the reference", max_new_tokens=1024, score_results=score_reviews, judge="llava-bench",
)  # fmt: skip
MMVET = Task(
    "mmvet", "MM-Vet", "mm-vet", read_mmvet, unjudged,
    headline="mean grade", max_new_tokens=1024, write=write_mmvet, score_results=score_grades, judge="mmvet",
)  # fmt: skip
