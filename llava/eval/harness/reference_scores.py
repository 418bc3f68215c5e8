"""Published figures of LLaVA-1.5 and LLaVA-1.6, for comparison in reports.

In: a task's name. Out: headline figures by model, in the task's unit. Where two sources differ, the model zoo's figure is
taken, since it belongs to the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCES = {
    "LLaVA-1.5": "Liu et al., Improved Baselines with Visual Instruction Tuning (arXiv 2310.03744), tables 3 and 4, and the "
    "model zoo of the LLaVA repository",
    "LLaVA-1.6": "Liu et al., LLaVA-NeXT: Improved reasoning, OCR, and world knowledge (llava-vl.github.io, January 2024), "
    "and the model zoo of the LLaVA repository",
    "MMMU of LLaVA-1.5": "the leaderboard of the MMMU repository, validation set",
}

MODELS = ("1.5-7B", "1.5-13B", "1.6-Vicuna-7B", "1.6-Vicuna-13B", "1.6-Mistral-7B", "1.6-34B")
_TABLE: Mapping[str, tuple[float | None, ...]] = {
    "vqav2": (78.5, 80.0, 81.8, 82.8, 82.2, 83.7),
    "gqa": (62.0, 63.3, 64.2, 65.4, 64.8, 67.1),
    "vizwiz": (50.0, 53.6, 57.6, 60.5, 60.0, 63.8),
    "scienceqa-img": (66.8, 71.6, 70.1, 73.6, 72.8, 81.8),
    "textvqa": (58.2, 61.3, 64.9, 67.1, 65.7, 69.5),
    "pope": (85.9, 85.9, 86.5, 86.2, 86.7, 87.7),
    "mme": (1510.7, 1531.3, 1519.0, 1575.0, 1498.0, 1631.0),
    "mmbench": (64.3, 67.7, 67.4, 70.0, 68.7, 79.3),
    "mmbench-cn": (58.3, 63.6, 60.6, 64.4, 61.2, 79.0),
    "seed": (58.6, 61.6, None, None, None, None),  # 1.6 was reported on its images alone
    "llava-bench": (65.4, 72.5, 81.6, 87.3, 83.2, 89.6),
    "mmvet": (31.1, 36.1, 43.9, 48.4, 47.3, 57.4),
    "mmmu": (None, 36.4, 35.8, 36.2, 35.3, 51.1),
}


def reference_scores(task: str) -> dict[str, float]:
    """Return the figures of a task by model; empty for tasks that the papers do not have."""
    row = _TABLE.get(task, ())
    return {model: value for model, value in zip(MODELS, row, strict=False) if value is not None}
