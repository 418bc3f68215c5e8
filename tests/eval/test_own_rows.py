"""Questions of one's own in every form that people have them: fields, images, tables; and what is refused, in one sentence."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import eval_kit as kit
import pytest

from llava.__main__ import main
from llava.errors import InputError
from llava.eval.files import write_xlsx
from llava.eval.harness.scoring import load_questions, score_file
from llava.eval.tasks import find_task, find_tasks
from llava.eval.tasks.task import LETTER_SUFFIX, WORD_SUFFIX
from llava.eval.types import Question

PNG = kit.png()
BASE64 = base64.b64encode(PNG).decode()
ROW: dict[str, Any] = {"image": "a.png", "question": "Which?", "answer": "dog"}


def questions(tmp_path: Path, *rows: dict[str, Any], name: str = "own.jsonl") -> list[Question]:
    (tmp_path / "a.png").write_bytes(PNG)
    return load_questions(find_task(str(kit.write_lines(tmp_path / name, rows))), Path("no/data/folder"))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.png", ["a.png"]),
        ("{folder}/a.png", ["a.png"]),
        (["a.png", f"data:image/png;base64,{BASE64}"], ["a.png", PNG]),
        (BASE64, [PNG]),
        (base64.encodebytes(PNG).decode(), [PNG]),
        ({"bytes": None, "path": "a.png"}, ["a.png"]),
        (None, []),
        ("", []),
        ([], []),
    ],
)
def test_images(image: Any, expected: list[Any], tmp_path: Path) -> None:
    if isinstance(image, str):
        image = image.replace("{folder}", str(tmp_path))
    [question] = questions(tmp_path, {**ROW, "image": image})
    if isinstance(image, list) and image:
        by_number = {f"image_{number}": one for number, one in enumerate([*image, None], start=1)}
        [numbered] = questions(tmp_path, {"question": "?", "answer": "x", **by_number, "image_id": 5})
        assert numbered.images == question.images
    assert list(question.images) == [tmp_path / one if isinstance(one, str) else one for one in expected]


@pytest.mark.parametrize(
    "options",
    [
        ["cat", "dog"],
        {"A": "cat", "B": "dog"},
        {"b": "dog", "a": "cat", "c": None},
        '["cat", "dog"]',
        "['cat', 'dog']",
        '{"A": "cat", "B": "dog"}',
    ],
)
def test_options(options: Any, tmp_path: Path) -> None:
    for field in ("options", "choices"):
        by_letter, by_text = questions(tmp_path, {**ROW, field: options, "answer": "B"}, {**ROW, field: options})
        assert by_letter.prompt == f"Which?\nA. cat\nB. dog\n{WORD_SUFFIX}"
        assert by_letter.options == ("cat", "dog")
        assert by_letter.answer == ["B", "dog"]
        assert by_text.answer == ["dog"]
    [columns] = questions(tmp_path, {"question": "Which?", "A": "cat", "B": "dog", "C": None, "answer": "A"})
    assert (columns.options, columns.answer) == (("cat", "dog"), ["A", "cat"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(5, ["5"]), (0.5, ["0.5"]), (True, ["yes"]), (["a", 3], ["a", "3"]), ([{"answer": "x", "id": 1}] * 2, ["x", "x"])],
)
def test_answers(answer: Any, expected: list[str], tmp_path: Path) -> None:
    assert questions(tmp_path, {**ROW, "answer": answer})[0].answer == expected
    assert questions(tmp_path, {"question": "?", "answers": answer})[0].answer == expected


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"answer": None}, "the answer null; give the right answer"),
        ({"answer": []}, r"the answer \[\]"),
        ({"answer": ["a", None]}, "give the right answer, or a list"),
        ({"answer": {"text": "a"}}, "give the right answer"),
        ({"answer": " "}, "give the right answer"),
        ({"answer": float("nan")}, "give the right answer"),
        ({"answer": 1, "options": ["a", "b"]}, "the answer 1, which is no option"),
        ({"question": None, "text": None}, "the question null; give the text of the question"),
        ({"question": ["a"]}, "give the text of the question"),
        ({"options": "circle, square"}, "the options 'circle, square'; give a list of texts"),
        ({"options": {"1": "a", "2": "b"}}, "the letters A, B, ... in a row"),
        ({"options": {"A": "a", "C": "b"}}, "the letters A, B, ... in a row"),
        ({"options": [["a"], "b"]}, "give a list of texts"),
        ({"options": 3}, "the options 3; give a list"),
        ({"options": list("abcdefghijkl")}, "has 12 options; at most 10"),
        ({"image": 7}, "image 1 is 7; give a file"),
        ({"image": ..., "img": "a.png"}, "the field 'img', which is not read; call it 'image'"),
        ({"image": ..., "image_url": "https://x.org/a.png"}, "the field 'image_url', which is not read"),
        ({"image": ["a.png", None]}, "image 2 is null; give a file"),
        ({"image": "https://x.org/a.png"}, "nothing is downloaded"),
        ({"image": "data:image/png,abc"}, "a data: URL without base64"),
        ({"image": "data:image/png;base64,a!"}, "image 1 is not valid base64"),
        ({"image": "#" * 5000}, "neither a file nor base64"),
    ],
)
def test_what_is_refused(row: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named) as error:
        questions(tmp_path, ROW, {key: value for key, value in {**ROW, **row}.items() if value is not ...})
    assert "own.jsonl, row 2" in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))
    assert "\n" not in str(error.value)


def test_answers_of_ten_people_count_each(tmp_path: Path) -> None:
    people = ["red"] * 2 + ["blue"] * 8
    kit.write_lines(tmp_path / "own.jsonl", [{"question": "?", "answers": people}])
    (tmp_path / "own.yaml").write_text("file: own.jsonl\nmetric: vqa\n")
    report = score_file(find_task(str(tmp_path / "own.yaml")), kit.answers(tmp_path / "a.jsonl", {1: "red"}), tmp_path)
    # Each person left out in turn: two times one other said it, eight times two did; a third of the votes each.
    assert report.scores.headline == pytest.approx(100 * (2 * (1 / 3) + 8 * (2 / 3)) / 10)


def test_absent_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 1 has no field 'answers'.*its fields: image, question"):
        questions(tmp_path, {"image": "a.png", "question": "?"})
    with pytest.raises(InputError, match="is empty"):
        questions(tmp_path)


COLUMNS = ("index", "question", "hint", "image", "A", "B", "C", "answer", "category")
CELLS: list[tuple[Any, ...]] = [
    (7, "Which?", "Look.", BASE64, "cat", "dog", "", "B", "x"),
    (8, "And here?", "", "7", "one", "two", "three", "C", ""),
    (9, "Both?", "nan", json.dumps([BASE64, BASE64]), "1", "2", "", "A", ""),
]
TABLE = [dict(zip(COLUMNS, cells, strict=True)) for cells in CELLS]


def write_table(file: Path) -> Path:
    columns = list(TABLE[0])
    if file.suffix == ".xlsx":
        write_xlsx(file, TABLE, columns)
    elif file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        rows = [
            {"question_id": str(row["index"]), "question": row["question"], "hint": row["hint"] or None,
             "images": [{"bytes": PNG, "path": None}] * (2 if row["index"] == 9 else 1),
             "choices": [row[letter] for letter in "ABC" if row[letter]], "answer": row["answer"], "category": row["category"]}
            for row in TABLE
        ]  # fmt: skip
        rows[2]["hint"] = None
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, columns, delimiter="," if file.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(TABLE)
    return file


@pytest.mark.parametrize("ending", ["tsv", "csv", "xlsx", "parquet", "TSV"])
def test_tables(ending: str, tmp_path: Path) -> None:
    """VLMEvalKit's columns, with images in base64, by the index of another row, and several in a cell."""
    file = write_table(tmp_path / f"MMStar.{ending.lower()}").rename(tmp_path / f"MMStar.{ending}")
    task = find_task(str(file))
    assert (task.name, task.headline) == ("MMStar", "choice")
    found = load_questions(task, Path("no/data/folder"))
    assert [str(question.id) for question in found] == ["7", "8", "9"]
    assert found[0].prompt == f"Look.\nWhich?\nA. cat\nB. dog\n{LETTER_SUFFIX}"
    assert found[2].prompt == f"Both?\nA. 1\nB. 2\n{LETTER_SUFFIX}"
    assert [question.images for question in found] == [(PNG,), (PNG,), (PNG, PNG)]
    assert found[0].category == "x"
    texts = {7: "B", 8: "(three)", 9: "B."}
    report = score_file(task, kit.answers(tmp_path / "a.jsonl", texts), Path("no/data/folder"))
    assert list(report.scores.verdicts) == [1.0, 1.0, 0.0]


