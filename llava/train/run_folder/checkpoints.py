"""Write, check and rotate the folders `checkpoint-N` of a run.

In: the folder of a run. Out: its newest complete checkpoint; a staging folder for the next one, which is renamed when
everything is on the disk. The contents of a checkpoint are written by save.py and transformers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.errors import InputError, is_disk_full
from llava.files import STAGING, TRASH, flush, flush_tree
from llava.model.checkpoints.weight_files import read_headers
from llava.train.run_folder.save import PROJECTOR_FILE

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHT_FILES = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_ZIPPED = (".pt", ".pth", ".bin")  # torch.save writes zip archives, whose directory is at their end


def step_of(folder: Path) -> int | None:
    """The N of `checkpoint-N`."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match and folder.is_dir() else None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoints by step, the newest last."""
    steps = {folder: step_of(folder) for folder in run_folder.glob("checkpoint-*")}
    return sorted((folder for folder, step in steps.items() if step is not None), key=lambda folder: steps[folder] or 0)


def latest_checkpoint(run_folder: Path) -> Path | None:
    """Find the newest complete checkpoint; each damaged one is skipped with a warning."""
    for folder in reversed(list_checkpoints(run_folder)):
        fault = checkpoint_fault(folder)
        if fault is None:
            return folder
        logger.warning("skipping %s: %s", folder, fault)
    return None


def checkpoint_fault(folder: Path) -> str | None:
    """Say why a run cannot resume from this folder, if it cannot."""
    state = folder / STATE_FILE
    if not state.is_file():
        return f"it has no {STATE_FILE}"
    try:
        json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError):
        return f"its {STATE_FILE} cannot be read"
    if not _has_weights(folder):
        return "it has no weights"
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" and not _is_whole_safetensors(file):
            return f"its {file.name} is cut off"
        if file.suffix in _ZIPPED and not zipfile.is_zipfile(file):
            return f"its {file.name} is cut off"
        if file.name in _INDEX_FILES and (missing := _missing_shard(file)):
            return f"its {missing} is missing"
    return None


def _has_weights(folder: Path) -> bool:
    if any((folder / name).is_file() for name in (*_WEIGHT_FILES, *_INDEX_FILES, PROJECTOR_FILE)):
        return True
    # Sharded weights: DeepSpeed's `global_stepN`, FSDP's `pytorch_model_fsdp_0`.
    return any(
        entry.is_dir() and ("fsdp" in entry.name or entry.name.startswith("global_step")) for entry in folder.iterdir()
    )


def _is_whole_safetensors(file: Path) -> bool:
    """Whether the file is as long as its header says."""
    try:
        headers = read_headers(file).values()
    except InputError:
        return False
    size = file.stat().st_size
    return size == max(((header.start or 0) + header.num_bytes for header in headers), default=size)


def _missing_shard(index: Path) -> str | None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError):
        return f"list of weight files ({index.name})"
    return next((name for name in sorted(shards) if not (index.parent / name).is_file()), None)


# Writing


def staging_folder(run_folder: Path, step: int) -> Path:
    """The folder in which `checkpoint-<step>` is written before it is moved into the run's folder."""
    return run_folder / f"{STAGING}checkpoint-{step}"


def remove_unfinished_checkpoints(run_folder: Path) -> None:
    """Remove unfinished folders of a run that was killed while it saved or deleted."""
    for folder in [*run_folder.glob(f"{STAGING}*"), *run_folder.glob(f"{TRASH}*")]:
        logger.warning("removing %s, left by a run that was stopped while it saved", folder)
        shutil.rmtree(folder, ignore_errors=True)


def finalize_checkpoint(staging: Path, step: int) -> Path:
    """Flush a complete checkpoint to disk, then rename it."""
    written, final = staging / f"checkpoint-{step}", staging.parent / f"checkpoint-{step}"
    flush_tree(written)
    if final.exists():  # of an earlier run
        delete(final)
    os.rename(written, final)
    flush(final.parent)
    shutil.rmtree(staging, ignore_errors=True)
    return final


def rotate_checkpoints(run_folder: Path, limit: int | None, *, keep: str | None = None) -> None:
    """Delete the oldest checkpoints over `limit`, but never the newest, nor `keep` (the best one)."""
    if not limit or limit < 1:
        return
    folders = list_checkpoints(run_folder)
    protected = {folders[-1], *([Path(keep)] if keep else [])} if folders else set()
    surplus = len(folders) - max(limit, len(protected))
    for folder in [folder for folder in folders if folder not in protected][: max(surplus, 0)]:
        delete(folder)


def delete(folder: Path) -> None:
    """Rename a folder, then remove it, so that a half-removed one is never taken for a checkpoint."""
    trash = folder.with_name(f"{TRASH}{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def explain_full_disk(what: str, run_folder: Path, *, discard: Path | None = None) -> Iterator[None]:
    """Turn the error of a full disk into one sentence, and remove what was written so far (`discard`)."""
    try:
        yield
    except Exception as error:
        if discard is not None:
            shutil.rmtree(discard, ignore_errors=True)
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(run_folder).free / 2**30
        last = latest_checkpoint(run_folder)
        kept = (
            f"{last.name} is complete, and the same command resumes from it" if last else "there is no checkpoint yet"
        )
        raise InputError(
            f"cannot write {what}: the disk of {str(run_folder)!r} is full or limited ({free:.2f} GiB are free, without "
            f"what was begun); {kept}; make room, lower --save_total_limit, or choose another --output_dir"
        ) from error
