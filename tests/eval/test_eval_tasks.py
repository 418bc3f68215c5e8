"""Readers and scorers on hand-made samples of the official formats: every score can be checked by eye."""

from __future__ import annotations

import json
import math
from pathlib import Path

import eval_kit as kit
import pytest
from eval_kit import kinds, scored

from llava.errors import InputError
from llava.eval.harness.scoring import load_questions
from llava.eval.tasks import TASKS
from llava.eval.tasks.task import LETTER_SUFFIX, LETTER_SUFFIX_CN, WORD_SUFFIX


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return kit.write_all(tmp_path / "data")


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_guide(data: Path) -> None:
    prompts = {name: load_questions(TASKS[name], data)[0] for name in ("pope", "mme", "scienceqa", "mmbench", "qbench")}
    assert prompts["pope"].prompt == f"Is there a 1?\n{WORD_SUFFIX}"
    assert prompts["mme"].prompt == f"Is it A? Please answer yes or no.\n{WORD_SUFFIX}"
    assert prompts["scienceqa"].prompt == f"Context: N/A\nQuestion: One?\nOptions: (A) x (B) y\n{LETTER_SUFFIX}"
    assert prompts["scienceqa"].row_prompt == f"<image>\n{prompts['scienceqa'].prompt}"
    assert prompts["mmbench"].prompt == f'Look well\nWhich "one"?\nA. red\nB. blue\nC. green\n{LETTER_SUFFIX}'
    assert prompts["mmbench"].row_prompt == 'Look well\nWhich "one"?\nA. red\nB. blue\nC. green'
    assert prompts["qbench"].prompt == "Sharp?\nChoose between one of the options as follows:\nA. Yes\nB. No\n"
    (data / "mmbench/mmbench_dev_20230712.tsv").rename(data / "mmbench/mmbench_dev_cn_20231003.tsv")
    assert load_questions(TASKS["mmbench-cn"], data)[0].prompt.endswith(f"C. green\n{LETTER_SUFFIX_CN}")


def test_mmmu_questions_with_their_images() -> None:
    from llava.eval.tasks.mmmu import question_from_row

    row = {
        "id": "validation_Art_1", "question": "Who <image 1>?", "options": "['Ann', 'Bob']", "answer": "B",
        "question_type": "multiple-choice", "image_1": {"bytes": b"x"}, "image_2": None,
    }  # fmt: skip
    question = question_from_row(row)
    assert question.prompt == f"Who <image 1>?\n\n(A) Ann\n(B) Bob\n\n\n{LETTER_SUFFIX}"
    assert (question.images, question.category, question.answer) == ((b"x",), "Art", "B")
    row |= {"options": "[]", "question_type": "open", "answer": "['1', 'one']"}
    assert question_from_row(row).prompt == f"Who <image 1>?\n\n{WORD_SUFFIX}"
    assert question_from_row(row).answer == ["1", "one"]


@pytest.mark.parametrize("task", ["gqa", "textvqa", "seed", "mme", "mmvet"])
def test_the_benchmark_s_own_files_are_enough(task: str, data: Path) -> None:
    """Without LLaVA's question files the same questions are made from the official ones."""
    folder = TASKS[task].home(data)
    before = load_questions(TASKS[task], data)
    (file,) = folder.glob("llava*.jsonl")
    file.unlink()
    after = load_questions(TASKS[task], data)
    order = [question.id for question in after]
    assert {str(question.id) for question in before} <= {str(name) for name in order}
    for question in before:
        assert question.answer in [
            other.answer for other in after if str(other.id) == str(question.id) or task == "mme"
        ]
    if task in ("mme", "textvqa"):
        assert [question.extra["question"] for question in before] == [question.extra["question"] for question in after]


# --- scores ---------------------------------------------------------------------------------------------------------


def test_pope(data: Path, tmp_path: Path) -> None:
    file = kit.answers(tmp_path / "a.jsonl", {0: "Yes", 1: "Yes, I think.", 2: "yes", 3: "No"})
    report = scored("pope", file, data)
    assert report.scores.categories["random"] == {
        "TP": 1, "FP": 1, "TN": 0, "FN": 0, "accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0,
    }  # fmt: skip
    assert report.scores.categories["adversarial"]["f1"] == 1.0
    assert report.scores.headline == pytest.approx((2 / 3 + 1) / 2 * 100)
    assert list(report.scores.verdicts) == [1, 0, 1, 1]


