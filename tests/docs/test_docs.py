"""What the documents say: files, functions, links, commands and printed output are those of this tree.

`python tests/docs/test_docs.py` writes what the Python snippets print today under them, in both languages; read the difference.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from repository import PACKAGE, ROOT, Block, blocks, defined_in, name_of, prose

from llava.cli.commands import COMMANDS

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/*.md"), *PACKAGE.rglob("*.md")])
PAGES = [path for path in DOCUMENTS if path.parent in (ROOT, ROOT / "docs")]
SNIPPET_PAGES = ("checkpoints", "differences", "engine", "extend", "roadmap", "trace", "videos")
TRANSLATED = (
    "index", "tour", "roadmap", "trace", "debug", "doctor", "checkpoints", "convert", "serving", "engine", "kernels",
    "evaluate", "finetune", "training", "data", "extend", "differences",
)  # fmt: skip
TRANSLATIONS = [
    ("README.md", "README.zh-CN.md"),
    *((f"docs/{name}.md", f"docs/{name}.zh-CN.md") for name in TRANSLATED),
]


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", paths, ids=name_of)


# References: `path.py:name`, links, images


@each(PAGES)
def test_functions_that_are_named_exist(page: Path) -> None:
    for path, name in re.findall(r"`([\w/.-]+\.py):([\w.]+)`", page.read_text(encoding="utf-8")):
        file = ROOT / path if (ROOT / path).is_file() else PACKAGE / path
        assert file.is_file(), f"{path}:{name}"
        assert name in defined_in(file), f"{path}:{name}"


def test_the_route_names_functions_in_every_part() -> None:
    """A rename must not make the check above pass by finding nothing."""
    named = re.findall(r"`(llava/[\w/]+)\.py:[\w.]+`", (ROOT / "docs/roadmap.md").read_text(encoding="utf-8"))
    assert len(named) > 100
    assert {"llava/serve/cli", "llava/mm_utils", "llava/model/llava_arch", "llava/train/train"} <= set(named)


@each(PAGES)
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths that begin in a folder of this repository, in prose; patterns and placeholders aside."""
    for path in re.findall(r"`((?:llava|tests|scripts|recipes|benchmarks|docs|images)/[\w/.-]+)`", prose(page)):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path


@each(DOCUMENTS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file), flags=re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


# Commands and snippets


def commands(block: Block) -> list[str]:
    """The commands of a block, continued lines joined, comments dropped."""
    text = block.text.replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in text.splitlines() if block.kind == "bash" or line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def all_commands(page: Path) -> list[str]:
    return [command for block in blocks(page) if block.kind in ("bash", "console") for command in commands(block)]


def as_llava(words: list[str]) -> list[str] | None:
    """The words after `llava` of a command that starts it, however it is started."""
    if words[:1] == ["llava"]:
        return words[1:]
    if words[:2] != ["python", "-m"]:
        return None
    modules = {"llava": [], "llava.serve.cli": ["cli"], "llava.cli.chat": ["chat"], "llava.train.train": ["train"]}
    modules |= {f"llava.serve.{name}": [name] for name in ("openai_worker", "sglang_worker")}
    return modules[words[2]] + words[3:]


def eval_parser(argv: list[str]) -> tuple[Any, list[str]]:
    """The parser of the program that the words after `llava eval` pick, and the words left for it."""
    from importlib import import_module

    from llava.eval.harness.main import PROGRAMS

    module = PROGRAMS.get(argv[0])
    program = import_module(f"llava.eval.harness.{module or 'run'}")
    return program.build_parser(), argv[1:] if module else argv


def parse_command(name: str, argv: list[str]) -> Any:
    """Give the words after `llava NAME` to that program's own parser."""
    from llava.data.program import check_parser, show_parser
    from llava.train.arguments import parse_train_args

    if name == "train":
        return parse_train_args(argv)
    if name == "data":
        return {"check": check_parser, "show": show_parser}[argv[0]]().parse_args(argv[1:])
    if name == "eval":
        parser, argv = eval_parser(argv)
        return parser.parse_args(argv)
    if name == "trace" and "--" in argv:  # what follows is for training
        argv = argv[: argv.index("--")]
    # Workers before other servers are started by their modules' names alone.
    module = COMMANDS[name].module if name in COMMANDS else f"llava.serve.{name}"
    return import_module(module).build_parser().parse_args(argv)


