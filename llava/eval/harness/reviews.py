"""Let a judge compare two files of answers, as the three GPT-review scripts of the original do.

In: the words of a command line. Out: a file of reviews. The scripts are eval_gpt_review*.py; which rules and which
description of an image each of them gives to the judge is in the table `REVIEWS`. Prompts and rows are judge.py's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import need, read_json_lines
from llava.eval.harness.judge import Judge, JudgeRequest, comparison, comparison_request, read_rules, review
from llava.eval.types import JsonRow


def _caption(row: JsonRow) -> str:
    caption = row["caption"]
    return "\n".join(caption) if isinstance(caption, list) else caption


def _captions_and_boxes(row: JsonRow) -> str:
    boxes = "\n".join(f"{thing['category']}: {thing['bbox']}" for thing in row["instances"])
    return "\n".join(row["captions"]) + f"\n\n{boxes}"


@dataclass(frozen=True)
class ReviewKind:
    """What a review script gives to the judge beside question and answers."""

    describe: Callable[[JsonRow], str] | None = None  # an image in words, out of its row of --context
    category: str = "{category}"  # the rule's name, out of the question's category
    other: str | None = None  # the rule for categories without one; None: they are refused


REVIEWS = {
    "eval_gpt_review": ReviewKind(other="default"),
    "eval_gpt_review_bench": ReviewKind(_caption, "llava_bench_{category}"),
    "eval_gpt_review_visual": ReviewKind(_captions_and_boxes),
}


def review_files(args: Namespace, kind: ReviewKind) -> None:
    """Review every question of `args.question` into the file `args.output`.

    Raises:
        InputError: the two files of answers do not go with the questions, line by line; an image is not described; or no
            rule fits a category.
    """
    if len(args.answer_list) != 2:
        raise InputError(f"--answer-list takes two files of answers, and got {len(args.answer_list)}")
    contexts = {}
    if kind.describe is not None:
        rows = read_json_lines(Path(args.context), "file of descriptions")
        contexts = {need(row, "image", args.context): row for row in rows}
    rules = read_rules(Path(args.rule)) if args.rule else read_rules()
    questions = read_json_lines(Path(args.question), "file of questions")
    answers = [read_json_lines(Path(name), "file of answers") for name in args.answer_list]
    for name, rows in zip(args.answer_list, answers, strict=True):
        if len(rows) != len(questions):
            raise InputError(f"{name!r} has {len(rows)} answers for {len(questions)} questions; they go by order")
    requests: list[JudgeRequest] = []
    for number, (question, first, second) in enumerate(zip(questions, *answers, strict=True), start=1):
        name = need(question, "question_id", f"question {number}")
        for file, row in zip(args.answer_list, (first, second), strict=True):
            if row.get("question_id", name) != name:
                given = row["question_id"]
                raise InputError(f"answer {number} of {file!r} is to {given!r}, where question {name!r} stands")
        category = kind.category.format_map(question)
        rule = rules.get(category) or rules.get(kind.other or "")
        if rule is None:
            raise InputError(f"the rules have none for the category {category!r}; they have {', '.join(rules)}")
        row = {
            "id": number,
            "question_id": name,
            "answer1_id": first.get("answer_id", name),
            "answer2_id": second.get("answer_id", name),
            "category": category,
        }
        context = None if kind.describe is None else kind.describe(_row_of_image(contexts, question))
        content = comparison(question["text"], [first["text"], second["text"]], rule, context)
        requests.append(comparison_request(row, content, args.max_tokens))
    review(requests, Judge(args.judge_url, args.judge_model), Path(args.output))


def _row_of_image(contexts: Mapping[str, JsonRow], question: JsonRow) -> JsonRow:
    image = str(question.get("image"))
    if image not in contexts:
        raise InputError(f"the image {image!r} of question {question['question_id']!r} is not described in --context")
    return contexts[image]
