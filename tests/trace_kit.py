"""What the tests of `llava trace` ask, and the points that they expect."""

from __future__ import annotations

from repository import ROOT

from llava.session import LoadedImage

QUESTION = "What colour is the star?"
ANSWERING = [
    "arguments", "template", "image", "pixels", "prompt", "input_ids", "limit", "tower", "projector", "image_features",
    "splice", "layers", "first_tokens", "text", "cost",
]  # fmt: skip
TRAINING = [
    "arguments", "sample", "image", "pixels", "prompt", "input_ids", "labels", "batch", "tower", "projector",
    "image_features", "splice", "layers", "loss", "gradients", "optimizer", "cost",
]  # fmt: skip


def star() -> LoadedImage:
    return LoadedImage.open(str(ROOT / "images/demo.jpg"))
