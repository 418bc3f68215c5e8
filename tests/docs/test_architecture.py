"""Check the package against docs/architecture.md: layers, circles, sizes of folders, names, pointers and types."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from repository import PACKAGE, ROOT, defined_in, name_of

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAX_FILES, MAX_ROOT_FILES = 24, 12


class Import(NamedTuple):
    module: str
    at_import: bool  # outside of any function
    for_types: bool  # below `if TYPE_CHECKING`


@cache
def imports(path: Path) -> list[Import]:
    """All imports of a file, those inside of functions and those for type checkers too."""
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")), True, False))


def _imports(node: ast.AST, at_import: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(ast.Module(child.body, []), at_import, True)
            yield from _imports(ast.Module(child.orelse, []), at_import, for_types)
        elif isinstance(child, ast.Import):
            yield from (Import(name.name, at_import, for_types) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield Import(str(child.module), at_import, for_types)
            # from llava import conversation
            yield from (Import(f"{child.module}.{name.name}", at_import, for_types) for name in child.names)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, at_import and not is_function, for_types)


@cache
def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports, at run time or for types."""
    return {MODULES[imported.module] for imported in imports(path) if imported.module in MODULES} - {path}


def third_party(path: Path) -> set[str]:
    """Packages that are loaded when a file is imported."""
    return {
        imported.module.split(".")[0] for imported in imports(path) if imported.at_import and not imported.for_types
    }


def part_of(path: Path) -> str:
    """The folder or file below llava/ that a file belongs to, without its suffix."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layers() -> list[list[str]]:
    """The table of docs/architecture.md: a layer's folders and files, from the lowest layer up."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = text.split("| layer | parts |")[1].split("\n\n")[0].splitlines()[2:]
    return [re.findall(r"`(\w+)`", row.split("|")[2]) for row in rows]


# Imports


def test_imports_point_from_right_to_left_only() -> None:
    order = {part: number for number, row in enumerate(layers()) for part in row}
    assert set(order) == {part_of(path) for path in MODULES.values()}
    for path in MODULES.values():
        for imported in imported_files(path) - {PACKAGE / "__init__.py"}:  # which names the version
            assert order[part_of(imported)] <= order[part_of(path)], f"{name_of(path)} imports {name_of(imported)}"
            assert {part_of(imported), part_of(path)} != {"serve", "train"}, (
                f"{name_of(path)} imports {name_of(imported)}"
            )


def test_no_files_import_each_other() -> None:
    """Neither directly nor by way of others; imports inside of functions and for types count."""
    package = PACKAGE / "__init__.py"  # its names are imported when they are first used
    graph = {path: imported_files(path) - {package} for path in MODULES.values() if path != package}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(name_of(path) for path in error.args[1]))


def test_no_folders_import_each_other() -> None:
    """Of the folders that lie in one folder, none imports another that imports it."""
    graph: dict[Path, dict[Path, set[Path]]] = defaultdict(lambda: defaultdict(set))
    for path in MODULES.values():
        for imported in imported_files(path):
            for parent in path.parents:
                if parent in imported.parents:
                    first, second = (child.relative_to(parent).parts[0] for child in (path, imported))
                    if first != second and not first.endswith(".py") and not second.endswith(".py"):
                        graph[parent][parent / first].add(parent / second)
                    break
    assert graph
    for folders in graph.values():
        try:
            TopologicalSorter(folders).prepare()
        except CycleError as error:
            pytest.fail(" <- ".join(name_of(path) for path in error.args[1]))


LIGHT_FILES = [
    *sorted(PACKAGE.glob("*.py")), *sorted((PACKAGE / "cli").glob("*.py")), *sorted((PACKAGE / "eval/metrics").glob("*.py")),
    *(PACKAGE / f"images/{name}.py" for name in ("layout", "io", "download")),
    *(PACKAGE / f"model/{name}.py" for name in ("config", "template_defaults", "utils")),
    *(PACKAGE / f"model/checkpoints/{name}.py" for name in ("hub", "inspect", "hf_layout", "weight_files")),
    *(
        PACKAGE / f"model/checkpoints/gguf/{name}.py"
        for name in ("config", "file", "folder", "names", "tensors", "tokenizer")
    ),
    *(PACKAGE / f"convert/{name}.py" for name in ("program", "info", "options", "describe", "merge_lora")),
    PACKAGE / "engine/request.py",
]  # fmt: skip
HEAVY = {"torch", "transformers", "numpy", "PIL"}


@pytest.mark.parametrize("path", [path for path in LIGHT_FILES if path.name != "processor.py"], ids=name_of)
def test_what_imports_nothing_heavy(path: Path) -> None:
    assert not third_party(path) & HEAVY


@pytest.mark.parametrize("name", ["images/layout", "conversation"])
def test_arithmetic_and_templates_use_no_torch(name: str) -> None:
    assert "torch" not in {imported.module.split(".")[0] for imported in imports(PACKAGE / f"{name}.py")}


def test_only_programs_know_the_command_line() -> None:
    order = [part for row in layers() for part in row]
    below = set(order[: order.index("cli")])
    for path in MODULES.values():
        if part_of(path) in below:
            assert not {imported.module for imported in imports(path)} & {"argparse", "optparse", "click"}, name_of(
                path
            )
            assert "sys.argv" not in path.read_text(encoding="utf-8"), name_of(path)


@pytest.mark.parametrize("name", ["model/splice", "model/merge", "model/multimodal_projector/builder"])
def test_the_core_of_the_model_stands_alone(name: str) -> None:
    own = {str(path.relative_to(PACKAGE)) for path in imported_files(PACKAGE / f"{name}.py")}
    assert own <= {"constants.py", "errors.py", "images/layout.py", "images/__init__.py"}


# Folders, names, pointers, types


def test_folders_are_small() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        number = len(list(folder.glob("*.py")))
        assert number <= (MAX_ROOT_FILES if folder == PACKAGE else MAX_FILES), f"{name_of(folder)}: {number} files"


def test_a_class_name_is_used_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{name_of(path)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.parametrize("path", MODULES.values(), ids=name_of)
def test_a_module_says_what_it_is_and_names_files_that_exist(path: Path) -> None:
    """The first line stands in the drawn tree; a file is named from llava/, from the repository, or as a neighbour."""
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        return
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "no docstring"
    assert docstring.splitlines()[0].endswith((".", "!")), "the first line of the docstring is no sentence"
    for named, function in re.findall(
        r"(?<![\w/.{-])((?:[\w-]+/)*[\w-]+\.(?:py|cpp))(?::([\w.]+))?(?![\w/])", _prose(text)
    ):
        if named in NOT_OURS:
            continue
        file = next((place / named for place in (path.parent, PACKAGE, ROOT) if (place / named).is_file()), None)
        assert file is not None, f"{named} does not exist"
        assert not function or file.suffix != ".py" or function in defined_in(file), f"{named} has no {function}"


NOT_OURS = {"llama.cpp", "zero_to_fp32.py"}


def _prose(text: str) -> str:
    """Comments and strings of a module, where files are named."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING))


def test_few_annotations_say_nothing() -> None:
    """Plain `Any`, in annotations of the package outside of the kernels: at most 2 in 100."""
    annotations = [
        ast.unparse(annotation)
        for path in MODULES.values()
        if "kernels" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if annotation is not None
    ]
    plain = sum(annotation in ("Any", "Any | None") for annotation in annotations)
    assert plain <= len(annotations) * 0.02, f"{plain} of {len(annotations)}"
