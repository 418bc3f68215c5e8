"""The small checkpoints of LLaVA-NeXT that are kept beside the tests, loaded once."""

from __future__ import annotations

import functools
import json
from typing import Any

from golden_data import HERE

from llava.model.builder import LoadedModel, load

NEXT = HERE / "next"


@functools.cache
def next_model(name: str, **changes: Any) -> LoadedModel:
    """A checkpoint, with its tower's name as a path; `changes` are keys of its config with other values."""
    folder = NEXT / "checkpoints" / name
    config = json.loads((folder / "config.json").read_text())
    tower = NEXT / "checkpoints" / "vision" / config["mm_vision_tower"].split("/")[-1]
    return load(folder, device="cpu", dtype="fp32", overwrite_config={"mm_vision_tower": str(tower), **changes})
