"""Render a trace as a self-contained HTML page: images, tokens and their views, timing, every point.

In: a trace, with the views of attention.py or a training sample's images. Out: the page's text. The template is in page/
(page.html, page.css, page.js); this file builds its data.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.diagnose.tracer.hooks_sequence import segments
from llava.diagnose.tracer.record import POINTS, Facts, Trace
from llava.files import script_json
from llava.images.feature_boxes import feature_boxes, tile_areas

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from llava.diagnose.tracer.attention import AttentionViews
    from llava.diagnose.tracer.generation import TracedAnswer
    from llava.images.image_processor import ImageProcessor
    from llava.images.layout import ImageLayout

# Larger images are scaled down to this; boxes stay in the original's pixels.
SHOWN_SIDE = 1024
# With more numbers than this (layers x tokens x features), only the mean over layers is stored.
MOST_NUMBERS = 1_500_000
SHOWN_CANDIDATES = 4
WHITESPACE_MARKERS = {"▁": " ", "Ġ": " ", "Ċ": "⏎", "<0x0A>": "⏎"}


def page_of_answer(traced: TracedAnswer, views: AttentionViews | None) -> str:
    """Render the page of a traced question."""
    record, answer = traced.record, traced.answer
    shown = [image.image for image in traced.images]
    tokens = _prompt_tokens(record, [layout.num_features for layout in traced.record.layouts])
    first_answer = len(tokens)
    for step, token in enumerate(answer.token_ids if answer is not None else ()):
        tokens.append(_token(record, token, "answer", f"new token {step + 1}"))
    data_views: list[Facts] = []
    if views is not None:
        for row, (_, index, is_answer) in enumerate(views.rows):
            shown_token = tokens[first_answer + index if is_answer else index]
            if views.attention is not None:
                shown_token["rows"]["attention"] = row
                shown_token["share"] = float(views.attention[:, row].sum(-1).mean())
            if is_answer and views.relevance is not None and index < len(views.relevance):
                shown_token["rows"]["relevance"] = index
        data_views = _views(views)
    found = record.observations.get("first_tokens")
    return _page(
        record,
        question=traced.question,
        answer=answer.text if answer is not None else "",
        images=_images(record, shown, traced.record.layouts, traced.loaded.image_processor),
        tokens=tokens,
        views=data_views,
        candidates=_candidates(found["steps"]) if found is not None else [],
        first=first_answer + _strongest(views) if views is not None and data_views else None,
        hint="Point at a token, or tap it, to see where in the image it looked. The answer is in the warm colour."
        if data_views
        else "",
    )


def page_of_sample(record: Trace) -> str:
    """Render the page of a traced training sample, whose tokens are coloured by loss."""
    tower = record.model.get_vision_tower()
    tokens = _prompt_tokens(record, [layout.num_features for layout in record.layouts])
    labels = record["labels"]["labels"]
    losses = iter(record["loss"]["tokens"])
    largest = max((entry["loss"] for entry in record["loss"]["tokens"]), default=1.0) or 1.0
    for token, label in zip(tokens, labels, strict=True):
        if label != IGNORE_INDEX and (entry := next(losses, None)) is not None:
            token |= {"kind": "trained", "note": f"{entry['loss']:.2g}", "heat": min(1.0, entry["loss"] / largest)}
            token["title"] += f", loss {entry['loss']:.4g}"
    return _page(
        record,
        question=f"Training sample {record['sample']['index']}",
        answer=f"loss {record['loss']['loss']:.4f}",
        images=_images(record, record.images, record.layouts, tower.image_processor if tower is not None else None),
        tokens=tokens,
        views=[],
        candidates=[],
        first=None,
        hint="What is trained is in the warm colour, with the loss of each token: the stronger, the larger.",
    )


def _page(record: Trace, **content: Any) -> str:
    failed = record.failed
    verdict = "every check holds" if not failed else "; ".join(f"{point}: {text}" for point, text in failed)
    points = [
        {
            "title": obs.title,
            "where": obs.where,
            "suspect": POINTS[obs.point].suspect,
            "rows": [{"label": row.label, "text": row.text, "tone": row.tone, "spans": row.spans} for row in obs.rows],
        }
        for obs in record
    ]
    data = {
        **content,
        "features": sum(len(image["boxes"]) for image in content["images"]),
        "verdict": {"text": verdict, "failed": bool(failed)},
        "stages": [{"name": stage.name, "start": stage.start, "seconds": stage.seconds} for stage in record.stages],
        "points": points,
    }
    parts = {"style": _file("page.css"), "script": _file("page.js"), "data": script_json(data)}
    page = _file("page.html")
    for name, text in parts.items():
        head, _, tail = page.partition("{{" + name + "}}")
        page = head + text + tail
    return page


def _file(name: str) -> str:
    return (resources.files("llava.diagnose.tracer") / "page" / name).read_text(encoding="utf-8")


def _images(
    record: Trace, images: Sequence[Image.Image], layouts: Sequence[ImageLayout], processor: ImageProcessor | None
) -> list[Facts]:
    if not layouts:
        return []
    policy = record.model.image_policy()
    crops = processor is not None and "shortest_edge" in processor.size
    starts = [part["start"] for part in record["splice"]["rows"][0]["segments"] if part["kind"] == "image"]
    shown: list[Facts] = []
    first = 0
    for image, layout, start in zip(images, layouts, starts, strict=True):
        boxes = feature_boxes(layout, policy, crops=crops)
        areas = tile_areas(layout, policy, crops=crops)
        shown.append(
            {
                "source": _data_url(image),
                "width": layout.size.width,
                "height": layout.size.height,
                "caption": f"{layout.size.width} x {layout.size.height} pixels, {layout.num_tiles} "
                f"tile{'s' * (layout.num_tiles > 1)}, "
                f"{layout.num_features} features at positions {start} to {start + layout.num_features - 1}",
                "tiles": [_rounded(area) for area in areas],
                "boxes": [None if box is None else _rounded(box) for box in boxes],
                "overview": policy.features_per_tile,
                "first": first,
                "position": start,
            }
        )
        first += len(boxes)
    return shown


def _rounded(box: Sequence[float]) -> list[float]:
    return [round(side, 2) for side in box]


def _data_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG" if max(small.size) <= 512 else "JPEG", quality=88)
    kind = "png" if max(small.size) <= 512 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _prompt_tokens(record: Trace, lengths: list[int]) -> list[Facts]:
    ids = record["input_ids"]["ids"]
    tokens = []
    for part in segments(ids, lengths):
        if part["kind"] == "image":
            title = f"id {IMAGE_TOKEN_INDEX}, positions {part['start']} to {part['stop'] - 1}"
            number = part["stop"] - part["start"]
            tokens.append({"text": f"<image> {number} features", "kind": "image", "title": title, "rows": {}})
        else:
            for place, token in enumerate(part["ids"], part["start"]):
                tokens.append(_token(record, token, "text", f"position {place}"))
    return tokens


def _token(record: Trace, token: int, kind: str, place: str) -> Facts:
    assert record.tokenizer is not None
    text = _readable(record.tokenizer.convert_ids_to_tokens(token), token)
    return {"text": text, "kind": kind, "title": f"id {token}, {place}", "rows": {}}


def _readable(entry: str | None, token: int) -> str:
    """Make a vocabulary entry readable; an id without a token is shown as its number."""
    text = f"#{token}" if entry is None else entry
    for marker, shown in WHITESPACE_MARKERS.items():
        text = text.replace(marker, shown)
    return text


def _candidates(steps: list[list[Facts]]) -> list[list[Facts]]:
    return [
        [{"text": _readable(entry["text"], entry["id"]), "p": entry["p"]} for entry in step[:SHOWN_CANDIDATES]]
        for step in steps
    ]


def _strongest(views: AttentionViews) -> int:
    """Return the answer token with the largest relevance."""
    if views.relevance is None:
        return 0
    return int(views.relevance.sum(-1).argmax())


def _views(views: AttentionViews) -> list[Facts]:
    """Encode the shares as bytes, each token's largest as 255: the mean over layers first, then every layer."""
    import torch

    found = []
    if views.relevance is not None:
        about = {"key": "relevance", "name": "relevance (gradient)", "caption": "Parts that mattered for"}
        found.append(about | _packed(views.relevance[None]))
    if views.attention is not None:
        mean = views.attention.mean(0, keepdim=True)
        layers = torch.cat([mean, views.attention]) if views.attention.numel() <= MOST_NUMBERS else mean
        about = {"key": "attention", "name": "attention", "caption": "Parts that were read for"}
        found.append(about | _packed(layers))
    return found


def _packed(values: Tensor) -> Facts:
    largest = values.amax(-1, keepdim=True).clamp(min=1e-12)
    data = (values / largest * 255).round().byte().numpy().tobytes()
    return {"layers": values.shape[0], "rows": values.shape[1], "data": base64.b64encode(data).decode()}
