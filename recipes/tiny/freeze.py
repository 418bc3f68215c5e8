"""Freeze a small part of the held-out suite as files, for `llava eval tiny`: questions as JSON lines, images as PNG.

In: held-out typefaces, and test photographs if there are any. Out: OUT/scenes.jsonl, reading.jsonl, yes_no.jsonl with their
images in OUT/images, and with --cifar photos.jsonl with its images in OUT/photos. Seeds and typefaces are those that
training never saw (suite.py); of the questions, those that ask for one word. The photographs are not ours to pass on, so
their two are for one's own folder and never committed.

    python recipes/tiny/freeze.py --fonts .tinydata/fonts --out playground/data/eval/tiny
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from photos import load_photos
from rows import Maker, Row
from suite import add_photos, add_pope, add_reading, add_scenes
from wordings import SHORT_SUFFIX

# Which groups of the suite make a file, and how many questions of each.
SCENES = dict.fromkeys(("colour", "shape", "size", "position", "relation", "count", "background", "yesno_same"), 14)
READING = dict.fromkeys(("read_seen_words", "read_unseen_words", "read_numbers", "read_signs"), 16)
YES_NO = dict.fromkeys(("pope_drawn_random", "pope_drawn_near"), 60)
PHOTOS = {"photo": 200, "pope_photo_random": 100, "pope_photo_near": 100}
DRAWN_SIZE = 100  # how many of each group are made, to choose those that ask for one word
CATEGORIES = {"pope_drawn_random": "random", "pope_drawn_near": "near"}


def freeze(maker: Maker, groups: dict[str, int], out: Path, name: str, folder: str) -> int:
    """Write the first questions of each group, and the images they are about."""
    rows = [row for group, number in groups.items() for row in chosen(maker.rows, group)[:number]]
    (out / folder).mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        (number,) = row.images
        image = f"{folder}/{name}-{number:05d}.png"
        maker.paints[number]().save(out / image, optimize=True)
        category = CATEGORIES.get(row.group, row.group)
        line = {
            "question_id": row.id,
            "image": image,
            "question": row.question,
            "answer": row.answer,
            "category": category,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(rows)


def chosen(rows: Sequence[Row], group: str) -> list[Row]:
    """Those that ask for one word, in LLaVA's own request."""
    asked = [row for row in rows if row.group == group and row.form == "word" and row.after is None]
    return [row for row in asked if row.question.endswith(SHORT_SUFFIX)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fonts", type=Path, help="folder with held/ typefaces; Pillow's own face without it")
    parser.add_argument(
        "--cifar", type=Path, help="folder with CIFAR-10's test images: make only the photographs' file"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.cifar is not None:
        maker = Maker(None, load_photos(args.cifar, "test"))
        add_photos(maker, max(PHOTOS.values()))
        print(f"photos: {freeze(maker, PHOTOS, args.out, 'photos', 'photos')} questions")
        return 0
    maker = Maker(args.fonts, None)
    for part in (add_scenes, add_reading, add_pope):
        part(maker, DRAWN_SIZE)
    for name, groups in (("scenes", SCENES), ("reading", READING), ("yes_no", YES_NO)):
        print(f"{name}: {freeze(maker, groups, args.out, name, 'images')} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
