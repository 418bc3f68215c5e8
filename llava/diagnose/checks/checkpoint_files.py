"""Checks of a checkpoint's files, each read by itself, so that one damaged file does not hide another.

In: a model folder, perhaps its base. Out: `ExaminedCheckpoint`, its parts as far as they can be read, and findings. Only
headers are read, without torch. Whether the parts fit together is checked in checkpoint_vision.py, checkpoint_text.py and
checkpoint_weights.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.diagnose.checks.findings import DoctorFinding, Fix, found, reported
from llava.errors import InputError
from llava.files import read_json
from llava.model.checkpoints.base_model import base_on_disk, find_base, original_config, over_base
from llava.model.checkpoints.foreign import ForeignModel, foreign_model
from llava.model.checkpoints.gguf.folder import is_gguf_folder
from llava.model.checkpoints.hub import resolve_checkpoint
from llava.model.checkpoints.inspect import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    NON_LORA_FILES,
    PROJECTOR_FILES,
    SHARD,
    WEIGHT_FORMS,
    CheckpointInfo,
    read_config,
    stored_tensors,
    survey,
)
from llava.model.checkpoints.weight_files import TensorHeader, read_headers
from llava.model.config import LlavaSettings, check_types

COPY_AGAIN = "copy or download the file again, and compare its size with the original's"


@dataclass
class ExaminedCheckpoint:
    """A model folder under examination. A property can be read once the checks before it have passed."""

    folder: Path
    base: ExaminedCheckpoint | None = None
    base_named: str | None = None  # the base that was given, or that the folder's own files name
    base_info: CheckpointInfo | None = None  # the base as loading finds it; set by `check_base_files`
    extras: dict[str, Any] = field(default_factory=dict)  # results of checks for later ones: tower, tokenizer

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as stored; empty for an adapter without one."""
        return read_config(self.folder, required=not (self.folder / ADAPTER_CONFIG).is_file())

    @cached_property
    def _found(self) -> CheckpointInfo:
        return survey(self.folder)

    @property
    def info(self) -> CheckpointInfo:
        """What the folder holds; an adapter without a config of its own has its base's."""
        return over_base(self._found, self.base_info)

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The config in the original layout."""
        return original_config(self.info)

    @property
    def view(self) -> SimpleNamespace:
        """The config as the attributes that `LlavaSettings` reads."""
        return SimpleNamespace(**{**self.values, "name_or_path": str(self.info.config_folder)})

    @cached_property
    def settings(self) -> LlavaSettings:
        return LlavaSettings.from_hf(self.view)

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        """Every stored tensor by its published name; the folder's own override the base's."""
        below = {**self.base_info.tensors, **self.base_info.extras} if self.base_info is not None else {}
        return {**below, **self.info.tensors, **self.info.extras}

    def named(self, ending: str) -> TensorHeader | None:
        """Return the stored tensor whose name ends with `ending`."""
        return next((h for name, h in self.tensors.items() if name == ending or name.endswith("." + ending)), None)


def open_checkpoint(path: str | Path, base: str | Path | None = None) -> ExaminedCheckpoint:
    """Open a folder to examine. Without `base`, `check_base` looks for the base where loading would."""
    folder = resolve_checkpoint(path)
    if base is None:
        return ExaminedCheckpoint(folder)
    return ExaminedCheckpoint(folder, ExaminedCheckpoint(resolve_checkpoint(base, what="base model")), str(base))


def check_config(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    file = checkpoint.folder / "config.json"
    try:
        config = checkpoint.config
    except InputError as error:
        size = file.stat().st_size if file.is_file() else None
        yield found("config-unreadable", str(error), COPY_AGAIN, file=str(file), bytes=size)
    else:
        model = foreign_model(config, _tensor_names(checkpoint.folder)) if config else None
        if model is not None:
            yield _foreign(checkpoint.folder, model, config)
            return
        try:
            check_types(config, file)
        except InputError as error:
            yield found("config-value", str(error), "set it as in training", file=str(file))
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        try:
            check_types(read_json(generation), generation)
        except InputError as error:
            yield found(
                "generation-config",
                str(error),
                "copy the file again, or delete it: then the config's own end token is used",
                fix=_delete("generation_config.json"),
                file=str(generation),
                bytes=generation.stat().st_size,
            )


def check_kind(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Ask the function by which every command decides whether it reads a folder, once its weight files can be read."""
    try:
        info = checkpoint.info
    except InputError as error:  # each file is readable, but together they are no checkpoint
        yield found("weights-config", str(error), "compare the folder with the one that it was copied from")
        return
    if info.foreign is not None:
        yield _foreign(checkpoint.folder, info.foreign, info.config)


def _tensor_names(folder: Path) -> Collection[str]:
    """The names of the stored tensors, as far as their files can be read."""
    try:
        return stored_tensors(folder).keys()
    except InputError:
        return ()


def _foreign(folder: Path, model: ForeignModel, config: Mapping[str, Any]) -> DoctorFinding:
    return found(
        "model-type",
        model.sentence(folder),
        f"use {' or '.join(model.readers)}; if config.json says something wrong, correct it",
        model_type=config.get("model_type"),
    )


