"""`llava examples`: put the configurations of training and the example data into a folder.

In: a folder. Out: the files that a clone has, at the same places below it, so that the commands of the documentation work after
an installation without a clone. They lie in the clone, or among the shared files of an installation (pyproject.toml).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.errors import InputError

EXAMPLES = """\
examples:
  llava examples                            into this folder
  llava train playground/logos/lora.yaml    then: a fine-tuning run of a minute
  llava train scripts/configs/finetune_lora.yaml model_name_or_path=liuhaotian/llava-v1.5-7b data_path=mine.json
"""
# What is shipped, as patterns below the root of a clone; pyproject.toml lists the same for installations.
SHIPPED = (
    "scripts/configs/*.yaml",
    "scripts/*.json",
    "playground/logos/*.*",
    "playground/logos/images/*.png",
    "images/demo.jpg",
)
SHARED = "share/llava/"  # where an installation has them


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava examples", description="Write example configurations and data into a folder.", epilog=EXAMPLES
    )
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="(default: this folder)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    target = Path(args.folder).expanduser()
    files = dict(shipped_files())
    if not files:
        raise InputError("this installation has no examples; clone the repository, or install its wheel again")
    other = next((target / name for name, file in files.items() if _differs(target / name, file)), None)
    if other is not None:
        raise InputError(f"{other} exists and is another file; name another folder, or move it away first")
    absent = {name: file for name, file in files.items() if not (target / name).exists()}
    for name, file in absent.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(file.read_bytes())
    print(f"{len(absent)} files written below {target.absolute()}, {len(files) - len(absent)} were there")
    print("try: llava train playground/logos/lora.yaml")


def shipped_files() -> Iterator[tuple[str, Path]]:
    """The path of each file below a folder, and where it is."""
    root = Path(__file__).absolute().parents[2]
    if (root / "pyproject.toml").is_file():
        for pattern in SHIPPED:
            yield from ((file.relative_to(root).as_posix(), file) for file in sorted(root.glob(pattern)))
        return
    from importlib import metadata

    try:
        listed = metadata.files("llava") or []
    except metadata.PackageNotFoundError:
        return
    for file in listed:
        _, shared, name = file.as_posix().partition(SHARED)
        if shared:
            yield name, Path(str(file.locate()))


def _differs(target: Path, file: Path) -> bool:
    return target.exists() and (not target.is_file() or target.read_bytes() != file.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
