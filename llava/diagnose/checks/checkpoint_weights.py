"""Checks of a checkpoint's weights: adapter against base, names and shapes against the config, numbers, the smoke test.

In: an `ExaminedCheckpoint` that passed the earlier checks. Out: findings. Numbers are read tensor by tensor, so that a large
model needs no more memory than its largest tensor; the smoke test loads the model with `llava.load`.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path

from llava.diagnose.checks.checkpoint_files import COPY_AGAIN, ExaminedCheckpoint
from llava.diagnose.checks.findings import CheckSkipped, DoctorFinding, found, reported
from llava.model.checkpoints.hf_layout import comparable_name
from llava.model.checkpoints.inspect import PROJECTOR_INFIX, TOWER_INFIX
from llava.model.checkpoints.lora import ADAPTER_NAME
from llava.model.checkpoints.weight_files import TensorHeader, open_tensors

# Far above any trained weight; a flipped bit in an exponent exceeds it.
IMPOSSIBLE = 1e6


def check_adapter(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check a LoRA adapter's matrices against adapter_config.json and the base's tensors."""
    info = checkpoint.info
    if not info.adapter or checkpoint.base is None:
        return
    base = {comparable_name(name): header for name, header in checkpoint.tensors.items()}
    stores_tower = any(TOWER_INFIX in name for name in base)
    rank = (info.adapter_config or {}).get("r")
    absent, other, empty, ranks = [], [], [], set()
    for name, header in info.adapter.items():
        match = ADAPTER_NAME.fullmatch(name)
        if match is None or match["part"] not in ("lora_A", "lora_B"):
            continue
        if header.num_elements == 0:
            empty.append(header)
            continue
        if len(header.shape) == 1 or (TOWER_INFIX in name and not stores_tower):  # a bias; a tower in its own folder
            continue
        axis = 0 if match["part"] == "lora_A" else 1
        ranks.add(header.shape[axis])
        target = base.get(comparable_name(match["module"]) + ".weight")
        if target is None:
            absent.append(match["module"])
        elif header.shape[1 - axis] != target.shape[1 - axis]:
            other.append((match["module"], list(header.shape), list(target.shape)))
    if empty:
        yield found(
            "lora-empty",
            f"{empty[0].file} holds {len(empty)} matrices without numbers, {empty[0].name} first",
            "save the adapter again with llava train, which gathers tensors under ZeRO-3",
            matrix=empty[0].name,
            shape=list(empty[0].shape),
        )
        return
    if absent or other:
        what = (
            f"{len(absent)} tensors that the base {checkpoint.base.folder} does not have, {absent[0]} first"
            if absent
            else f"{other[0][0]} by matrices of shape {other[0][1]}, where {checkpoint.base.folder} has {other[0][2]}"
        )
        yield found(
            "lora-base",
            f"the adapter changes {what}: it was trained on another base",
            f"give the base that it was trained on with --model-base (its files name {info.base_hint!r})",
            absent=len(absent),
            of_other_shape=len(other),
        )
        return
    patterns = (info.adapter_config or {}).get("rank_pattern")
    if rank is not None and not patterns and ranks and ranks != {rank}:
        yield found(
            "lora-rank",
            f"adapter_config.json says r = {rank}, and the matrices have rank {sorted(ranks)}: the adapter would be scaled by "
            f"lora_alpha / {rank}",
            "set r to the rank of the matrices, with the lora_alpha of the run",
            r=rank,
            stored=sorted(ranks),
        )


