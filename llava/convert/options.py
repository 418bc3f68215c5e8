"""Option values of `llava convert`: layouts, precisions, sizes. Nothing here imports torch, so that a misspelt flag is
refused at once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llava.errors import InputError

if TYPE_CHECKING:
    from llava.convert.convert import ConversionReport

LAYOUTS = {
    "original": "config.json with mm_* keys and published tensor names; adapters are merged into their base",
    "transformers": "for LlavaForConditionalGeneration or LlavaNextForConditionalGeneration, and for vLLM",
    "gguf": "a pair of files for llama.cpp: the language model, and the tower with its projector",
    "projector": "the projector alone, for a base model",
    "delta": "the difference to a base model's weights",
    "from-delta": "a difference added to its base model again",
}
NEEDS_BASE = ("delta", "from-delta")
DTYPES = ("fp16", "bf16", "fp32")
TOWER_PLACES = ("keep", "in", "out")
NAME_VERSIONS = ("4.36", "4.52", "5")
PRECISIONS = ("f16", "q8_0", "bf16", "f32")
VERIFICATIONS = ("full", "tensors")

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500 MB`, `2GiB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise InputError(f"the size {text!r} is not a number of bytes such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])


def size_text(num_bytes: int) -> str:
    """Bytes as one reads them."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def describe(report: ConversionReport) -> list[str]:
    """What was written and how far it was proved, a line each."""
    rate = report.num_bytes / 1e6 / max(report.write_s, 1e-9)
    lines = [
        f"wrote {report.target}: {report.layout} layout, {size_text(report.num_bytes)} in {report.write_s:.1f} s "
        f"({rate:.0f} MB/s)",
        f"compared {report.tensors.num_tensors} tensors both ways: largest difference {report.tensors.largest:.3g}",
    ]
    logits = report.logits
    if logits is None:
        lines.append("logits were not compared (--proof tensors, or a layout that is no model by itself)")
    else:
        lines.append(
            f"compared logits of a sample with an image in float32: largest difference {logits.largest:.3g} at a magnitude "
            f"of {logits.scale:.3g}, the same likeliest token at {logits.same_token} of {logits.num_positions} positions"
        )
        if logits.pixels is not None:
            lines.append(
                f"compared prompt and ids of the sample: equal; pixels: largest difference {logits.pixels:.3g}"
            )
    return lines + [f"note: {note}" for note in report.notes]
