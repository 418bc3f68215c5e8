"""MME: two yes/no questions about each image, in fourteen categories of perception and cognition.

Reads `llava_mme.jsonl` and the answers in `MME_Benchmark_release_version/CATEGORY/` (or `.../questions_answers_YN/`). Scored
by the official rule, from answers or from the official results folder: a text file for each category, a line
`image<TAB>question<TAB>reference<TAB>answer` for each question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import Faults, find_optional, need, read_json_lines, read_text
from llava.eval.metrics.yes_no import mme_answer, mme_figures
from llava.eval.tasks.task import WORD_SUFFIX, Task
from llava.eval.types import AnsweredQuestion, Question, Scores

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
GROUPS = {"perception": PERCEPTION, "cognition": COGNITION}
YES_NO_SUFFIX = "Please answer yes or no."


def read(folder: Path) -> list[Question]:
    places = ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version")
    release = find_optional(folder, places) or folder / places[-1]
    truths = read_truths(release)
    file = find_optional(folder, ("llava_mme.jsonl",))
    questions = []
    for name, prompt, image in _asked(file, release) if file is not None else _release_questions(truths, release):
        category, _, file_name = name.partition("/")
        question = plain_question(prompt)
        answer = truths.get((category, Path(file_name).stem, question))
        if answer is None:
            raise InputError(f"MME's question {question!r} about {name!r} has no answer in {str(release)!r}")
        extra = {"question": question, "file": f"{Path(file_name).stem}.txt"}
        questions.append(Question(name, prompt, (image,), category, answer, extra=extra))
    return questions


def _asked(file: Path, release: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield id, prompt and image of each question in LLaVA's file."""
    for row in read_json_lines(file):
        where = f"a question of {str(file)!r}"
        name, prompt, image = (str(need(row, key, where)) for key in ("question_id", "text", "image"))
        yield name, prompt, release / image


def _release_questions(truths: Iterable[tuple[str, str, str]], release: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield the same from MME's own files."""
    for category, stem, question in truths:
        files = (file for below in ("images", "") for file in (release / category / below).glob(f"{stem}.*"))
        found = [file for file in files if file.suffix != ".txt"]
        image = found[0] if found else release / category / f"{stem}.jpg"
        yield f"{category}/{image.name}", f"{question}\n{WORD_SUFFIX}", image


def read_truths(release: Path) -> dict[tuple[str, str, str], str]:
    """Map (category, image's stem, question) to yes or no, from either of the two layouts of category folders."""
    truths = {}
    for category in (*PERCEPTION, *COGNITION):
        folder = find_optional(release, (f"{category}/questions_answers_YN", category))
        for file in sorted(folder.glob("*.txt")) if folder is not None else ():
            for number, line in enumerate(read_text(file).splitlines(), start=1):
                if not line.strip():
                    continue
                question, tab, answer = line.strip().partition("\t")
                if not tab or answer.strip().lower() not in ("yes", "no"):
                    raise InputError(f"{file}:{number} is not a question, a tab and Yes or No")
                truths[category, file.stem, " ".join(question.split())] = answer.strip()
    if not truths:
        raise InputError(f"MME's answers are missing: no CATEGORY/*.txt in {str(release)!r}")
    return truths


def plain_question(prompt: str) -> str:
    """Return the question as MME's files have it: with its own request for yes or no, without LLaVA's."""
    question = " ".join(prompt.replace(WORD_SUFFIX, "").split())
    return question if YES_NO_SUFFIX in question else f"{question} {YES_NO_SUFFIX}"


def score(answered: Sequence[AnsweredQuestion]) -> Scores:
    parsed = [mme_answer(given.text or "") for given in answered]
    images: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for given, answer in zip(answered, parsed, strict=True):
        question, pair = given.question, (answer, given.question.reference.lower())
        images.setdefault(question.category, {}).setdefault(str(question.id), []).append(pair)
    categories = {category: mme_figures(list(found.values())) for category, found in images.items()}
    notes = [
        f"{category}: {number} images have one question or more than two, so accuracy+ is over all that they have"
        for category, found in images.items()
        if (number := sum(len(pairs) != 2 for pairs in found.values()))
    ]
    truths = [given.question.reference.lower() for given in answered]
    verdicts = [float(answer == truth) for answer, truth in zip(parsed, truths, strict=True)]
    return totals(categories, verdicts, notes)


def totals(categories: dict[str, dict[str, float | int]], verdicts: Sequence[float], notes: Sequence[str]) -> Scores:
    worth = {name: found["score"] for name, found in categories.items()}
    figures = {group: sum(worth.get(name, 0) for name in names) for group, names in GROUPS.items()}
    missing = [name for names in GROUPS.values() for name in names if name not in categories]
    all_notes = [*notes, *([f"no answers in {', '.join(missing)}: these add nothing to the sums"] if missing else [])]
    ordered = {name: categories[name] for names in GROUPS.values() for name in names if name in categories}
    return Scores(figures, ordered, verdicts, headline=figures["perception"], notes=tuple(all_notes))


def score_results(path: Path, folder: Path, faults: Faults) -> Scores | None:
    """Score MME's results folder, which has references beside answers. Lines are read in pairs, as by the official tool."""
    if not path.is_dir() or not any((path / f"{name}.txt").is_file() for names in GROUPS.values() for name in names):
        return None
    categories, verdicts = {}, []
    for name in (*PERCEPTION, *COGNITION):
        file = path / f"{name}.txt"
        if not file.is_file():
            continue
        rows = list(_result_rows(file, faults))
        pairs = [(mme_answer(answer), truth.lower()) for _, truth, answer in rows]
        images = [pairs[start : start + 2] for start in range(0, len(pairs), 2)]
        apart = next((n for n in range(0, len(rows) - 1, 2) if rows[n][0] != rows[n + 1][0]), None)
        if len(pairs) % 2 or apart is not None:
            where = f"line {apart + 1}" if apart is not None else "its last line"
            raise InputError(f"{str(file)!r} must have two lines for each image, one after the other; see {where}")
        categories[name] = mme_figures(images)
        verdicts += [float(answer == truth) for answer, truth in pairs]
    return totals(categories, verdicts, ())


def _result_rows(file: Path, faults: Faults) -> list[tuple[str, str, str]]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) < 4 or parts[2].lower() not in ("yes", "no"):
            raise InputError(f"{file}:{number} is not image, question, Yes or No, and answer with tabs between them")
        if len(parts) > 4:
            faults.add("answers with tabs in them", "the first four columns of the line count", f"{file}:{number}")
        rows.append((parts[0], parts[2], parts[3]))
    return rows


def write(answered: Sequence[AnsweredQuestion], home: Path, folder: Path) -> Path:
    """Write the official results folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for given in answered:
        question = given.question
        answer = " ".join((given.text or "").split())
        lines.setdefault(question.category, []).append(
            "\t".join([question.extra["file"], question.extra["question"], question.reference, answer]) + "\n"
        )
    for category, found in lines.items():
        (folder / f"{category}.txt").write_text("".join(found), encoding="utf-8")
    return folder


MME = Task(
    "mme", "MME", "MME", read, score,
    headline="perception", unit="points of 2000", highest=2000, write=write, score_results=score_results,
)  # fmt: skip