def test_pope_in_any_order_and_with_a_split_missing(data: Path, tmp_path: Path) -> None:
    """The original pairs answers with labels by position, so shuffled or missing answers change its figures in silence."""
    report = scored("pope", kit.answers(tmp_path / "a.jsonl", {1: "No", 0: "Yes"}), data)
    assert report.scores.categories == {"random": scored_perfect()}
    assert kinds(report) == {"missing answers": 2}
    assert "adversarial: no answers at all" in report.scores.notes[0]


def scored_perfect() -> dict[str, float]:
    return {
        "TP": 1, "FP": 0, "TN": 1, "FN": 0, "accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 0.5,
    }  # fmt: skip


def test_pope_never_yes_divides_by_nothing(data: Path, tmp_path: Path) -> None:
    report = scored("pope", kit.answers(tmp_path / "a.jsonl", dict.fromkeys(range(4), "no")), data)
    assert report.scores.categories["random"]["precision"] == 0
    assert "precision and f1 had nothing to divide by" in report.scores.notes[0]


def test_pope_with_the_official_files_alone(data: Path, tmp_path: Path) -> None:
    """Ids begin at 1 in each split: rows say the split, or the file's name does, or there are no ids at all."""
    (data / "pope/llava_pope_test.jsonl").unlink()
    rows = [{"question": f"Is there a {n}?", "answer": text} for n, text in ((1, "yes"), (2, "no"))]
    folder = tmp_path / "official"
    kit.write_lines(folder / "coco_pope_random.json.jsonl", rows)
    kit.write_lines(
        folder / "adversarial.jsonl", [{"question_id": 1, "text": "yes"}, {"question_id": 2, "text": "yes"}]
    )
    report = scored("pope", folder, data)
    assert report.scores.categories["random"] == scored_perfect()
    assert report.scores.categories["adversarial"]["FP"] == 1
    assert not report.faults.kinds


def test_mme_from_answers_and_from_the_official_folder(data: Path, tmp_path: Path) -> None:
    questions = load_questions(TASKS["mme"], data)
    texts = ["Yes", "no", "Yes", "not sure, yes"]  # the last reads as no: "not " holds "no"
    rows = [{"question_id": i.id, "prompt": i.prompt, "text": text} for i, text in zip(questions, texts, strict=True)]
    report = scored("mme", kit.write_lines(tmp_path / "a.jsonl", rows), data)
    assert report.scores.figures == {"perception": 200.0, "cognition": 200.0}
    rows[1]["text"] = "maybe"
    report = scored("mme", kit.write_lines(tmp_path / "a.jsonl", rows), data)
    assert report.scores.categories["existence"] == {
        "score": 50.0, "accuracy": 0.5, "accuracy_plus": 0.0, "questions": 2, "images": 1, "other": 1,
    }  # fmt: skip
    assert "no answers in count, position" in report.scores.notes[-1]
    folder = TASKS["mme"].write(report.answered, data / "MME", tmp_path / "results")  # type: ignore[misc]
    lines = (folder / "existence.txt").read_text().splitlines()
    assert lines[1] == "0001.txt\tIs it B? Please answer yes or no.\tNo\tmaybe"
    assert scored("mme", folder, data).scores.figures == report.scores.figures


def test_mme_lines_must_go_in_pairs(data: Path, tmp_path: Path) -> None:
    (tmp_path / "existence.txt").write_text("1.png\tq\tYes\tyes\n2.png\tq\tNo\tno\n")
    with pytest.raises(InputError, match="two lines for each image"):
        scored("mme", tmp_path, data)
    (tmp_path / "existence.txt").write_text("1.png\tq\tYes\n")
    with pytest.raises(InputError, match=r"existence.txt:1 is not image, question"):
        scored("mme", tmp_path, data)


def test_mmbench_in_rounds_and_as_a_submission(data: Path, tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "round_id": 0, "text": "A"},
        {"question_id": 2, "round_id": 0, "text": "The pig, surely"},
    ]
    report = scored("mmbench", kit.write_lines(tmp_path / "a.jsonl", rows), data)
    assert report.scores.headline == 100.0
    assert list(report.scores.categories) == ["seeing", "colour", "animal"]
    file = TASKS["mmbench"].write(report.answered, data / "mmbench", tmp_path / "up")  # type: ignore[misc]
    assert scored("mmbench", file, data).scores.figures == report.scores.figures  # the upload, read back
    # Every order of the options: red is A, then C, then B; one round wrong and the question is.
    rounds = [(1, 0, "A"), (1, 1, "C"), (1, 2, "B"), (2, 0, "D"), (2, 1, "C"), (2, 2, "B"), (2, 3, "D")]
    rows = [{"question_id": q, "round_id": n, "prompt": "", "text": text} for q, n, text in rounds]
    report = scored("mmbench-circular", kit.write_lines(tmp_path / "c.jsonl", rows), data)
    assert report.scores.figures == {"accuracy": 50.0, "questions": 2, "rounds": 7, "without_letter": 0}
    assert list(report.scores.verdicts) == [1, 1, 1, 1, 1, 1, 0]


