"""Checks of `llava doctor FOLDER`: all checks of a checkpoint, cheap ones first.

In: a model folder, perhaps its base. Out: a `DoctorReport`. Files, settings and tokenizer are checked first, in a second or
two; then weights are read, and last the model is loaded and run.
"""

from __future__ import annotations

from pathlib import Path

from llava.diagnose.checks import checkpoint_files as files
from llava.diagnose.checks import checkpoint_text as text
from llava.diagnose.checks import checkpoint_vision as vision
from llava.diagnose.checks import checkpoint_weights as weights
from llava.diagnose.checks.findings import DoctorCheck, DoctorReport, run_checks

CHEAP = (
    DoctorCheck("config", files.check_config),
    DoctorCheck("weight files", files.check_weight_files),
    DoctorCheck("kind", files.check_kind, needs=("config", "weight files")),
    DoctorCheck("base", files.check_base, needs=("kind",)),
    DoctorCheck("base files", files.check_base_files, needs=("base",)),
    DoctorCheck("adapter", weights.check_adapter, needs=("base files",)),
    DoctorCheck("settings", vision.check_settings, needs=("adapter",)),
    DoctorCheck("tower", vision.check_tower, needs=("settings",)),
    DoctorCheck("pixels", vision.check_pixels, needs=("tower",)),
    DoctorCheck("tiles", vision.check_tiles, needs=("tower",)),
    DoctorCheck("projector", vision.check_projector, needs=("settings",)),
    DoctorCheck("tokenizer", text.check_tokenizer, needs=("settings",)),
    DoctorCheck("template", text.check_template, needs=("tokenizer",)),
    DoctorCheck("special tokens", text.check_special_tokens, needs=("template",)),
    DoctorCheck("vocabulary", text.check_vocabulary, needs=("tokenizer",)),
    DoctorCheck("context", text.check_context, needs=("template", "tiles")),
)
WEIGHTS = (
    DoctorCheck("structure", weights.check_structure, needs=("tower",), last=True),
    DoctorCheck("numbers", weights.check_numbers, needs=("adapter",)),
    DoctorCheck("smoke test", weights.check_smoke_test, needs=("tower", "numbers"), last=True),
    DoctorCheck("stored tower", weights.check_stored_tower, needs=("tower",)),
)


def examine_checkpoint(path: str | Path, base: str | Path | None = None, *, quick: bool = False) -> DoctorReport:
    """Examine a checkpoint. `quick` skips the checks that read weights: names, numbers, and the smoke test."""
    checkpoint = files.open_checkpoint(path, base)
    report = DoctorReport(str(path), "checkpoint")
    run_checks(checkpoint, CHEAP if quick else CHEAP + WEIGHTS, report)
    report.skipped += [(check.name, "--quick leaves it out") for check in WEIGHTS if quick]
    if "base files" in report.checked:
        info = checkpoint.info
        report.facts = {
            "kind": info.kind,
            "language_model": info.language_model,
            "tensors": len(checkpoint.tensors),
            "base": str(checkpoint.base.folder) if checkpoint.base is not None else None,
            "vision_tower": checkpoint.values.get("mm_vision_tower"),
            "template": checkpoint.extras.get("template"),
            "template_from": checkpoint.extras.get("template_origin"),
        }
    return report
