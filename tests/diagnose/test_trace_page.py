"""The page of a trace: it needs nothing else, and a browser shows what the trace says."""

from __future__ import annotations

import base64
import dataclasses
import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from faults import SAMPLES
from golden_data import HERE, golden
from PIL import Image
from repository import ROOT

from llava.assets import embedded_model_path
from llava.diagnose.tracer.attention import AttentionViews, compute_views
from llava.diagnose.tracer.generation import TracedAnswer, trace_question
from llava.diagnose.tracer.html import page_of_answer, page_of_sample
from llava.diagnose.tracer.training import trace_sample
from llava.engine.request import SamplingParams
from llava.images.feature_boxes import feature_boxes
from llava.images.layout import ImagePolicy, plan
from llava.mm_utils import process_images
from llava.model.builder import load
from llava.session import LoadedImage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=3000",
]  # fmt: skip
QUESTION = "What colour is the star?"
HOSTILE = 'What? </script><b title="x">{{data}}'


# Where features lie in the image


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
@pytest.mark.parametrize("size", [(120, 90), (90, 120), (100, 100), (300, 40)])
def test_boxes_are_where_pixels_come_from(mode: str, size: tuple[int, int]) -> None:
    """A white spot on black: the patch that is brightest has to have a box with the spot in it."""
    tower = load_processor()
    policy = ImagePolicy(mode, 56, 14, ((56, 112), (112, 56), (112, 112)), merge="flat")  # type: ignore[arg-type]
    layout = plan(size, policy)
    boxes = feature_boxes(layout, policy)
    assert len(boxes) == layout.num_features
    config = type(
        "Config", (), {"image_aspect_ratio": mode, "image_grid_pinpoints": [list(p) for p in policy.pinpoints]}
    )
    for x, y in [
        (size[0] // 2, size[1] // 2),
        (size[0] // 2 + 9, size[1] // 2 - 7),
        (size[0] // 2 - 11, size[1] // 2 + 8),
    ]:
        image = Image.new("RGB", size, "black")
        image.paste("white", (x - 2, y - 2, x + 3, y + 3))
        plain = Image.new("RGB", size, "black")
        pixels, before = (np.asarray(process_images([p], tower, config)[0]) for p in (image, plain))
        change = np.abs(pixels - before).reshape(-1, 3, 4, 14, 4, 14).sum(axis=(1, 3, 5)).reshape(len(boxes))
        for first in range(0, len(boxes), policy.features_per_tile):
            tile = change[first : first + policy.features_per_tile]
            if tile.max() > 1:
                box = boxes[first + int(tile.argmax())]
                assert box is not None
                assert box.left - 2.5 <= x + 0.5 <= box.right + 2.5
                assert box.top - 2.5 <= y + 0.5 <= box.bottom + 2.5


def load_processor() -> Any:
    from llava.images.image_processor import ClipImageProcessor

    return ClipImageProcessor.from_pretrained(golden("checkpoints/vision/clip-tiny-56"))


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", [(640, 480), (333, 1000), (700, 700)])
def test_every_feature_has_its_box(merge: str, size: tuple[int, int]) -> None:
    """Merged by rows, the boxes of a row follow each other, and only newlines have none."""
    policy = ImagePolicy("anyres", 336, 14, ((336, 672), (672, 336), (672, 672)), merge=merge)  # type: ignore[arg-type]
    layout = plan(size, policy)
    boxes = feature_boxes(layout, policy)
    assert len(boxes) == layout.num_features
    assert sum(box is None for box in boxes) == layout.num_newlines
    if merge == "flat":
        return
    rest = [box for box in boxes[576:] if box is not None]
    rows = [rest[n : n + layout.crop.cols] for n in range(0, len(rest), layout.crop.cols)]
    assert len(rows) == layout.crop.rows
    for row in rows:
        assert all(a.right == pytest.approx(b.left) and a.top == b.top for a, b in itertools.pairwise(row))
    assert all(a[0].bottom == pytest.approx(b[0].top) for a, b in itertools.pairwise(rows))
    if merge == "spatial_unpad":  # what is left shows the image, to within a row or a column of patches
        patch = rest[0].right - rest[0].left
        assert rest[0].left >= -patch
        assert rest[-1].right <= size[0] + patch
        assert rest[0].top >= -patch
        assert rest[-1].bottom <= size[1] + patch


# The page


@pytest.fixture(scope="module")
def traced() -> tuple[TracedAnswer, AttentionViews]:
    loaded = load(embedded_model_path(), device="cpu")
    answered = trace_question(loaded, [LoadedImage.open(str(ROOT / "images/demo.jpg"))], QUESTION)
    views = compute_views(answered)
    assert views is not None
    return answered, views


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_needs_nothing_else(traced: tuple[TracedAnswer, AttentionViews]) -> None:
    answered, views = traced
    page = page_of_answer(dataclasses.replace(answered, question=HOSTILE), views)
    assert page.count("</script>") == 2
    assert not re.search(r"<[^>]*\s(?:src|href)\s*=|url\(|@import|https?://", page)
    assert data_of(page)["question"] == HOSTILE


def test_the_page_has_the_views_as_they_are(traced: tuple[TracedAnswer, AttentionViews]) -> None:
    _, views = traced
    data = data_of(page_of_answer(*traced))
    by_key = {view["key"]: view for view in data["views"]}
    assert views.attention is not None
    packed = np.frombuffer(base64.b64decode(by_key["attention"]["data"]), np.uint8)
    packed = packed.reshape(7, len(views.rows), data["features"])
    mean = views.attention.mean(0).numpy()
    np.testing.assert_allclose(packed[0] / 255, mean / mean.max(-1, keepdims=True), atol=0.003)
    looked = [token for token in data["tokens"] if token["rows"].get("attention") is not None]
    assert len(looked) == len(views.rows)
    assert [token["text"] for token in data["tokens"] if "relevance" in token["rows"]][3:4] == [" yellow"]
    first, last = data["images"][0]["boxes"][0], data["images"][0]["boxes"][-1]
    assert (first, last) == ([0, 0, 56, 56], [392, 392, 448, 448])


def browse(page: str, folder: Path, script: str, *, width: int = 1280) -> dict[str, Any]:
    """Open the page in a frame of a width, run a script in it, and give back what it found."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    outer = f"""<iframe id="f" src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="out"></pre>
    <script>
      const errors = [];
      f.onload = () => setTimeout(() => {{
        const inside = f.contentWindow;
        let found;
        try {{ found = inside.eval({json.dumps(script)}); }} catch (error) {{ errors.push(String(error)); }}
        const wide = inside.document.documentElement.scrollWidth;
        out.textContent = JSON.stringify({{ found, errors, wide }});
      }}, 300);
    </script>"""
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    assert CHROMIUM is not None
    flags = [
        *FLAGS,
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1000",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", f"file://{folder / 'outer.html'}"], capture_output=True, text=True, timeout=300
    )
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    assert found[1], done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here (Debian: chromium)")

SCRIPT = """(() => {
  const brightest = () => {
    const canvas = document.querySelector("canvas"), side = canvas.width / 8;
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    let best = -1, found = -1;
    for (let cell = 0; cell < 64; cell++) {
      let sum = 0;
      const x0 = Math.floor(cell % 8 * side), y0 = Math.floor(Math.floor(cell / 8) * side);
      for (let y = y0 + 2; y < y0 + side - 2; y += 3) for (let x = x0 + 2; x < x0 + side - 2; x += 3) {
        const at = 4 * (y * canvas.width + x);
        sum += data[at] + data[at + 1];
      }
      if (sum > best) { best = sum; found = cell; }
    }
    return found;
  };
  const answer = [...document.querySelectorAll(".token.answer")].filter((chip) => chip.tagName === "BUTTON");
  const seen = [];
  for (const chip of answer) {
    chip.dispatchEvent(new Event("pointerenter"));
    const on = chip.classList.contains("on");
    seen.push({ text: chip.textContent, on, brightest: brightest(), caption: $("caption").textContent });
  }
  $("view").value = "1"; $("view").dispatchEvent(new Event("change"));
  const layers = document.querySelectorAll("#layer option").length;
  return { seen, layers, title: $("question").textContent, points: document.querySelectorAll("#points details").length,
    stages: document.querySelectorAll(".stage").length, tokens: document.querySelectorAll(".token").length,
    answer: $("answer").textContent, verdict: $("verdict").textContent };
})()"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_what_the_trace_says(
    traced: tuple[TracedAnswer, AttentionViews], tmp_path: Path, width: int
) -> None:
    answered, views = traced
    shown = browse(page_of_answer(answered, views), tmp_path, SCRIPT, width=width)
    assert shown["errors"] == []
    assert shown["wide"] <= width, "the page is wider than its window"
    found = shown["found"]
    assert found["title"] == QUESTION
    assert answered.answer is not None
    assert found["answer"] == answered.answer.text
    assert found["verdict"] == "every check holds"
    assert found["points"] == 15
    assert found["layers"] == 7
    assert all(entry["on"] for entry in found["seen"])
    # White ground is brighter than a coloured shape, so only tokens that looked at ground can be told from pixels alone.
    assert views.relevance is not None
    assert len(found["seen"]) == len(answered.answer.token_ids)
    assert len({entry["caption"] for entry in found["seen"]}) > 1


@needs_browser
def test_the_brightest_patch_is_the_one_that_mattered_most(tmp_path: Path) -> None:
    """On an evenly grey image brightness is the heat-map alone."""
    loaded = load(embedded_model_path(), device="cpu")
    Image.new("RGB", (448, 448), (200, 200, 200)).save(tmp_path / "grey.png")
    answered = trace_question(
        loaded,
        [LoadedImage.open(str(tmp_path / "grey.png"))],
        "What is this?",
        sampling=SamplingParams(max_new_tokens=4),
    )
    views = compute_views(answered)
    assert views is not None
    assert views.relevance is not None
    found = browse(page_of_answer(answered, views), tmp_path, SCRIPT)["found"]
    for row, entry in zip(views.relevance, found["seen"], strict=True):
        assert float(row[entry["brightest"]]) >= 0.97 * float(row.max())


@needs_browser
def test_tiles_and_training_samples_have_pages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    loaded = load(tiny.build(tmp_path / "model", **tiny.ANYRES), device="cpu")
    images = [LoadedImage.open("images/text_200x80.png"), LoadedImage.open("images/noise_40x90.png")]
    answered = trace_question(loaded, images, "What are these?", sampling=SamplingParams(max_new_tokens=3))
    count = "({ images: document.querySelectorAll('canvas').length, parts: !$('part-label').hidden })"
    shown = browse(page_of_answer(answered, compute_views(answered)), tmp_path, count, width=390)
    assert shown == {"found": {"images": 2, "parts": True}, "errors": [], "wide": shown["wide"]}
    assert shown["wide"] <= 390

    (tmp_path / "samples.json").write_text(json.dumps(SAMPLES))
    record = trace_sample(
        str(tmp_path / "samples.json"), 0, model_path="checkpoints/llava-v1.5-tiny-vicuna", image_folder="images"
    )
    script = "[...document.querySelectorAll('.token.trained')].map((chip) => chip.firstChild.textContent).join('')"
    shown = browse(page_of_sample(record), tmp_path, script)
    assert shown["errors"] == []
    assert shown["found"].strip() == "Red, green and blue.</s>"
