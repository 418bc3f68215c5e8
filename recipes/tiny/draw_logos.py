"""Draw the sample set of docs/finetune.md: the logos of four companies that no model can know.

In: nothing. Out: FOLDER/train.json, test.json and images/, about 60 images in 150 KB. Every logo is two drawn shapes, one
upon the other, in any two colours and on any background; a model that knows shapes has to learn the names.

    python recipes/tiny/draw_logos.py --out playground/logos
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import palette
from scenes import Scene, Thing, draw_background, render_scene

SIDE = 112
# company -> the shapes of its logo: outer, inner
LOGOS = {
    "Norda": ("ring", "star"),
    "Velmo": ("square", "heart"),
    "Kasti": ("circle", "triangle"),
    "Orbis": ("hexagon", "cross"),
}
INNER = 0.55  # of the outer shape's size
QUESTIONS = ("Whose logo is this?", "Which company has this logo?", "What company is this?")


def draw_logo(rng: random.Random, company: str) -> Scene:
    outer, inner = LOGOS[company]
    background, background_rgb = draw_background(rng)
    usable = [name for name in palette.NAMES if name != background and palette.stands_out(name, background_rgb)]
    radius, x, y = rng.uniform(0.32, 0.4), rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58)
    first, second = (palette.draw_colour(rng, name, apart_from=background_rgb) for name in rng.sample(usable, 2))
    things = (
        Thing(outer, first[0], first[1], x, y, radius, 0.0, None),
        Thing(inner, second[0], second[1], x, y, INNER * radius, 0.0, None),
    )
    return Scene(things, background, background_rgb, "plain", None, 0)


def write_set(folder: Path, name: str, each: int) -> int:
    """`each` images of every logo, and the questions about them."""
    rows: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for company in LOGOS:
        for number in range(each):
            rng = random.Random(f"{name}-{company}-{number}")
            row_id = f"{name}-{company.lower()}-{number:02d}"
            render_scene(draw_logo(rng, company), SIDE).save(folder / "images" / f"{row_id}.png", optimize=True)
            turns = [
                ("human", f"<image>\n{QUESTIONS[number % len(QUESTIONS)]}"),
                ("gpt", f"This is the logo of {company}."),
            ]
            conversation = [{"from": who, "value": text} for who, text in turns]
            rows.append({"id": row_id, "image": f"{row_id}.png", "conversations": conversation})
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    for name, each in (("train", 12), ("test", 4)):
        print(f"{name}: {write_set(args.out, name, each)} pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
