"""ScienceQA: multiple choice questions from school, half of them with an image.

Reads `llava_test_CQM-A.json` (conversations), `problems.json` and `pid_splits.json`, or the latter two alone, from which the
former is made. Scores answers, or the official result file with `outputs` and `results`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.eval.files import find_file, find_optional, need, read_json_object, read_json_rows
from llava.eval.metrics.accuracy import percent
from llava.eval.metrics.choices import LETTERS, science_qa_letter
from llava.eval.tasks.task import LETTER_SUFFIX, Task, accuracy
from llava.eval.types import AnsweredQuestion, JsonRow, Question, Scores

OPTIONS = tuple("ABCDE")
# What stands where in a prompt: question, context, options (the M is for multiple choice), lecture, explanation.
INPUTS = {
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {options}\n",
    "QCM": "Question: {question}\nContext: {context}\nOptions: {options}\n",
    "QCML": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture}\n",
    "QCME": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {solution}\n",
    "QCMLE": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture} {solution}\n",
    "QCLM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture}\nOptions: {options}\n",
    "QCEM": "Question: {question}\nContext: {context}\nBECAUSE: {solution}\nOptions: {options}\n",
    "QCLEM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture} {solution}\nOptions: {options}\n",
}
# AL has the explanation and AE the lecture: the letters are swapped in the published data, which is kept.
OUTPUTS = {
    "A": "Answer: The answer is {answer}.",
    "AL": "Answer: The answer is {answer}. BECAUSE: {solution}",
    "AE": "Answer: The answer is {answer}. BECAUSE: {lecture}",
    "ALE": "Answer: The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "Answer: The answer is {answer}. BECAUSE: {solution} {lecture}",
    "LA": "Answer: {lecture} The answer is {answer}.",
    "EA": "Answer: {solution} The answer is {answer}.",
    "LEA": "Answer: {lecture} {solution} The answer is {answer}.",
    "ELA": "Answer: {solution} {lecture} The answer is {answer}.",
    "LEPA": "{lecture_part}{solution_part}###\nANSWER: {answer}.",
}


def build_exchange(problem: JsonRow, prompt_format: str) -> tuple[str, str]:
    """Format a problem as question and answer, in a format such as QCM-LEA."""
    question, _, answer = prompt_format.partition("-")
    if question not in INPUTS or answer not in OUTPUTS:
        raise InputError(
            f"unknown prompt format {prompt_format!r}; known: one of {', '.join(INPUTS)}, a hyphen, one of {', '.join(OUTPUTS)}"
        )
    lecture, solution = problem["lecture"], problem["solution"]
    parts = {
        "question": problem["question"],
        "context": problem["hint"].strip() or "N/A",
        "options": " ".join(f"({letter}) {text}" for letter, text in zip(OPTIONS, problem["choices"], strict=False)),
        "answer": OPTIONS[problem["answer"]],
        "lecture": lecture,
        "solution": solution,
        "lecture_part": f"LECTURE: {lecture}\n" if lecture.strip() else "",
        "solution_part": f"SOLUTION: {solution}\n" if solution.strip() else "",
    }
    return _tidy(INPUTS[question].format(**parts)), _tidy(OUTPUTS[answer].format(**parts))


def _tidy(text: str) -> str:
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def conversation(name: str, problem: JsonRow, prompt_format: str) -> JsonRow:
    """Format a problem as a training sample of LLaVA."""
    question, answer = build_exchange(problem, prompt_format)
    question = question.replace("Question: ", "") if question.startswith("Question: ") else question
    answer = answer.replace("Answer: ", "") if answer.startswith("Answer: ") else answer
    if problem["image"] is None:
        return {"id": name, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    turns = [{"from": "human", "value": f"{question}\n{DEFAULT_IMAGE_TOKEN}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{name}/{problem['image']}", "conversations": turns}


def read(folder: Path, *, images_only: bool) -> list[Question]:
    problems = read_split(folder, "test")
    file = find_optional(folder, ("llava_test_CQM-A.json",))
    if file is not None:
        rows = read_json_rows(file, "file of ScienceQA's questions")
    else:
        rows = [conversation(name, problem, "CQM-A") for name, problem in problems.items()]
    images = find_optional(folder, ("images/test", "images")) or folder / "images/test"
    questions = questions_from_samples(rows, images, letter=True)
    found = []
    for question in questions:
        problem = problems.get(str(question.id))
        if problem is None:
            raise InputError(f"ScienceQA's question {question.id!r} is not in the split 'test' of pid_splits.json")
        if images_only and not question.images:
            continue
        choices = tuple(problem["choices"])
        found.append(
            Question(question.id, question.prompt, question.images, problem.get("subject", ""), problem["answer"], choices, 0,
                 question.shown_prompt, {"question": problem["question"]})
        )  # fmt: skip
    return found


def read_split(folder: Path, split: str) -> dict[str, JsonRow]:
    """Read the problems of a split, in its order."""
    splits = read_json_object(find_file(folder, ("pid_splits.json",), "list of ScienceQA's splits"))
    problems = read_json_object(find_file(folder, ("problems.json",), "file of ScienceQA's problems"))
    names = need(splits, split, "pid_splits.json")
    missing = [name for name in names if name not in problems]
    if missing:
        raise InputError(
            f"{len(missing)} problems of the split {split!r} are not in problems.json; the first is {missing[0]!r}"
        )
    return {name: problems[name] for name in names}


def questions_from_samples(rows: Sequence[JsonRow], images: Path, *, letter: bool) -> list[Question]:
    """Make questions from training samples: the human's first turn, with the image before it."""
    questions = []
    for number, row in enumerate(rows, start=1):
        where = f"question {number} of the ScienceQA file"
        question = str(need(row, "conversations", where)[0]["value"]).replace(DEFAULT_IMAGE_TOKEN, "").strip()
        sources = (images / str(row["image"]),) if "image" in row else ()
        prompt = f"{question}\n{LETTER_SUFFIX}" if letter else question
        shown = f"{DEFAULT_IMAGE_TOKEN}\n{prompt}" if sources else prompt
        questions.append(Question(need(row, "id", where), prompt, sources, shown_prompt=shown))
    return questions


def score(answered: Sequence[AnsweredQuestion]) -> Scores:
    verdicts = []
    unread = 0
    for one in answered:
        letter = None if one.text is None else science_qa_letter(one.text, OPTIONS)
        unread += letter is None and one.text is not None
        verdicts.append(float(letter is not None and LETTERS.index(letter) == one.question.answer))
    with_image = [verdict for verdict, one in zip(verdicts, answered, strict=True) if one.question.images]
    scores = accuracy(answered, verdicts)
    figures = {"accuracy": scores.figures["accuracy"], "correct": int(sum(verdicts)), "count": len(verdicts)}
    if with_image:
        figures["image_accuracy"] = percent(with_image)
    notes = [f"{unread} answers name no letter and count as wrong"] if unread else []
    notes += [] if with_image else ["no question has an image, so there is no image accuracy"]
    return replace(scores, figures=figures, notes=tuple(notes))


def _task(name: str, title: str, *, images_only: bool) -> Task:
    reader = partial(read, images_only=images_only)
    return Task(name, title, "scienceqa", reader, score, headline="accuracy", max_new_tokens=1024)


SCIENCEQA = _task("scienceqa", "ScienceQA", images_only=False)
SCIENCEQA_IMG = _task("scienceqa-img", "ScienceQA, with images", images_only=True)
