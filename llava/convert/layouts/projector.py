"""The projector alone: a folder with config.json and `mm_projector.bin`, as pretraining leaves it.

In: a `Source`. Out: a folder that loads with a base model, or one file of the projector's tensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from llava.convert.source import Source, chat_command, config_for, open_source
from llava.convert.verify import TensorComparison, Verification, VerificationError, require_same_names, rounding
from llava.convert.writer import ByteProgress, PlannedTensor, write_json
from llava.errors import InputError
from llava.files import STAGING, flush, refuse_existing
from llava.model.checkpoints.inspect import PROJECTOR_FILES, PROJECTOR_INFIX
from llava.model.checkpoints.weight_files import TORCH_DTYPES, load_pickled_tensors
from llava.model.config import LEARNED_ENDS

PROJECTOR_FILE = PROJECTOR_FILES[1]


class ProjectorLayout:
    """A target that holds the projector alone."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.names = [name for name in source.names if PROJECTOR_INFIX in name or name.endswith(LEARNED_ENDS)]
        if not any(PROJECTOR_INFIX in name for name in self.names):
            raise InputError(f"{source.folder} has a projector without weights (mm_projector_type identity)")

    def tensors(self) -> list[PlannedTensor]:
        return [self.source.planned(name, name) for name in self.names]

    @property
    def num_bytes(self) -> int:
        return sum(planned.num_bytes for planned in self.tensors())

    def write(self, folder: Path, progress: ByteProgress) -> None:
        save(self.tensors(), folder / PROJECTOR_FILE)
        progress.update(self.num_bytes)
        write_json(folder / "config.json", config_for(self.source, {"tune_mm_mlp_adapter": True}))

    def verify(self, folder: Path, *, logits: bool) -> Verification:
        return Verification(verify_projector_file(self.source, self.tensors(), folder / PROJECTOR_FILE))

    def left_out(self) -> dict[str, tuple[str, ...]]:
        others = tuple(name for name in self.source.names if name not in self.names)
        return {"language model and vision tower, which are no part of a projector": others}

    def notes(self) -> list[str]:
        return [f"it loads beside its base model, of type {self.source.config.get('model_type')}"]

    def commands(self, target: Path) -> list[str]:
        return [f"{chat_command(target)} --model-base BASE"]


def save(tensors: list[PlannedTensor], file: Path) -> None:
    """Write tensors as a `.bin` file."""
    table: dict[str, Tensor] = {}
    for planned in tensors:
        table[planned.name] = planned.make().to(getattr(torch, TORCH_DTYPES[planned.dtype])).clone()
    torch.save(table, file)


def verify_projector_file(source: Source, tensors: list[PlannedTensor], file: Path) -> TensorComparison:
    """Read a projector file back and compare its tensors with the source's."""
    stored = load_pickled_tensors(file)
    require_same_names([planned.name for planned in tensors], stored)
    largest = 0.0
    for planned in tensors:
        found = stored[planned.name]
        if tuple(found.shape) != planned.shape:
            raise VerificationError(f"tensor {planned.name!r} was written with shape {list(found.shape)}")
        largest = max(largest, rounding(planned.name, source.read(planned.name), found, found.dtype))
    return TensorComparison(len(tensors), sum(planned.num_bytes for planned in tensors), largest)


def extract_mm_projector(model_path: str, output: str) -> TensorComparison:
    """Write the projector's tensors of a model folder or hub repository, in whatever layout, to one new `.bin` file.

    The file appears complete or not at all.
    """
    file = Path(output)
    refuse_existing(file)
    source = open_source(model_path)
    tensors = ProjectorLayout(source).tensors()
    file.absolute().parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_name(f"{STAGING}{file.name}")
    try:
        save(tensors, begun)
        comparison = verify_projector_file(source, tensors, begun)
        flush(begun)
        os.rename(begun, file)
    finally:
        begun.unlink(missing_ok=True)
    return comparison
