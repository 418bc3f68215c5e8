"""The original layout: config.json with `mm_*` keys, published tensor names, the tokenizer's files.

In: a `Source` and where its tower goes. Out: the planned tensors of a target and its small files. The tower's weights are
stored in the checkpoint, in a folder beside it, or where the source has them.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.convert.source import Source, chat_command, config_for
from llava.convert.verify import Verification, verify_folder
from llava.convert.writer import SHARD_BYTES, ByteProgress, PlannedTensor, write_json, write_safetensors, write_shards
from llava.images.image_processor import TOWER_IMAGE_PROCESSORS, ClipImageProcessor
from llava.model.checkpoints.inspect import TOWER_INFIX
from llava.model.config import OWN_FOLDER

TOWER_FOLDER = "vision_tower"
# Keys that transformers' LLaVA processors add to those of a tower's processor.
LLAVA_PROCESSOR_KEYS = ("do_pad", "processor_class", "image_grid_pinpoints")


class OriginalLayout:
    """A target in the original layout."""

    def __init__(self, source: Source, *, tower: str = "keep", shard_bytes: int = SHARD_BYTES) -> None:
        self.source = source
        self.shard_bytes = shard_bytes
        # Where the tower's weights go: "in" the checkpoint, "out" in a folder, or "named": wherever the config says.
        kept = "in" if source.meta_model.tower_folder is None else "named"
        self.place = kept if tower == "keep" else tower

    def tensors(self) -> list[PlannedTensor]:
        source = self.source
        return [source.planned(name, name) for name in source.names if self.place == "in" or not source.is_tower(name)]

    def config(self) -> dict[str, Any]:
        changes: dict[str, Any] = {"architectures": [type(self.source.model).__name__]}
        if self.place == "in":
            changes |= {"mm_vision_tower": self._tower_name(), "unfreeze_mm_vision_tower": True}
        elif self.place == "out":
            changes |= {"mm_vision_tower": TOWER_FOLDER, "unfreeze_mm_vision_tower": False}
        if self.place != "named":  # the tower's folder describes what is stored, which may be a part of the tower
            changes["mm_vision_select_layer"] = self.source.tower.select_layer
        values = config_for(self.source, changes)
        if values["mm_vision_tower"] != OWN_FOLDER:
            values.pop("vision_config", None)  # the tower's folder has it
        return values

    def _tower_name(self) -> str:
        """A relative name is kept: the target gets a folder of that name with the tower's config."""
        name = str(self.source.config.get("mm_vision_tower"))
        is_plain = name != OWN_FOLDER and Path(name).name == name
        return name if is_plain else TOWER_FOLDER

    @property
    def num_bytes(self) -> int:
        beside = self.tower_tensors() if self.place == "out" else []
        return sum(planned.num_bytes for planned in [*self.tensors(), *beside])

    def write(self, folder: Path, progress: ByteProgress) -> None:
        """Write all files, config.json last: a folder without it is not taken for a model."""
        write_shards(folder, self.tensors(), shard_bytes=self.shard_bytes, progress=progress)
        if self.place == "out":
            (folder / TOWER_FOLDER).mkdir()
            write_safetensors(folder / TOWER_FOLDER / "model.safetensors", self.tower_tensors(), progress=progress)
        self._write_small_files(folder)

    def verify(self, folder: Path, *, logits: bool) -> Verification:
        return verify_folder(self.source, folder, logits=logits)

    def notes(self) -> list[str]:
        return []

    def left_out(self) -> dict[str, tuple[str, ...]]:
        if self.place != "named":
            return {}
        names = tuple(name for name in self.source.names if self.source.is_tower(name))
        return {f"the vision tower stays in {self.source.meta_model.tower_folder}, which config.json names": names}

    def commands(self, target: Path) -> list[str]:
        return [chat_command(target)]

    def _write_small_files(self, folder: Path) -> None:
        source = self.source
        values = self.config()
        source.copy_tokenizer(folder)
        source.copy_generation_config(folder)
        if self.place == "named":
            self._copy_tower(folder)
        else:
            self._write_tower_config(folder / values["mm_vision_tower"])
        write_json(folder / "config.json", values)

    def tower_tensors(self) -> list[PlannedTensor]:
        """The tower's own weights, under the names that CLIP and SigLIP checkpoints have."""
        source = self.source
        return [source.planned(name, name.partition(TOWER_INFIX)[2]) for name in source.names if source.is_tower(name)]

    def _write_tower_config(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.source.tower_config)
        self._tower_processor().save_pretrained(folder)

    def _tower_processor(self) -> ClipImageProcessor:
        """The tower's own image processor: in this layout padding and tiles are in the model's config."""
        processor = self.source.image_processor
        if "Llava" not in processor.image_processor_type:
            return processor
        extra = {key: value for key, value in processor.extra.items() if key not in LLAVA_PROCESSOR_KEYS}
        return replace(
            processor, image_processor_type=TOWER_IMAGE_PROCESSORS[self.source.tower_config["model_type"]], extra=extra
        )

    def _copy_tower(self, folder: Path) -> None:
        """Copy a tower that its name finds only beside the source; other names find it from anywhere."""
        name, place = str(self.source.config.get("mm_vision_tower")), self.source.meta_model.tower_folder
        beside = [info.folder for info in (self.source.info, self.source.meta_model.base) if info is not None]
        if place is None or Path(name).is_absolute() or ".." in Path(name).parts:
            return
        if any((home / name).absolute() == place.absolute() for home in beside):
            shutil.copytree(place, folder / name)
