"""`llava doctor FOLDER`: all checks of a checkpoint, cheap ones first.

In: a model folder, perhaps its base. Out: a `Report`. Files, settings and tokenizer are read in a second or two; only then
are weights read, and last the model is loaded and run.
"""

from __future__ import annotations

from pathlib import Path

from llava.diagnose.checks import checkpoint_files as files
from llava.diagnose.checks import checkpoint_text as text
from llava.diagnose.checks import checkpoint_vision as vision
from llava.diagnose.checks import checkpoint_weights as weights
from llava.diagnose.checks.findings import Check, Report, examine

CHEAP = (
    Check("config", files.check_config),
    Check("weight files", files.check_weight_files),
    Check("base", files.check_base, needs=("config", "weight files")),
    Check("base files", files.check_base_files, needs=("base",)),
    Check("adapter", weights.check_adapter, needs=("base files",)),
    Check("settings", vision.check_settings, needs=("adapter",)),
    Check("model type", vision.check_model_type, needs=("adapter",)),
    Check("tower", vision.check_tower, needs=("settings",)),
    Check("pixels", vision.check_pixels, needs=("tower",)),
    Check("tiles", vision.check_tiles, needs=("tower",)),
    Check("projector", vision.check_projector, needs=("settings",)),
    Check("tokenizer", text.check_tokenizer, needs=("settings", "model type")),
    Check("template", text.check_template, needs=("tokenizer",)),
    Check("special tokens", text.check_special_tokens, needs=("template",)),
    Check("vocabulary", text.check_vocabulary, needs=("tokenizer",)),
    Check("room", text.check_room, needs=("template", "tiles")),
)
WEIGHTS = (
    Check("structure", weights.check_structure, needs=("tower",), last=True),
    Check("numbers", weights.check_numbers, needs=("adapter",)),
    Check("trial run", weights.check_run, needs=("tower", "numbers"), last=True),
)


def examine_checkpoint(path: str | Path, base: str | Path | None = None, *, quick: bool = False) -> Report:
    """`quick` leaves out what reads weights: their names against the model, their numbers, and the trial run."""
    checkpoint = files.open_checkpoint(path, base)
    report = Report(str(path), "checkpoint")
    examine(checkpoint, CHEAP if quick else CHEAP + WEIGHTS, report)
    report.skipped += [(check.name, "--quick leaves it out") for check in WEIGHTS if quick]
    if "base files" in report.looked:
        info = checkpoint.info
        report.facts = {
            "kind": info.kind,
            "language_model": info.language_model,
            "tensors": len(checkpoint.tensors),
            "base": str(checkpoint.base.folder) if checkpoint.base is not None else None,
            "vision_tower": checkpoint.values.get("mm_vision_tower"),
            "template": checkpoint.extras.get("template"),
        }
    return report
