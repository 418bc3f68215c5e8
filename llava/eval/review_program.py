"""What the three GPT-review scripts of the original share: their flags, and the run from files to reviews.

In: a command line and the way to an image's description. Out: a file of reviews. The judge is any server with OpenAI's API;
prompts and rows are eval/harness/judge.py's.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.eval.files import need, read_json_lines
from llava.eval.harness.judge import KEY_VARIABLE, Judge, JudgeRequest, comparison, comparison_case, read_rules, review

OPENAI = "https://api.openai.com/v1"


def review_parser(name: str, *, context: bool) -> ArgumentParser:
    parser = ArgumentParser(prog=name, description="Let a language model compare two answers to each question.")
    parser.add_argument("-q", "--question", required=True, help="the questions, JSON lines")
    if context:
        parser.add_argument("-c", "--context", required=True, help="the images in words, JSON lines")
    parser.add_argument("-a", "--answer-list", nargs="+", default=[], help="two files of answers, JSON lines")
    parser.add_argument("-r", "--rule", help="the judge's rules (default: those in the package)")
    parser.add_argument("-o", "--output", required=True, help="the file of reviews; those in it are kept")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, help="maximum number of tokens in a review (default: 1024)"
    )
    add_judge_flags(parser, model="gpt-4-0613")
    return parser


def add_judge_flags(parser: ArgumentParser, *, model: str | None) -> None:
    """Which server judges. With a default model its default is OpenAI's own, else there is no judge unless it is named."""
    url = os.environ.get("OPENAI_BASE_URL", OPENAI) if model else None
    group = parser.add_argument_group(
        "judge", f"any server with OpenAI's API; the key is in {KEY_VARIABLE}; replies are kept"
    )
    group.add_argument(
        "--judge-url", default=url, metavar="URL", help=f"the server, up to /v1 (default: {url or 'none'})"
    )
    group.add_argument("--judge-model", default=model, metavar="NAME", help=f"its model (default: {model or 'none'})")


def run_review(
    args: Namespace, category_of: Callable[[Mapping[str, Any]], str], context_of: Any, default: str | None
) -> None:
    """Review every question. `default` is the rule for categories without one of their own; None refuses them."""
    if len(args.answer_list) != 2:
        raise InputError(f"--answer-list takes two files of answers, and got {len(args.answer_list)}")
    rules = read_rules(Path(args.rule)) if args.rule else read_rules()
    questions = read_json_lines(Path(args.question), "file of questions")
    answers = [read_json_lines(Path(name), "file of answers") for name in args.answer_list]
    for name, rows in zip(args.answer_list, answers, strict=True):
        if len(rows) != len(questions):
            raise InputError(f"{name!r} has {len(rows)} answers for {len(questions)} questions; they go by order")
    cases: list[JudgeRequest] = []
    for number, (question, first, second) in enumerate(zip(questions, *answers, strict=True), start=1):
        name = need(question, "question_id", f"question {number}")
        for file, row in zip(args.answer_list, (first, second), strict=True):
            if row.get("question_id", name) != name:
                raise InputError(
                    f"answer {number} of {file!r} is to {row['question_id']!r}, where question {name!r} stands"
                )
        category = category_of(question)
        rule = rules.get(category) or (rules.get(default) if default else None)
        if rule is None:
            raise InputError(f"the rules have none for the category {category!r}; they have {', '.join(rules)}")
        row = {
            "id": number,
            "question_id": name,
            "answer1_id": first.get("answer_id", name),
            "answer2_id": second.get("answer_id", name),
            "category": category,
        }
        content = comparison(question["text"], [first["text"], second["text"]], rule, context_of(question))
        cases.append(comparison_case(row, content, args.max_tokens))
    review(cases, Judge(args.judge_url, args.judge_model), Path(args.output))


def read_contexts(file: str) -> dict[str, dict[str, Any]]:
    """Descriptions of images by image."""
    return {need(row, "image", file): row for row in read_json_lines(Path(file), "file of descriptions")}


def described(contexts: Mapping[str, Mapping[str, Any]], question: Mapping[str, Any]) -> Mapping[str, Any]:
    image = str(question.get("image"))
    if image not in contexts:
        raise InputError(
            f"the image {image!r} of the question {question['question_id']!r} is not described in --context"
        )
    return contexts[image]
