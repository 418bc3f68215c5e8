"""Collect the typefaces that fonts.txt lists into one folder, cut down to printable ASCII.

In: a folder that holds font files anywhere below it (unpacked Debian packages, or /usr/share/fonts).
Out: OUT/train/*.ttf|otf and OUT/held/*.ttf|otf, about 2 MB. Nothing here is committed: typefaces have their own licences.

    python recipes/tiny/fonts.py --print-packages | xargs apt-get download && for d in *.deb; do dpkg -x $d unpacked; done
    python recipes/tiny/fonts.py --source unpacked --out .tinydata/fonts       # needs fonttools to cut; else copies whole files
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("fonts.txt")


@dataclass(frozen=True)
class Face:
    """One line of fonts.txt."""

    split: str
    stem: str
    package: str


def read_faces(path: Path = LIST) -> list[Face]:
    lines = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [Face(*line) for line in lines]


def collect(source: Path, out: Path) -> tuple[int, list[str]]:
    """Copy every listed face found below `source`; returns how many were found and which were not."""
    found = {p.stem.replace(" ", "_"): p for ext in ("otf", "ttf") for p in sorted(source.rglob(f"*.{ext}"))}
    missing = []
    for face in read_faces():
        (out / face.split).mkdir(parents=True, exist_ok=True)
        if face.stem not in found:
            missing.append(face.stem)
            continue
        origin = found[face.stem]
        cut(origin, out / face.split / f"{face.stem}{origin.suffix.lower()}")
    return len(read_faces()) - len(missing), missing


def cut(origin: Path, target: Path) -> None:
    try:
        from fontTools import subset
    except ImportError:
        shutil.copyfile(origin, target)
        return
    options = subset.Options(layout_features=["kern"], hinting=False, notdef_outline=True)
    options.drop_tables += ["FFTM", "PfEd"]
    font = subset.load_font(str(origin), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=range(32, 127))
    subsetter.subset(font)
    subset.save_font(font, str(target), options)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Collect the typefaces of fonts.txt into one folder.")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/fonts"), help="folder with font files below it")
    parser.add_argument(
        "--out", type=Path, default=Path(".tinydata/fonts"), help="folder to write train/ and held/ into"
    )
    parser.add_argument("--print-packages", action="store_true", help="print the Debian packages needed, and stop")
    args = parser.parse_args(argv)
    if args.print_packages:
        print("\n".join(sorted({face.package for face in read_faces()})))
        return 0
    count, missing = collect(args.source, args.out)
    print(f"{count} typefaces in {args.out}; not found: {', '.join(missing) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
