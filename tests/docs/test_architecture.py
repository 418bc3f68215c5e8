"""The architecture that docs/architecture.md draws is that of the tree: files, layers, imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from repository import PACKAGE, ROOT, blocks, name_of


def drawn_files(tree: str) -> list[str]:
    """Paths of the .py files in a drawing of folders, by indentation."""
    files, folders = [], []
    for line in tree.splitlines():
        name, _, what_for = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert what_for.strip(), f"{name} has no annotation"
            files.append("".join(folders) + name)
    return files


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = drawn_files(next(block.text for block in blocks(ROOT / "docs/architecture.md") if "llava/\n" in block.text))
    assert len(drawn) == len(set(drawn))
    assert sorted(drawn) == sorted(name_of(path) for path in PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    module: str
    at_import: bool  # outside of any function


@cache
def imports(path: Path) -> list[Import]:
    """Everything that a file imports at run time; what is imported for type checkers alone is left out."""
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")), True))


def _imports(node: ast.AST, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), at_import)
        elif isinstance(child, ast.Import):
            yield from (Import(name.name, at_import) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield Import(str(child.module), at_import)
            if child.module and child.module.split(".")[0] == "llava":  # from llava import conversation
                yield from (Import(f"{child.module}.{name.name}", at_import) for name in child.names)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, at_import and not is_function)


def part_of(module: str) -> str | None:
    """llava.model.builder -> model; names that are no module of the package give None."""
    name, _, rest = module.partition(".")
    part = rest.split(".")[0]
    known = part and ((PACKAGE / f"{part}.py").is_file() or (PACKAGE / part).is_dir())
    return part if name == "llava" and known else None


# Programs that outside code starts under these names, and the part of the package that they belong to.
PROGRAMS_IN_MODEL = {f"model/{name}.py": "convert" for name in ("make_delta", "apply_delta", "consolidate")}


def own_part(path: Path) -> str:
    name = str(path.relative_to(PACKAGE))
    return PROGRAMS_IN_MODEL.get(name, path.relative_to(PACKAGE).parts[0].removesuffix(".py"))


def layers() -> list[list[str]]:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = text.split("| layer | modules |")[1].split("\n\n")[0].splitlines()[2:]
    return [re.findall(r"`(\w+)`", row) for row in rows]


def test_imports_obey_the_layers() -> None:
    order = {part: number for number, row in enumerate(layers()) for part in row}
    assert set(order) == {own_part(path) for path in PACKAGE.rglob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        for imported in imports(path):
            part = part_of(imported.module)
            if part is not None:
                assert order[part] <= order[own_part(path)], f"{name_of(path)} imports {imported.module}"
                assert {part, own_part(path)} != {"serve", "train"}, f"{name_of(path)} imports {imported.module}"


LIGHT_PARTS = {"generation", "streaming", "mm_utils"}
LIGHT_MODEL_FILES = {"config", "hub", "weight_files", "transformers_layout", "checkpoint", "habits", "utils"}
LIGHT_CONVERT_FILES = {"program", "info", "words", "description", "gguf_file", "merge_lora"}
HEAVY = {"torch", "transformers", "numpy", "PIL"}


def test_what_imports_nothing_heavy() -> None:
    rows = layers()
    light = {*rows[0], *rows[1], *rows[-3], *LIGHT_PARTS}
    assert {"conversation", "geometry", "program"} <= light
    for path in PACKAGE.rglob("*.py"):
        light_files = {"model": LIGHT_MODEL_FILES, "convert": LIGHT_CONVERT_FILES}.get(path.parent.name, set())
        if own_part(path) in light or path.stem in light_files:
            loaded = {imported.module.split(".")[0] for imported in imports(path) if imported.at_import}
            assert not loaded & HEAVY, name_of(path)
    for name in ("conversation", "geometry"):
        assert "torch" not in {imported.module.split(".")[0] for imported in imports(PACKAGE / f"{name}.py")}


def test_only_programs_know_the_command_line() -> None:
    programs = {part for row in layers()[-3:] for part in row}
    for path in PACKAGE.rglob("*.py"):
        if own_part(path) not in programs:
            assert not {imported.module for imported in imports(path)} & {"argparse", "optparse", "click"}, name_of(
                path
            )
            assert "sys.argv" not in path.read_text(encoding="utf-8"), name_of(path)


def test_the_heart_of_the_model_stands_alone() -> None:
    heart = [PACKAGE / "model/splice.py", PACKAGE / "model/merge.py", PACKAGE / "model/multimodal_projector/builder.py"]
    for path in heart:
        own = {part for imported in imports(path) if (part := part_of(imported.module))}
        assert own <= {"constants", "errors", "geometry"}, name_of(path)
