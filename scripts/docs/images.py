"""Draw the images of docs/ from traces of the embedded model: `python scripts/docs/images.py`.

In: images/ and the embedded model. Out: docs/images/*.png: what each word of an answer looked at, how a wide image is cut
into tiles and patches, and, where Chromium is installed, the page of `llava trace --html`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageEnhance

from llava.assets import embedded_model_path
from llava.diagnose.tracer.attention import AttentionViews, compute_views
from llava.diagnose.tracer.generation import TracedAnswer, trace_question
from llava.diagnose.tracer.html import page_of_answer
from llava.images.layout import ImagePolicy, feature_boxes, plan, tile_areas
from llava.model.builder import load
from llava.session import LoadedImage

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs/images"
SIDE, GAP, LABEL = 200, 12, 26
PLAIN_WORDS = ("The", "the", "a", "at", "on", "and", "is", "with", "large", "image", "shows")
BROWSER_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=3000 --window-size=1280,860"
)


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    loaded = load(embedded_model_path(), device="cpu")
    answered = trace_question(
        loaded, [LoadedImage.open(str(ROOT / "images/demo.jpg"))], "What do you see in this picture?"
    )
    views = compute_views(answered)
    assert views is not None
    words_and_places(answered, views).save(TARGET / "looked-at.png", optimize=True)
    tiles(ROOT / "images/wide.png").save(TARGET / "tiles.png", optimize=True)
    screenshot(page_of_answer(answered, views), TARGET / "trace-page.png")


def words_and_places(answered: TracedAnswer, views: AttentionViews) -> Image.Image:
    """The image once for every word of the answer, lit where the gradient says that it mattered."""
    assert answered.answer is not None
    assert views.relevance is not None
    tokenizer = answered.loaded.tokenizer
    words = [tokenizer.decode([token]).strip() for token in answered.answer.token_ids]
    shown = [index for index, word in enumerate(words) if word.isalpha() and word not in PLAIN_WORDS][:8]
    policy, layout = answered.loaded.model.image_policy(), answered.record.layouts[0]
    boxes = feature_boxes(layout, policy)
    image = answered.images[0].image.resize((SIDE, SIDE))
    scale = SIDE / layout.size.width
    cols = 4
    rows = -(-len(shown) // cols)
    sheet = Image.new("RGB", (cols * (SIDE + GAP) + GAP, rows * (SIDE + LABEL + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, index in enumerate(shown):
        left, top = GAP + number % cols * (SIDE + GAP), GAP + number // cols * (SIDE + LABEL + GAP)
        sheet.paste(lit(image, boxes, views.relevance[index], scale), (left, top + LABEL))
        pen.text((left, top), words[index], fill="black", font_size=18)
    return sheet


def lit(image: Image.Image, boxes: Any, shares: Any, scale: float) -> Image.Image:
    dark = ImageEnhance.Brightness(image).enhance(0.35)
    mask = Image.new("L", image.size, 0)
    pen = ImageDraw.Draw(mask)
    for box, share in zip(boxes, (shares / shares.max()).tolist(), strict=True):
        if box is not None:
            pen.rectangle([side * scale for side in box], fill=int(255 * share**0.7))
    return Image.composite(image, dark, mask)


def tiles(file: Path) -> Image.Image:
    """A wide image on the canvas that "anyres" picks for a 336-pixel tower: its tiles, their patches, the padding."""
    image = Image.open(file).convert("RGB")
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    policy = ImagePolicy("anyres", tile_size=336, patch_size=14, pinpoints=pinpoints, merge="spatial_unpad")
    layout = plan(image.size, policy)
    areas, boxes = tile_areas(layout, policy)[1:], feature_boxes(layout, policy)[policy.features_per_tile :]
    left, top = min(area.left for area in areas), min(area.top for area in areas)
    right, bottom = max(area.right for area in areas), max(area.bottom for area in areas)
    scale = 560 / (right - left)
    sheet = Image.new("RGB", (round((right - left) * scale), round((bottom - top) * scale)), (210, 210, 210))
    sheet.paste(
        image.resize((round(image.width * scale), round(image.height * scale))),
        (round(-left * scale), round(-top * scale)),
    )
    pen = ImageDraw.Draw(sheet)
    for box in [box for box in boxes if box is not None]:
        pen.rectangle(placed(box, left, top, scale), outline=(120, 120, 120))
    for area in areas:
        pen.rectangle(placed(area, left, top, scale), outline=(216, 84, 26), width=4)
    return sheet


def placed(box: Any, left: float, top: float, scale: float) -> list[float]:
    return [(side - (left, top)[index % 2]) * scale for index, side in enumerate(box)]


def screenshot(page: str, target: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"no Chromium here: {target.name} stays as it is")
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "page.html"
        file.write_text(page, encoding="utf-8")
        flags = [*BROWSER_FLAGS.split(), f"--user-data-dir={scratch}/profile", f"--screenshot={target}"]
        subprocess.run([browser, *flags, f"file://{file}"], check=True, capture_output=True, timeout=90)
    image = Image.open(target).convert("RGB")
    image.quantize(128).save(target, optimize=True)


if __name__ == "__main__":
    main()
