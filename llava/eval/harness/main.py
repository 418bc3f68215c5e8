"""`llava eval`: run the program that the first word names.

In: a command line. Out: an exit status. `score`, `compare`, `report` and `list` are the modules in `PROGRAMS`; any other
first word is a list of tasks for run.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

PROGRAMS = {"score": "scoring", "compare": "compare", "report": "report", "list": "task_list"}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    module = PROGRAMS.get(words[0]) if words else None
    program = import_module(f"llava.eval.harness.{module or 'run'}")
    return program.build_parser().run(program.run, words[1:] if module else words)


if __name__ == "__main__":
    sys.exit(main())
