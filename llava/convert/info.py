"""`llava info`: describe a model folder or GGUF file.

In: a path. Out: lines, or JSON. The facts come from describe.py.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.convert.describe import CheckpointDescription, as_json, describe_checkpoint
from llava.convert.options import size_text

EXAMPLES = """\
examples:
  llava info ./llava-v1.5-7b
  llava info ./checkpoints/my-lora --json
  llava info ./gguf/mmproj-llava-v1.5-7b-f16.gguf
"""
WIDTH = 20


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava info",
        description="Say what a model folder or GGUF file holds, without loading it: layout, parts, sizes, template, what is "
        "missing, and which programs read it.",
        epilog=EXAMPLES,
    )
    parser.add_argument("path", metavar="PATH", help="a model folder, or a .gguf file")
    parser.add_argument(
        "--model-base", metavar="FOLDER", help="base model of an adapter or projector (default: what its files name)"
    )
    parser.add_argument(
        "--mmproj", metavar="FILE", help="tower and projector of a .gguf file (default: found beside it)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    description = describe_checkpoint(args.path, args.model_base, mmproj=args.mmproj)
    print(as_json(description) if args.json else "\n".join(lines(description)))


def lines(description: CheckpointDescription) -> list[str]:
    rows: list[tuple[str, str]] = [("path", description.path)]
    rows += [(key, _text(value)) for key, value in description.facts.items()]
    rows += [
        ("parameters", ", ".join(f"{name} {_millions(count)}" for name, count in description.parameters.items())),
        ("stored", ", ".join(f"{size_text(size)} {name}" for name, size in description.stored_bytes.items())),
        (
            "memory of weights",
            ", ".join(f"{size_text(size)} in {name}" for name, size in description.memory_bytes.items()),
        ),
    ]
    rows = [row for row in rows if row[1]]
    rows += [("missing", sentence) for sentence in description.missing]
    rows += [(f"read by {name}", answer) for name, answer in description.readers.items()]
    width = max(WIDTH, max(len(key) for key, _ in rows) + 2)
    return [f"{key:<{width}}{value}" for key, value in rows]


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


if __name__ == "__main__":
    sys.exit(main())
