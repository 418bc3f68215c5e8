"""Draw the sample images in images/, whose right answers are known because everything in them is placed by hand.

In: nothing, or a typeface. Out: FOLDER/demo.jpg, counting.png, reading.png and wide.png, together under 200 KB. They are
drawn by the generator's own hand, so that the embedded model is at home in them.

    python recipes/tiny/draw_images.py --out images
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lettering import Lettering, render_lettering
from palette import RGB
from PIL import Image
from scenes import Scene, Thing, render_scene

SIDE = 448
LARGE, SMALL = 0.18, 0.095
RED, BLUE, YELLOW, GREEN, PURPLE, ORANGE = (
    (220, 20, 25), (35, 80, 215), (250, 220, 30), (30, 140, 60), (120, 45, 165), (250, 130, 10),
)  # fmt: skip
WHITE: RGB = (252, 252, 252)


def thing(shape: str, colour: str, rgb: RGB, x: float, y: float, radius: float = LARGE) -> Thing:
    return Thing(shape, colour, rgb, x, y, radius, 0.0, None)


# A star above, a circle on the left, a square on the right.
DEMO = (
    thing("star", "yellow", YELLOW, 0.5, 0.21),
    thing("circle", "red", RED, 0.22, 0.56),
    thing("square", "blue", BLUE, 0.78, 0.56),
)
HEARTS = ((0.2, 0.25), (0.5, 0.18), (0.8, 0.27), (0.32, 0.72), (0.7, 0.76))
COUNTING = tuple(thing("heart", "red", RED, x, y, SMALL) for x, y in HEARTS)
WIDE = (
    thing("triangle", "green", GREEN, 0.24, 0.26),
    thing("ring", "purple", PURPLE, 0.76, 0.3, SMALL),
    thing("hexagon", "orange", ORANGE, 0.5, 0.76),
)
WORD = "Swan"  # one of the words that are held out of training


def scene(things: tuple[Thing, ...], background: str, rgb: RGB) -> Image.Image:
    return render_scene(Scene(things, background, rgb, "plain", None, 0), SIDE)


def widen(image: Image.Image, width: int) -> Image.Image:
    sheet = Image.new("RGB", (width, image.height), image.getpixel((1, 1)))
    sheet.paste(image, ((width - image.width) // 2, 0))
    return sheet


def word(font: str) -> Image.Image:
    text = Lettering(
        text=WORD,
        colour="blue",
        rgb=BLUE,
        background_rgb=(205, 225, 210),
        font=font,
        width=0.66,
        x=0.5,
        y=0.5,
        angle=0.0,
        plate_rgb=WHITE,
        texture="plain",
        seed=0,
    )
    return render_lettering(text, SIDE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("images"))
    parser.add_argument("--font", default="", help="font file for the word; without it Pillow's own typeface")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    scene(DEMO, "white", WHITE).save(args.out / "demo.jpg", quality=92)
    scene(COUNTING, "white", WHITE).save(args.out / "counting.png", optimize=True)
    widen(scene(WIDE, "white", WHITE), 700).save(args.out / "wide.png", optimize=True)
    word(args.font).save(args.out / "reading.png", optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
