"""What happens to images on their way: scaling, blur, noise, compression.

In: a random generator and a split. Out: Finish, and images changed by it. Training and the held-out suite share none
of these but the plain image.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

FINISHES = {
    "train": ("plain", "plain", "plain", "blur", "noise", "jpeg", "rescale", "light", "sharpen", "fringe"),
    "held": ("plain", "palette", "webp", "gamma"),
}


@dataclass(frozen=True)
class Finish:
    name: str = "plain"
    amount: float = 0.5  # in 0..1
    seed: int = 0


PLAIN = Finish()


def draw_finish(rng: random.Random, *, held: bool) -> Finish:
    return Finish(rng.choice(FINISHES["held" if held else "train"]), rng.random(), rng.randrange(2**31))


def apply(image: Image.Image, finish: Finish) -> Image.Image:
    amount = finish.amount
    if finish.name == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.3 + 0.7 * amount))
    if finish.name == "noise":
        noise = np.random.default_rng(finish.seed).normal(0, 2 + 10 * amount, (image.height, image.width, 3))
        return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if finish.name == "light":
        pixels = np.asarray(image, np.float32)
        return Image.fromarray(np.clip((pixels - 128) * (0.85 + 0.2 * amount) + 128, 0, 255).astype(np.uint8))
    if finish.name == "sharpen":
        return image.filter(ImageFilter.UnsharpMask(1.0 + amount, round(60 + 120 * amount), 0))
    if finish.name == "fringe":  # the colours a pixel apart, as cheap lenses and screens show them
        red, green, blue = image.split()
        return Image.merge("RGB", (ImageChops.offset(red, 1 if amount < 0.5 else -1, 0), green, blue))
    if finish.name == "gamma":
        table = [round(255 * (value / 255) ** (0.85 + 0.3 * amount)) for value in range(256)]
        return image.point(table * 3)
    if finish.name == "rescale":
        small = round(image.width * (0.6 + 0.3 * amount)), round(image.height * (0.6 + 0.3 * amount))
        return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    if finish.name == "palette":
        return image.quantize(24 + round(100 * amount)).convert("RGB")
    if finish.name in ("jpeg", "webp"):
        buffer = io.BytesIO()
        image.save(buffer, finish.name, quality=round(45 + 50 * amount))
        return Image.open(buffer).convert("RGB")
    return image
