"""The model that comes with the package: where it is. What it can do is in its own model card."""

from __future__ import annotations

from pathlib import Path

from llava.errors import InputError

EMBEDDED_MODEL = "llava-v1.5-tiny"
EMBEDDED_INTRODUCTION = (
    "this is tiny, the model in the package: it knows drawn shapes, colours, counts and short words, and few photographs; "
    "a real one: llava {command} llava-1.5-7b (llava models lists them)"
)


def embedded_model_path() -> Path:
    """The folder of the embedded model, an ordinary checkpoint in the original layout with its tower inside."""
    folder = Path(__file__).parent / EMBEDDED_MODEL
    if not (folder / "config.json").is_file():
        raise InputError(
            f"this installation has no embedded model at {folder}; give the path of a model folder instead"
        )
    return folder