def test_tables_without_options_and_described_tables(tmp_path: Path) -> None:
    (tmp_path / "plain.tsv").write_text("question\tanswer\nWhat?\tred\n")
    task = find_task(str(tmp_path / "plain.tsv"))
    assert (task.headline, load_questions(task, tmp_path)[0].answer) == ("match", ["red"])
    write_table(tmp_path / "t.tsv")
    (tmp_path / "t.yaml").write_text("file: t.tsv\nsuffix: Say it.\n")
    task = find_task(str(tmp_path / "t.yaml"))
    assert task.headline == "choice"
    assert load_questions(task, tmp_path)[0].prompt.endswith("\nSay it.")
    for text, named in (
        ("max_new_tokens: many", "must be a number"),
        ("images: 3", "must be a text"),
        ("metric:", "a text"),
    ):
        (tmp_path / "t.yaml").write_text(f"file: t.tsv\n{text}\n")
        with pytest.raises(InputError, match=named):
            find_task(str(tmp_path / "t.yaml"))
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "bad.xlsx").write_bytes(b"no table")
    for name in ("bad.parquet", "bad.xlsx"):
        with pytest.raises(InputError, match=f"{name}.*can be read"):
            find_task(str(tmp_path / name))


def test_answers_that_are_no_choice(tmp_path: Path) -> None:
    kit.write_lines(tmp_path / "own.jsonl", [{**ROW, "options": ["a", "b"], "answer": "c"}])
    (tmp_path / "own.yaml").write_text("file: own.jsonl\nmetric: choice\n")
    with pytest.raises(InputError, match=r"'c' is no letter and no text of the row's options \('a', 'b'\)"):
        load_questions(find_task(str(tmp_path / "own.yaml")), tmp_path)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    files = [str(kit.write_lines(tmp_path / folder / "own.jsonl", [ROW])) for folder in ("x", "y")]
    assert len(find_tasks(f"{files[0]},{files[0]}", tmp_path)) == 1
    with pytest.raises(InputError, match="called 'own'"):
        find_tasks(",".join(files), tmp_path)