def check_weight_files(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Check that every weight file exists, is whole, and holds the tensors that the index places in it."""
    folder = checkpoint.folder
    if is_gguf_folder(folder):  # which is made of the two files' headers
        return
    with suppress(InputError):  # of a config.json that cannot be read, which `check_config` finds
        if foreign_model(checkpoint.config) is not None:
            return  # its weights may lie anywhere
    form = next(((name, indexed) for name, indexed in WEIGHT_FORMS if (folder / name).is_file()), None)
    if form is not None and form[1]:
        yield from _indexed(folder / form[0])
    elif form is not None:
        yield from _readable(folder / form[0])
    else:
        yield from _numbered(folder)
    for name in (*PROJECTOR_FILES, *ADAPTER_FILES, *NON_LORA_FILES):
        if (folder / name).is_file():
            yield from _readable(folder / name)


def _readable(file: Path) -> Iterator[DoctorFinding]:
    try:
        read_headers(file)
    except InputError as error:
        yield found("shard-corrupt", str(error), COPY_AGAIN, file=str(file), bytes=file.stat().st_size)


def _indexed(index: Path) -> Iterator[DoctorFinding]:
    with reported("shard-index", COPY_AGAIN, fix=_rebuild_index(index.name), file=str(index)):
        weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        yield found(
            "shard-index",
            f"{index} has no usable 'weight_map' from tensor names to file names",
            "rebuild it from the shards (--fix)",
            fix=_rebuild_index(index.name),
            file=str(index),
        )
        return
    placed: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        placed.setdefault(name, []).append(tensor)
    misplaced: list[str] = []
    for name, tensors in sorted(placed.items()):
        file = index.parent / name
        if not file.is_file():
            yield found(
                "shard-missing",
                f"{index.name} places {len(tensors)} tensors in {name}, which is not there",
                "copy the missing file into the folder",
                file=str(file),
                tensors=len(tensors),
                first=tensors[0],
            )
            continue
        broken = list(_readable(file))
        yield from broken
        if not broken:
            stored = read_headers(file)
            misplaced += [tensor for tensor in tensors if tensor not in stored]
    if misplaced:
        yield found(
            "shard-index",
            f"{index.name} places {len(misplaced)} tensors in files that do not hold them, {misplaced[0]!r} first",
            "rebuild the index from the shards (--fix), or copy the files of one and the same save together",
            fix=_rebuild_index(index.name),
            tensors=len(misplaced),
            first=misplaced[0],
        )


def _numbered(folder: Path) -> Iterator[DoctorFinding]:
    """Check shards without an index, and folders without a model's weights."""
    shards = {int(match[1]): match for file in sorted(folder.iterdir()) if (match := SHARD.fullmatch(file.name))}
    if shards:
        total = max(int(match[2]) for match in shards.values())
        absent = sorted(set(range(1, total + 1)) - shards.keys())
        if absent:
            yield found(
                "shard-missing",
                f"the folder {folder} has {len(shards)} of {total} shards; number {absent[0]} is not there",
                "copy the missing files into the folder",
                present=len(shards),
                expected=total,
                missing=absent,
            )
        for match in shards.values():
            yield from _readable(folder / match[0])
        return
    parts = [name for name in (*PROJECTOR_FILES, *ADAPTER_FILES) if (folder / name).is_file()]
    if not parts:
        yield found(
            "weights-missing",
            f"the folder {folder} holds no weights",
            f"copy one of {', '.join(name for name, _ in WEIGHT_FORMS)} into it (or {PROJECTOR_FILES[1]}, {ADAPTER_FILES[0]})",
            files=len(list(folder.iterdir())),
        )


def check_base(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    """Find the base model of a projector or an adapter."""
    if checkpoint.base is None and checkpoint.info.needs_base:
        yield from _find_named_base(checkpoint, checkpoint.info)


def _find_named_base(checkpoint: ExaminedCheckpoint, info: CheckpointInfo) -> Iterator[DoctorFinding]:
    hint = info.base_hint
    place = base_on_disk(info)
    what = "a LoRA adapter" if info.kind == "lora" else "a projector without a language model"
    if place is None:
        yield found(
            "base-missing",
            f"{checkpoint.folder} is {what}; its base model {hint!r} is not here"
            if hint
            else f"{checkpoint.folder} is {what}, and names no base model",
            "give the folder of its base model with --model-base",
            base=hint,
        )
        return
    checkpoint.base, checkpoint.base_named = ExaminedCheckpoint(place), hint


def check_base_files(checkpoint: ExaminedCheckpoint) -> Iterator[DoctorFinding]:
    base = checkpoint.base
    if base is None:
        return
    findings = [*check_config(base), *check_weight_files(base)]
    yield from findings
    if not findings:
        with reported("base-missing", "give its base model with --model-base", base=checkpoint.base_named):
            checkpoint.base_info = find_base(checkpoint.info, base.folder)


def _delete(name: str) -> Fix:
    def fix(folder: Path) -> str:
        (folder / name).unlink()
        return f"deleted {name}"

    return fix


def set_in_json(name: str, **values: object) -> Fix:
    """Make a fix that sets keys of a JSON file in the folder; None removes a key."""

    def fix(folder: Path) -> str:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for key, value in values.items():
            if value is None:
                content.pop(key, None)
            else:
                content[key] = value
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        changes = ", ".join(f"{key} removed" if value is None else f"{key} = {value}" for key, value in values.items())
        return f"{name}: {changes}"

    return fix


def _rebuild_index(name: str) -> Fix:
    """Make a fix that rebuilds the index from the headers of the shards."""

    def fix(folder: Path) -> str:
        suffix = ".safetensors" if "safetensors" in name else ".bin"
        shards = [file for file in sorted(folder.iterdir()) if SHARD.fullmatch(file.name) and file.suffix == suffix]
        headers = {file.name: read_headers(file) for file in shards}
        weight_map = {tensor: file for file, stored in headers.items() for tensor in stored}
        size = sum((folder / file).stat().st_size for file in headers)
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return f"{name}: {len(weight_map)} tensors in {len(shards)} files, read from their headers"

    return fix
