"""VQAv2, GQA, VizWiz and TextVQA: short answers to questions about an image.

VQAv2 and VizWiz are scored by their servers, for which `write` makes the upload. Where a split's official annotations are in
the task's folder, they are scored here too. GQA and TextVQA are scored here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import (
    find_file,
    find_optional,
    need,
    read_json_lines,
    read_json_object,
    read_json_rows,
    write_json,
)
from llava.eval.metrics.vqa import normalise, soft_accuracy, vqa_accuracy
from llava.eval.tasks.task import WORD_SUFFIX, Task, accuracy, refuse_gaps, unscored
from llava.eval.types import AnsweredQuestion, JsonRow, Question, Scores


def read_questions(file: Path, images: Path) -> list[Question]:
    """Read a LLaVA question file: JSON lines with question_id, image (relative to `images`), text, and perhaps category."""
    rows = read_json_lines(file, "file of questions")
    if not rows:
        raise InputError(f"the file of questions {str(file)!r} is empty")
    questions = []
    for number, row in enumerate(rows, start=1):
        where = f"{file}, question {number}"
        image = row.get("image")
        sources = () if image is None else (images / str(image),)
        name, text = need(row, "question_id", where), str(need(row, "text", where))
        questions.append(Question(name, text, sources, str(row.get("category", "")), extra=row))
    return questions


# --- VQAv2 ----------------------------------------------------------------------------------------------------------


def read_vqav2(folder: Path) -> list[Question]:
    files = ("llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_val2014.jsonl")
    file = find_file(folder, files, "file of VQAv2's questions")
    images = folder / ("val2014" if "val2014" in file.name else "test2015")
    questions = read_questions(file, images)
    truths = find_optional(folder, ("v2_mscoco_val2014_annotations.json",)) if "val2014" in file.name else None
    if truths is None:
        return questions
    rows = {str(row["question_id"]): row for row in read_json_object(truths)["annotations"]}
    return [_with_people(question, rows.get(str(question.id)), "answer_type") for question in questions]


def _with_people(question: Question, row: JsonRow | None, kind: str) -> Question:
    """Return a question with the answers that people gave, as its annotation `row` has them."""
    if row is None:
        raise InputError(f"the question {question.id!r} has no annotation; give the annotations of the same split")
    people = [one["answer"] if isinstance(one, dict) else one for one in row["answers"]]
    return Question(question.id, question.prompt, question.images, str(row.get(kind, "")), people, extra=question.extra)


def score_people(answered: Sequence[AnsweredQuestion], server: str) -> Scores:
    """Score by the answers of ten people, or leave the scoring to `server` where they are not in the task's folder."""
    if not answered or answered[0].question.answer is None:
        return unscored(answered, f"the answers are not public: hand the submission in at {server}")
    scores = [0.0 if one.text is None else vqa_accuracy(one.text, one.question.references) for one in answered]
    return accuracy(answered, scores)


def score_vqav2(answered: Sequence[AnsweredQuestion]) -> Scores:
    return score_people(answered, "eval.ai, challenge 830 (VQAv2)")


def write_vqav2(answered: Sequence[AnsweredQuestion], home: Path, folder: Path) -> Path:
    """Write the upload: every question of test2015, with empty answers to those outside of test-dev."""
    texts = {one.question.id: one.text or "" for one in answered}
    whole = find_optional(home, ("llava_vqav2_mscoco_test2015.jsonl",))
    names = [row["question_id"] for row in read_json_lines(whole)] if whole is not None else list(texts)
    file = folder / "vqav2.json"
    write_json(file, [{"question_id": name, "answer": normalise(texts.get(name, ""))} for name in names])
    return file


# --- VizWiz ---------------------------------------------------------------------------------------------------------


def read_vizwiz(folder: Path) -> list[Question]:
    file = find_file(folder, ("llava_test.jsonl", "llava_val.jsonl"), "file of VizWiz's questions")
    split = "val" if "val" in file.name else "test"
    questions = read_questions(file, folder / split)
    truths = find_optional(folder, ("val.json", "Annotations/val.json")) if split == "val" else None
    if truths is None:
        return questions
    rows = {row["image"]: row for row in read_json_rows(truths)}
    return [_with_people(question, rows.get(str(question.extra.get("image"))), "answer_type") for question in questions]


def score_vizwiz(answered: Sequence[AnsweredQuestion]) -> Scores:
    return score_people(answered, "eval.ai, challenge 1911 (VizWiz)")


