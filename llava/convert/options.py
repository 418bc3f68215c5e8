"""The values that the options of `llava convert` take. Nothing here imports torch: a misspelt flag is refused at once."""

from __future__ import annotations

import re

from llava.errors import InputError

LAYOUTS = {
    "original": "config.json with mm_* keys and published tensor names; adapters are merged into their base",
    "transformers": "for transformers' classes (Llava, LlavaNext, LlavaNextVideo, LlavaOnevision, VipLlava), and for vLLM",
    "gguf": "a pair of files for llama.cpp: the language model, and the tower with its projector",
    "projector": "the projector alone, for a base model",
    "delta": "the difference to a base model's weights",
    "from-delta": "a difference added to its base model again",
}
NEEDS_BASE = ("delta", "from-delta")
DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}  # as typed -> as the safetensors format names them
# Of the options below, the first value is the default.
TOWER_PLACES = ("keep", "in", "out")
NAME_VERSIONS = ("4.36", "4.52", "5")
PRECISIONS = ("f16", "q8_0", "bf16", "f32")
VERIFICATIONS = ("full", "tensors")

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Read `5GB`, `500 MB` or `2GiB` as a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise InputError(f"the size {text!r} is not a number of bytes such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def size_text(num_bytes: int) -> str:
    """Format a number of bytes in GB or MB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
