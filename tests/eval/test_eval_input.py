"""What a user may give `llava eval score` and the task table: faulty answers, own tasks, large files, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import eval_kit as kit
import pytest
from eval_kit import kinds, scored
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import InputError
from llava.eval.files import Faults
from llava.eval.harness.scoring import load_questions, score_file, table
from llava.eval.tasks import SUITES, TASKS, custom_task, find_task, find_tasks
from llava.eval.tasks.task import LETTER_SUFFIX


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return kit.write_all(tmp_path / "data")


# --- bad input ------------------------------------------------------------------------------------------------------


def test_faults_are_counted_and_named(data: Path, tmp_path: Path) -> None:
    rows = [
        '{"question_id": 100, "text": "B"}',
        "{broken",
        '{"question_id": 100, "text": "A"}',
        '{"question_id": 7, "text": "A"}',
        '{"question_id": "v_1", "text": null}',
        "[1]",
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    report = scored("seed", tmp_path / "a.jsonl", data)
    assert kinds(report) == {
        "broken lines": 2,
        "answers without text": 1,
        "repeated answers": 1,
        "answers to unknown questions": 1,
        "missing answers": 1,
    }
    assert report.scores.figures["right"] == 1  # the last answer to 100 counts
    told = table(report)
    assert f"2 broken lines (first: {tmp_path / 'a.jsonl'}:2)" in told
    assert "1 answers to unknown questions (first: 7)" in told


def test_answers_of_another_task_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of the 1 answers .* the task's first question is '100'"):
        scored("seed", kit.answers(tmp_path / "a.jsonl", {"x": "A"}), data)


@pytest.mark.parametrize("task", list(TASKS))
def test_missing_data_is_one_sentence(task: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        load_questions(TASKS[task], tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


SCORED_HERE = ("gqa", "vizwiz", "scienceqa", "scienceqa-img", "textvqa", "pope", "mme", "mmbench", "mmbench-circular", "seed",
               "qbench", "mmmu")  # fmt: skip


@pytest.mark.parametrize("task", SCORED_HERE)
def test_empty_answers_never_divide_by_zero(task: str, data: Path, tmp_path: Path) -> None:
    """Every answer empty: a score, not a crash."""
    questions = load_questions(TASKS[task], data)
    rows = [{"question_id": i.id, "round_id": i.round, "prompt": i.row_prompt, "text": ""} for i in questions]
    report = scored(task, kit.write_lines(tmp_path / "a.jsonl", rows), data)
    assert report.scores.headline is not None
    assert 0 <= report.scores.headline < 100


# --- a task of one's own --------------------------------------------------------------------------------------------


def test_custom_rows_and_yaml(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "question": "Which?", "options": ["cat", "dog"], "answer": "dog", "category": "x"},
        {"image": "a.png", "question": "Which?", "options": ["cat", "dog"], "answer": "A"},
    ]
    kit.write_lines(tmp_path / "mine.jsonl", rows)
    (tmp_path / "mine.yaml").write_text("name: pets\nfile: mine.jsonl\nmetric: choice\n")
    task = find_task(str(tmp_path / "mine.yaml"))
    questions = load_questions(task, tmp_path)
    assert questions[0].prompt == f"Which?\nA. cat\nB. dog\n{LETTER_SUFFIX}"
    assert questions[0].images == (tmp_path / "a.png",)
    report = score_file(task, kit.answers(tmp_path / "a.jsonl", {1: "B", 2: "B"}), tmp_path)
    assert list(report.scores.verdicts) == [1.0, 0.0]
    plain = find_task(str(tmp_path / "mine.jsonl"))
    assert score_file(plain, kit.answers(tmp_path / "b.jsonl", {1: "Dog.", 2: "x"}), tmp_path).scores.headline == 50.0
    for text, named in (
        ("file: mine.jsonl\nmetrik: vqa\n", "metrik"),
        ("file: mine.jsonl\nmetric: bleu\n", "bleu"),
        ("x\n", "file"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=named):
            find_task(str(tmp_path / "bad.yaml"))


def test_a_task_is_added_to_the_table_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.write_lines(tmp_path / "mine.jsonl", [{"image": "a.png", "question": "Which?", "answer": "dog"}])
    monkeypatch.setitem(TASKS, "mine", custom_task("mine", "mine.jsonl"))
    report = score_file(find_task("mine"), kit.answers(tmp_path / "a.jsonl", {1: "dog"}), tmp_path)
    assert report.scores.headline == 100.0


def test_the_demo_s_photographs_are_optional(tmp_path: Path) -> None:
    assert [task.name for task in find_tasks("tiny", tmp_path)] == ["tiny-scenes", "tiny-reading", "tiny-yes-no"]
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/photos.jsonl").touch()
    assert [task.name for task in find_tasks("tiny,tiny-scenes", tmp_path)] == list(SUITES["tiny"])


# --- the program ----------------------------------------------------------------------------------------------------


def run_score(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "llava", "eval", "score", *words], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout


def test_scoring_ten_thousand_answers_needs_no_torch(tmp_path: Path) -> None:
    count = 10_000
    labels = [
        {"question_id": n, "image": "i.jpg", "text": f"Is there a {n}?", "label": "yes" if n % 2 else "no"}
        for n in range(count)
    ]
    kit.write_lines(tmp_path / "coco/coco_pope_random.json", labels)
    kit.write_lines(tmp_path / "llava_pope_test.jsonl", [{**row, "category": "random"} for row in labels])
    file = kit.answers(tmp_path / "a.jsonl", dict.fromkeys(range(count), "Yes"))
    code = (
        "import sys; from llava.eval.harness.main import main; "
        f"status = main(['score', 'pope', '--answers', {str(file)!r}, '--data-dir', {str(tmp_path)!r}, '--json']); "
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    found = json.loads(done.stdout)
    assert found["categories"]["random"]["f1"] == 2 / 3
    assert found["headline"] == {"name": "mean F1 of the splits", "value": 2 / 3 * 100, "unit": "%"}


def test_score_prints_json_at_full_precision_and_is_strict_when_asked(data: Path, tmp_path: Path) -> None:
    file = kit.answers(tmp_path / "a.jsonl", {100: "A"})
    status, out = run_score("seed", "--answers", str(file), "--data-dir", str(data), "--json")
    found: dict[str, Any] = json.loads(out)
    assert status == 0
    assert found["figures"]["accuracy"] == 50.0
    assert found["faults"]["missing answers"]["count"] == 1
    status, out = run_score("seed", "--answers", str(file), "--data-dir", str(data), "--strict")
    assert status == 2
    assert "1 missing answers (first: 'v_1')" in out


# --- files ----------------------------------------------------------------------------------------------------------

CELLS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff"), max_size=12)


@settings(deadline=None)  # the first call imports openpyxl
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_xlsx_round_trip(rows: list[tuple[str, str]]) -> None:
    import tempfile

    from llava.eval.files import read_xlsx, write_xlsx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.xlsx"
        write_xlsx(file, [{"a": first, "b": second} for first, second in rows], ["a", "b"])
        found = read_xlsx(file)
    assert [(row["a"], row["b"]) for row in found] == rows


def test_xlsx_keeps_numbers_and_text_apart(tmp_path: Path) -> None:
    import openpyxl

    from llava.eval.files import read_xlsx, write_xlsx

    write_xlsx(tmp_path / "t.xlsx", [{"index": 7, "prediction": "=A & <B>\x00"}], ["index", "prediction"])
    cells = list(openpyxl.load_workbook(tmp_path / "t.xlsx").active)[1]
    assert [(cell.value, cell.data_type) for cell in cells] == [(7, "n"), ("=A & <B>", "s")]
    book = openpyxl.Workbook()
    book.active.append(["index", "gap", "prediction"])
    book.active.append([7, None, "B"])
    book.save(tmp_path / "o.xlsx")
    assert read_xlsx(tmp_path / "o.xlsx") == [{"index": "7", "gap": "", "prediction": "B"}]
    (tmp_path / "bad.xlsx").write_text("no zip archive")
    with pytest.raises(InputError, match=r"bad\.xlsx' is not an \.xlsx table"):
        read_xlsx(tmp_path / "bad.xlsx")


def test_xlsx_refuses_a_cell_that_would_be_cut(tmp_path: Path) -> None:
    from llava.eval.files import MAX_XLSX_CHARACTERS, read_xlsx, write_xlsx

    longest = "x" * MAX_XLSX_CHARACTERS
    write_xlsx(tmp_path / "t.xlsx", [{"a": longest + "\x00"}], ["a"])  # a forbidden character is left out first
    assert read_xlsx(tmp_path / "t.xlsx") == [{"a": longest}]
    with pytest.raises(InputError, match=r"row 3, column 'b' of '.*u\.xlsx' has 32,768 characters, .* \.csv"):
        write_xlsx(tmp_path / "u.xlsx", [{"a": 1, "b": "x"}, {"a": 2, "b": longest + "y"}], ["a", "b"])
    assert not (tmp_path / "u.xlsx").exists()


def test_xlsx_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.eval.files import write_xlsx

    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[eval\]'"):
        write_xlsx(tmp_path / "t.xlsx", [{"a": "x"}], ["a"])


def test_faults_keep_their_first() -> None:
    faults = Faults()
    for place in ("here", "there"):
        faults.add("things", "they matter", place)
    assert faults.sentences() == ["2 things (first: here): they matter"]