@each(PAGES)
def test_commands_parse(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for command in all_commands(page):
        words = shlex.split(command.rpartition(" | ")[2], comments=True)
        program = as_llava(words)
        if program is not None:
            parse_command(program[0], program[1:])
            given = [word for word in words if word.startswith(("tests/", "images/", "llava/"))]
            assert all((ROOT / word).exists() for word in given), command
        elif words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "pip":
            assert set(re.findall(r"\[([\w,]+)\]", command)) <= set(extras), command
        elif words[:2] == ["serve", "run"]:  # Ray's program
            module, _, name = words[2].partition(":")
            assert name in defined_in(ROOT / f"{module.replace('.', '/')}.py"), command
        elif words[0].endswith("python") and words[1:3] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[3:]), command
        elif words[0] == "pre-commit":
            assert (ROOT / ".pre-commit-config.yaml").is_file(), command
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), command
        else:
            raise AssertionError(f"no rule says how to check {command!r}")


@pytest.mark.slow
def test_one_test_file_runs_as_contributors_are_told() -> None:
    told = next(c for c in all_commands(ROOT / "CONTRIBUTING.md") if " -m pytest " in c and c.endswith(".py"))
    words = shlex.split(told)
    assert words[0] == ".venv/bin/python"  # which make test sets up; here the tests' own
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@pytest.fixture(scope="module")
def embedded() -> Any:
    from llava.assets import embedded_model_path
    from llava.model.builder import load

    return load(embedded_model_path(), device="cpu")


def exchanges(page: Path) -> list[tuple[str, str]]:
    """The commands of a page's console blocks, each with what is shown under it."""
    shown = [block.text for block in blocks(page) if block.kind == "console"]
    parts = [part for text in shown for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    return [(command, output) for command, _, output in (part.partition("\n") for part in parts)]


def typed_and_words(command: str) -> tuple[str, list[str]]:
    """What a command gets from the pipe before it, and its own words."""
    source, _, program = command.rpartition(" | ")
    typed = subprocess.run(source, shell=True, capture_output=True, text=True, check=True).stdout if source else ""
    return typed, shlex.split(program)


@each([page for page in PAGES if exchanges(page)])
def test_shown_answers_are_the_embedded_model_s(
    page: Path, embedded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `llava chat` of a console block prints what stands under it; the model is loaded once for all."""
    from llava.cli import chat

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(chat, "load_model", lambda args: embedded)
    for command, shown in exchanges(page):
        if not re.search(r"(^| \| )llava chat ", command):
            continue
        typed, words = typed_and_words(command)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert chat.main(words[2:]) == 0
        assert capsys.readouterr().out == shown, command


def test_the_original_command_line_prints_what_the_route_shows() -> None:
    (command, shown), *_ = exchanges(ROOT / "docs/roadmap.md")
    typed, words = typed_and_words(command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=ROOT,
        input=typed,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()] == [line.strip() for line in shown.splitlines()]


def run_snippets(page: Path) -> list[tuple[str, str | None, str]]:
    """Run a page's Python blocks one after another: (code, what stands under it, what it printed)."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    results = []
    following = [*blocks(page)[1:], Block("", "")]
    for block, after in zip(blocks(page), following, strict=True):
        if block.kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.text, name_of(page), "exec"), namespace)
            results.append((block.text, after.text if after.kind == "text" else None, printed.getvalue()))
    return results


@each([ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in SNIPPET_PAGES)])
def test_snippets_print_what_stands_under_them(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = run_snippets(page)
    assert results
    for code, shown, printed in results:
        assert printed == (shown or ""), code


# Both languages


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS)
def test_translations_are_equal_in_substance(english: str, chinese: str) -> None:
    """The same code and output, functions and images, and tables of the same size; headings: scripts/docs/translations.py."""
    first, second = ROOT / english, ROOT / chinese
    assert [(b.kind, without_comments(b)) for b in blocks(first)] == [
        (b.kind, without_comments(b)) for b in blocks(second)
    ]

    def shape(page: Path) -> dict[str, list[Any]]:
        text = prose(page)
        return {
            "rows": [row.count(" | ") for row in text.splitlines() if row.startswith("|")],
            "functions": sorted(re.findall(r"`([\w/.-]+\.py:[\w.]+)`", text)),
            "images": re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text),
        }

    assert shape(first) == shape(second)


def without_comments(block: Block) -> str:
    """Comments are in the language of the page."""
    return re.sub(r" *# .*$", "", block.text, flags=re.MULTILINE)


def write_outputs(pages: Sequence[str]) -> None:
    os.chdir(ROOT)
    for name in pages:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        for code, shown, printed in run_snippets(page):
            if shown is not None:
                start = text.index("```text\n", text.index(code)) + len("```text\n")
                text = text[:start] + printed + text[text.index("```", start) :]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_outputs([*(page for pair in TRANSLATIONS for page in pair), "docs/checkpoints.md", "docs/extend.md"])