def run(*words: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(["eval", *words])
    return status, out.getvalue()


def test_the_program_needs_no_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says in words what another run in its folder was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(PNG)
    kit.write_lines(tmp_path / "own.jsonl", [{**ROW, "question": f"Which {n}?"} for n in range(3)])
    flags = ("own.jsonl", "-q", "--max-new-tokens", "2", "--out", "out")
    for wrong in ("--limit", "--max-new-tokens"):
        for value in ("0", "-1"):
            status, text = run(*flags, wrong, value)
            assert (status, text.strip()) == (
                2,
                f"llava eval: error: {wrong} is {value}; give 1 or more, or leave it out",
            )
    assert run(*flags, "--limit", "2")[0] == 0
    assert len(kit.rows_of(tmp_path / "out/own/answers.jsonl")) == 2
    status, text = run(*flags)
    assert status == 2
    assert "another run (own: 2 and 3 questions); give another --out, or --fresh" in text
    kit.write_lines(tmp_path / "own.jsonl", [{**ROW, "question": f"What {n}?"} for n in range(2)])
    status, text = run(*flags, "--seed", "5")
    assert status == 2
    assert "(sampling.seed: 0 and 5; own: its questions or prompts differ)" in text
    assert run(*flags, "--fresh")[0] == 0
    assert run(*flags)[0] == 0
    status, text = run("score", "own.jsonl", "--answers", "out/own/answers.jsonl")
    assert (status, "accuracy" in text) == (0, True)
    status, text = run("pope", "-q")
    assert status == 2
    assert "there is no data folder" in text