def test_mmbench_rows_share_an_image(data: Path) -> None:
    first, second = load_questions(TASKS["mmbench"], data)
    assert first.images == second.images == (kit.png(),)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("The answer is B.", "B"),
        ("A dog is what I see here", "B"),  # the article is no answer, the option's text is
        ("A or B", None),
        ("It is a DOG", "B"),
        ("cat or dog", None),
        ("none of them", None),
        ("", None),
    ],
)
def test_letters_out_of_answers(text: str, letter: str | None) -> None:
    from llava.eval.metrics.choices import find_letter

    assert find_letter(text, ("cat", "dog", "cow")) == letter


def test_scienceqa_from_answers_and_from_its_result_file(data: Path, tmp_path: Path) -> None:
    report = scored("scienceqa", kit.answers(tmp_path / "a.jsonl", {"1": "B. because", "2": "The answer is B."}), data)
    assert report.scores.figures == {"accuracy": 50.0, "correct": 1, "count": 2, "image_accuracy": 100.0}
    kit.write_json(tmp_path / "r.json", {"acc": 50.0, "results": {"1": 1, "2": 1}, "outputs": {"1": "B", "2": "no"}})
    report = scored("scienceqa", tmp_path / "r.json", data)
    assert report.scores.figures["accuracy"] == 50.0
    assert report.scores.notes == ("1 answers name no letter and count as wrong",)
    assert [question.id for question in load_questions(TASKS["scienceqa-img"], data)] == ["1"]


def test_seed(data: Path, tmp_path: Path) -> None:
    report = scored("seed", kit.answers(tmp_path / "a.jsonl", {100: "A", "v_1": "B."}), data)
    assert report.scores.figures == {
        "accuracy": 50.0, "right": 1, "questions": 2, "image_accuracy": 100.0, "video_accuracy": 0.0,
    }  # fmt: skip
    assert report.scores.notes == ("1 answers are more than a letter and count as wrong",)


def test_textvqa_where_questions_share_an_id(data: Path, tmp_path: Path) -> None:
    rows = [
        {"question_id": "i", "prompt": f"What {n}?\n{WORD_SUFFIX}", "text": text}
        for n, text in ((2, "go"), (1, "Stop."))
    ]
    report = scored("textvqa", kit.write_lines(tmp_path / "a.jsonl", rows), data)
    # "go" is right as far as 2 of 10 people say it: twice (1/3), eight times (2/3).
    assert list(report.scores.verdicts) == [1.0, pytest.approx((2 / 3 * 8 + 1 / 3 * 2) / 10)]
    rows[0]["prompt"] = f"What 2?\nReference OCR token: GO\n{WORD_SUFFIX}"  # another form of the same question
    assert scored("textvqa", kit.write_lines(tmp_path / "a.jsonl", rows), data).scores == report.scores


def test_gqa_vqav2_and_vizwiz(data: Path, tmp_path: Path) -> None:
    file = kit.answers(tmp_path / "a.jsonl", {1: "Dog.", 2: "the dog"})
    report = scored("gqa", file, data)
    assert report.scores.figures == {"accuracy": 50.0, "right": 1, "questions": 2}
    written = TASKS["gqa"].write(report.answered, data, tmp_path)  # type: ignore[misc]
    assert json.loads(written.read_text())[0] == {"questionId": "1", "prediction": "dog"}
    report = scored("vqav2", file, data)
    assert report.scores.headline is None
    written = TASKS["vqav2"].write(report.answered, data / "vqav2", tmp_path)  # type: ignore[misc]
    assert json.loads(written.read_text()) == [
        {"question_id": n, "answer": a} for n, a in ((1, "dog"), (2, "dog"), (3, ""))
    ]
    # People disagree, so both sides are normalised: "a dog" and "dog" are nine answers of ten.
    assert scored("vizwiz", file, data).scores.headline == 100.0


