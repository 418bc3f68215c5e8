"""`llava models`: the models that have a name, their sizes, and which of them are here and fit this machine.

In: nothing. Out: a table on stdout, or JSON. The names are in model/checkpoints/catalog.py; a copy is whole where all its
weight files are there. `llava pull` and `llava rm` are in pull.py and remove.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.cli.waits import size_text
from llava.errors import InputError
from llava.model.checkpoints.catalog import BYTES_OF_LAYERS, CATALOG, EMBEDDED, CatalogModel
from llava.model.checkpoints.hub import local_copy
from llava.model.checkpoints.inspect import stored_tensors

EXAMPLES = """\
examples:
  llava models                              names, sizes, what is here
  llava pull llava-1.5-7b                   download it
  llava chat -m llava-1.5-7b photo.jpg      download it if need be, and ask
  llava rm llava-1.5-7b                     remove the copy
"""
OVERHEAD = 1.15  # of the weights' memory: activations and the cache of keys and values, at least
ABOUT_EMBEDDED = "shapes, colours, counts and short words in drawn images"
FLAGS = {"bf16": "--dtype bf16", "8-bit": "--load-8bit", "4-bit": "--load-4bit"}


@dataclass(frozen=True)
class ModelRow:
    """A row of the table; sizes in bytes."""

    name: str
    repository: str | None  # None: in the package
    download: int
    memory: dict[str, int]
    fits: str  # "yes", the flag with which it does, or "no"
    here: str  # "yes", "partly" or "no"
    licence: str
    good_at: str


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava models",
        description="List the models that have a name, and what this machine can do.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    rows = list_models()
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    device, size = memory_here()
    print(as_table(rows))
    print("\nin bf16, 8-bit, 4-bit: the memory of the weights")
    print(f"fits: into the {device} of this machine, {size_text(size)}, with {OVERHEAD - 1:.0%} beside the weights")
    print("licence: of the language model; a model's own terms are on its page, https://huggingface.co/REPOSITORY")
    print("any other: llava chat -m OWNER/NAME, a folder, or a .gguf file (docs/checkpoints.md lists what is read)")


def list_models() -> list[ModelRow]:
    device, size = memory_here()
    tiny = ModelRow(EMBEDDED, None, 0, {}, "yes", "yes", "MIT", ABOUT_EMBEDDED)
    return [tiny, *(_row(name, model, device, size) for name, model in CATALOG.items())]


def _row(name: str, model: CatalogModel, device: str, size: int) -> ModelRow:
    memory = {precision: model.memory_bytes(precision) for precision in BYTES_OF_LAYERS}
    needed = memory if device == "GPU" else {"float32": 2 * memory["bf16"], **memory}  # a CPU's default
    fitting = next((precision for precision, needs in needed.items() if needs * OVERHEAD <= size), None)
    is_default = fitting == next(iter(needed))
    fits = "no" if fitting is None else "yes" if is_default else FLAGS[fitting]
    return ModelRow(
        name,
        model.repository,
        model.download_bytes,
        memory,
        fits,
        presence(model.repository),
        model.licence,
        model.good_at,
    )


def presence(repository: str) -> str:
    """Whether a repository's copy is here: yes, partly, or no."""
    folder = local_copy(repository)
    if folder is None:
        return "no"
    try:
        return "yes" if stored_tensors(folder) else "partly"
    except InputError:  # a weight file is absent or not whole
        return "partly"


def memory_here() -> tuple[str, int]:
    """The memory for a model, in bytes: that of the largest GPU, else this machine's."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return "GPU", max(int(line) for line in done.stdout.split()) * 2**20
    total = 0
    with suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    with suppress(ValueError, OSError):  # "max": no limit
        total = min(total or sys.maxsize, int(limit.read_text()))
    return "memory", total


def as_table(rows: Sequence[ModelRow]) -> str:
    head = [
        "name",
        "download",
        *(f"in {precision}" for precision in BYTES_OF_LAYERS),
        "fits",
        "here",
        "licence",
        "good at",
    ]
    lines = [head]
    for row in rows:
        sizes = [size_text(row.memory[precision]) if row.memory else "" for precision in BYTES_OF_LAYERS]
        download = size_text(row.download) if row.repository else "none"
        lines.append([row.name, download, *sizes, row.fits, row.here, row.licence, row.good_at])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