def write_vizwiz(answered: Sequence[AnsweredQuestion], home: Path, folder: Path) -> Path:
    refuse_gaps(answered, "VizWiz")
    file = folder / "vizwiz.json"
    write_json(file, [{"image": one.question.extra["image"], "answer": normalise(one.text or "")} for one in answered])
    return file


# --- GQA ------------------------------------------------------------------------------------------------------------


def read_gqa(folder: Path) -> list[Question]:
    images = find_optional(folder, ("data/images", "images")) or folder / "data/images"
    places = ("data/testdev_balanced_questions.json", "testdev_balanced_questions.json")
    truths = read_json_object(find_file(folder, places, "file of GQA's answers"))
    file = find_optional(folder, ("llava_gqa_testdev_balanced.jsonl",))
    if file is None:
        asked = [
            Question(name, f"{row['question']}\n{WORD_SUFFIX}", (images / f"{row['imageId']}.jpg",))
            for name, row in truths.items()
        ]
    else:
        asked = read_questions(file, images)
    found = []
    for question in asked:
        if str(question.id) not in truths:
            raise InputError(f"GQA's question {question.id!r} is not in {places[0]}; both files must be of one split")
        row = truths[str(question.id)]
        kind = str(row.get("types", {}).get("structural", ""))
        found.append(Question(question.id, question.prompt, question.images, kind, row["answer"], extra=question.extra))
    return found


def gqa_answer(text: str) -> str:
    """Normalise an answer as GQA's files do: lower case, no full stop."""
    return text.rstrip(".").lower()


def score_gqa(answered: Sequence[AnsweredQuestion]) -> Scores:
    return accuracy(answered, [float(gqa_answer(one.text or "") == one.question.answer) for one in answered])


def write_gqa(answered: Sequence[AnsweredQuestion], home: Path, folder: Path) -> Path:
    file = folder / "testdev_balanced_predictions.json"
    rows = [{"questionId": str(one.question.id), "prediction": gqa_answer(one.text or "")} for one in answered]
    write_json(file, rows)
    return file


# --- TextVQA --------------------------------------------------------------------------------------------------------


def read_textvqa(folder: Path) -> list[Question]:
    """Read the questions. Those of LLaVA's file name text that OCR found in the image; without that file they do not."""
    truths = textvqa_annotations(find_file(folder, ("TextVQA_0.5.1_val.json",), "file of TextVQA's answers"))
    file = find_optional(folder, ("llava_textvqa_val_v051_ocr.jsonl",))
    images = folder / "train_images"
    if file is None:
        asked = [Question(name, f"{text}\n{WORD_SUFFIX}", (images / f"{name}.jpg",)) for name, text in truths]
    else:
        asked = read_questions(file, images)
    questions = []
    for question in asked:
        text = prompt_processor(question.prompt)
        people = truths.get((str(question.id), text))
        if people is None:
            raise InputError(f"TextVQA's question {text!r} about {question.id!r} has no annotation")
        questions.append(Question(question.id, question.prompt, question.images, "", people, extra={"question": text}))
    return questions


def textvqa_annotations(file: Path) -> dict[tuple[str, str], list[str]]:
    rows = need(read_json_object(file, "file of TextVQA's answers"), "data", str(file))
    return {(str(row["image_id"]), str(row["question"]).lower()): row["answers"] for row in rows}


def prompt_processor(prompt: str) -> str:
    """Return the bare question in lower case, out of any of the forms of prompts that were used for TextVQA."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        _, found, rest = prompt.partition("Question: ")
        question, ended, _ = rest.partition(" Short answer:")
        if found and ended:
            return question.lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise InputError(f"{prompt!r} is not one of the forms of TextVQA's prompts, so its question cannot be found")


def score_textvqa(answered: Sequence[AnsweredQuestion]) -> Scores:
    scores = [0.0 if one.text is None else soft_accuracy(one.text, one.question.references) for one in answered]
    return accuracy(answered, scores)


VQAV2 = Task("vqav2", "VQAv2", "vqav2", read_vqav2, score_vqav2, headline="accuracy", write=write_vqav2)
VIZWIZ = Task("vizwiz", "VizWiz", "vizwiz", read_vizwiz, score_vizwiz, headline="accuracy", write=write_vizwiz)
GQA = Task("gqa", "GQA", "gqa", read_gqa, score_gqa, headline="accuracy", write=write_gqa)
TEXTVQA = Task("textvqa", "TextVQA", "textvqa", read_textvqa, score_textvqa, headline="accuracy")