def check_structure(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check every stored name and shape against the model that the config describes, without reading numbers."""
    info = checkpoint.info
    empty = [name for name, header in checkpoint.tensors.items() if header.num_elements == 0]
    if empty:
        yield found(
            "weights-empty",
            f"{len(empty)} tensors have no numbers, {empty[0]} first: they were saved while ZeRO-3 had them scattered",
            "save the model again with llava train, or put it together with DeepSpeed's zero_to_fp32.py",
            tensors=len(empty),
            first=empty[0],
        )
        return
    if not info.is_multimodal or info.stores_quantized:
        raise CheckSkipped("transformers itself loads a plain or quantized language model")
    from llava.model.checkpoints.loading import check_structure as match_structure
    from llava.model.checkpoints.loading import plan_sources, with_own_tower
    from llava.model.checkpoints.model_config import build_config, resolved_tower_path
    from llava.model.language_model.registry import llava_classes

    base_info = checkpoint.base_info
    folder = str(checkpoint.folder)
    with reported("weights-config", "take config.json and weights from one and the same save", folder=folder):
        config = build_config(info)
        _, model_class = llava_classes(info.language_model)
        sources = plan_sources(info, base_info, prefix=model_class.base_model_prefix)
        stored = sources.stores_tower or sources.merges_tower
        with resolved_tower_path(config, info, base_info, stored=stored, names=sources.headers):
            if sources.merges_tower and not sources.stores_tower:
                sources = with_own_tower(sources, Path(config.mm_vision_tower), prefix=model_class.base_model_prefix)
            match_structure(lambda: model_class(copy.deepcopy(config)), sources, info.config_folder / "config.json")


def check_stored_tower(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Compare a stored tower that config.json does not call trained with the one that is used in its place."""
    from llava.model.checkpoints.loading import differing_tower_tensors, plan_sources

    sources = plan_sources(checkpoint.info, checkpoint.base_info, prefix="model")
    tower = checkpoint.extras.get("tower")
    if tower is None or not sources.unused_tower:
        return
    different = differing_tower_tensors(sources, Path(tower.vision_tower_name))
    if different:
        yield found(
            "tower-unused",
            f"{checkpoint.folder} stores {len(different)} vision tower tensors, {different[0]} first, that differ from those "
            f"of {tower.vision_tower_name}; the latter are used, as in the original",
            "if the tower was trained, set unfreeze_mm_vision_tower to true in config.json; if it was not, name the tower of "
            "the training in mm_vision_tower",
            different=len(different),
            stored=len(sources.unused_tower),
        )


def check_numbers(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check for NaN, infinity, impossibly large numbers, and parts that are all zero."""
    import torch

    by_file: dict[Path, list[TensorHeader]] = {}
    tensors = {**checkpoint.tensors, **checkpoint.info.adapter}
    if not checkpoint.info.trains_tower:  # a frozen copy of the tower, which loading ignores
        tensors = {name: header for name, header in tensors.items() if TOWER_INFIX not in name}
    for header in tensors.values():
        by_file.setdefault(header.file, []).append(header)
    damaged: list[tuple[TensorHeader, int]] = []
    zero: set[str] = set()
    for file, headers in by_file.items():
        with open_tensors(file) as stored:
            for header in headers:
                tensor = header.read_from(stored)
                if not tensor.is_floating_point() or not tensor.numel():
                    continue
                bad = int((~(tensor.float().abs() < IMPOSSIBLE)).sum())
                if bad:
                    damaged.append((header, bad))
                if not torch.any(tensor):
                    zero.add(header.name)
    if damaged:
        header, bad = damaged[0]
        yield found(
            "weights-damaged",
            f"{len(damaged)} tensors hold NaN, infinity or numbers above {IMPOSSIBLE:.0e}; {header.name} in {header.file.name} "
            f"has {bad} of them",
            f"{COPY_AGAIN}; if the original has them too, its training failed: take an earlier checkpoint",
            tensors=len(damaged),
            first=header.name,
            file=str(header.file),
            numbers=bad,
        )
    projector = [name for name in zero if PROJECTOR_INFIX in name and name.endswith("weight")]
    if projector:
        yield found(
            "projector-dead",
            f"{projector[0]} is all zero, so every image gives the same features",
            "take the projector of a run that trained it",
            zero=sorted(projector),
        )
    matrices = [name for name in checkpoint.info.adapter if re.search(r"lora_B\b", name)]
    if matrices and all(checkpoint.info.adapter[name].name in zero for name in matrices):
        yield found(
            "lora-untrained",
            f"all {len(matrices)} B matrices of the adapter are zero: it changes nothing",
            "take the adapter from a later checkpoint, and look whether its run trained anything",
            matrices=len(matrices),
        )


def check_smoke_test(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Load the model and run the smoke test."""
    from llava.diagnose.checks.smoke_test import run_smoke_test
    from llava.model.builder import load
    from llava.model.device import pick_device

    device = pick_device("auto")
    needed = 4 * sum(header.num_elements for header in checkpoint.tensors.values())
    if device.type == "cpu" and (free := free_memory()) is not None and needed > free:
        sizes = f"needs {needed / 2**30:.0f} GiB of main memory, and {free / 2**30:.0f} are free"
        raise CheckSkipped(f"in float32 the model {sizes}")
    base = checkpoint.base.folder if checkpoint.base is not None else None
    with reported("load-fails", "do what the sentence says", folder=str(checkpoint.folder)):
        # Dtypes with float32's range, so that activations too large for float16 can be measured.
        loaded = load(checkpoint.folder, base=base, dtype="fp32" if device.type == "cpu" else "bf16", device=device)
    stored = {header.dtype for header in checkpoint.tensors.values()}
    yield from run_smoke_test(loaded, half="F16" in stored and "BF16" not in stored)


def free_memory() -> int | None:
    """Return the free main memory in bytes, None where the system does not report it."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, macOS
        return None
