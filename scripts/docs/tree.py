"""Draw the package as a tree: every file with the first sentence of its docstring.

`make docs-tree` prints it, and the site of docs/ shows it in docs/architecture.md. It is drawn from the files themselves,
so a new file appears in it with its docstring and nothing else has to be edited.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llava"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE, help="folder to draw (default: the package)")
    print(draw(parser.parse_args().folder.resolve()))
    return 0


def draw(folder: Path) -> str:
    """Return the tree of a folder's Python files, files before folders, one line each."""
    return "\n".join(_lines(folder, 0))


def first_sentence(path: Path) -> str:
    """Return what a module's docstring says in its first line; empty for a module without one."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0] if docstring else ""


def _lines(folder: Path, depth: int) -> list[str]:
    files = sorted(folder.glob("*.py"))
    package = folder / "__init__.py"
    lines = [f"{'  ' * depth}{folder.name}/".ljust(40) + (first_sentence(package) if package.is_file() else "")]
    for path in files:
        if path != package:
            lines.append(f"{'  ' * (depth + 1)}{path.name}".ljust(40) + first_sentence(path))
    for below in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))):
        lines += _lines(below, depth + 1)
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    sys.exit(main())