def test_qbench_answers_responses_and_logits(data: Path, tmp_path: Path) -> None:
    import numpy as np

    report = scored("qbench", kit.answers(tmp_path / "a.jsonl", {0: "B", 1: "B. No"}), data)
    assert report.scores.figures == {"accuracy": 50.0, "right": 1, "questions": 2, "without_letter": 0}
    written = TASKS["qbench"].write(report.answered, data, tmp_path)  # type: ignore[misc]
    assert scored("qbench", written, data).scores == report.scores
    truth, good, poor = [1.0, 3.0, 2.0, 5.0, 3.0], [10.0, 12.0, 14.0, 20.0, 13.0], [9.0, 10.0, 14.5, 3.0, 13.0]
    rows = [{"gt_score": t, "logit_good": g, "logit_poor": p} for t, g, p in zip(truth, good, poor, strict=True)]
    (tmp_path / "spaq.json").write_text("".join(map(json.dumps, rows)))  # without anything between them, as published
    report = scored("qbench", tmp_path / "spaq.json", data)
    expected = [math.exp(g / 100) / (math.exp(g / 100) + math.exp(p / 100)) for g, p in zip(good, poor, strict=True)]
    ranks = ([1, 3.5, 2, 5, 3.5], [3, 4, 1, 5, 2])  # of both, by eye; equal values share a rank
    assert report.scores.figures["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert report.scores.figures["pearson"] == pytest.approx(np.corrcoef(truth, expected)[0, 1], abs=1e-12)


def test_mmmu_in_its_three_forms(data: Path, tmp_path: Path) -> None:
    kit.write_json(tmp_path / "parsed.json", {"validation_Art_1": "B", "validation_Math_1": "about 3.14"})
    report = scored("mmmu", tmp_path / "parsed.json", data)
    assert report.scores.figures == {"accuracy": 1.0, "right": 2, "questions": 2, "guessed": 0}
    assert list(report.scores.categories) == ["Overall-Art and Design", "Art", "Overall-Science", "Math"]
    report = scored("mmmu", kit.answers(tmp_path / "a.jsonl", {"validation_Art_1": "The answer is (C)."}), data)
    assert report.scores.figures["accuracy"] == 0.0
    assert kinds(report) == {"missing answers": 1}
    row = {
        "id": "validation_Art_1",
        "question_type": "multiple-choice",
        "answer": "B",
        "index2ans": {"A": "Ann", "B": "Bob"},
    }
    rows = [{**row, "all_choices": ["A", "B"], "response": text} for text in ("It must be Bob who painted this", "hm")]
    kit.write_json(tmp_path / "out/Art/output.json", rows)
    report = scored("mmmu", tmp_path / "out", data)
    assert report.scores.figures["guessed"] == 1  # drawn as the official script draws: A first, with its seed
    assert report.scores.figures["right"] == 1


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("The answer is 3.14159", "3.14", True),
        ("x = 1,000", "1000", True),
        ("It is 12.", "1", False),
        ("so the result is blue", "Blue", True),
        ("green", "blue", False),
        ("1e3", "1000", True),
        ("a", "a", True),
        ("banana", "a", False),
    ],
)
def test_mmmu_open_answers(text: str, answer: str, right: bool) -> None:
    from llava.eval.metrics.choices import mmmu_open_right

    assert mmmu_open_right(text, answer) is right


def test_judged_tasks_from_reviews_and_grades(data: Path, tmp_path: Path) -> None:
    reviews = [{"question_id": n, "category": "conv", "tuple": [8, score]} for n, score in enumerate((4, 6))]
    report = scored("llava-bench", kit.write_lines(tmp_path / "r.jsonl", reviews), data)
    assert report.scores.figures == {"relative": 62.5, "first": 80.0, "second": 50.0, "reviews": 2}
    kit.write_json(tmp_path / "g.json", {"v1_0": {"score": [1.0]}, "v1_1": {"score": [0.5]}})
    report = scored("mmvet", tmp_path / "g.json", data)
    assert report.scores.figures == {"total": 75.0, "questions": 2, "runs": 1}
    assert report.scores.categories["ocr"]["score"] == 75.0
    assert report.scores.categories["math_ocr"] == {"score": 100.0, "questions": 1}
    kit.write_json(tmp_path / "s.json", {"v1_0": "a", "v1_1": "b"})
    report = scored("mmvet", tmp_path / "s.json", data)  # a submission: nothing to score without a judge
    assert report.scores.headline is None
    assert "need a judge" in report.scores.notes[0]
