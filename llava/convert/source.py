"""Read a checkpoint of any kind as one list of tensors under their published names, with config, tower and tokenizer.

In: a folder, its base where it needs one, and the dtype asked for. Out: `Source`, which plans each tensor of a target
(copied from its file, or computed) and knows the config in the original layout, tower, tokenizer and conversation template.
The layouts are listed in convert.py; files are matched with a model in model/checkpoints/meta_model.py.
"""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.conversation import get_model_name_from_path
from llava.convert.options import DTYPES
from llava.convert.writer import PlannedTensor
from llava.errors import InputError
from llava.files import holds_tokenizer, read_json
from llava.images.image_processor import ClipImageProcessor
from llava.images.layout import ImagePolicy
from llava.model.checkpoints.base_model import original_config
from llava.model.checkpoints.inspect import TOWER_INFIX, VOCABULARY, CheckpointInfo, folders_of
from llava.model.checkpoints.meta_model import MetaModel, open_meta_model
from llava.model.checkpoints.weight_files import TORCH_DTYPES
from llava.model.config import LlavaSettings
from llava.model.protocols import LlavaModel, VisionTower
from llava.model.tokenizer_setup import conv_mode, read_tokenizer
from llava.text.tokenization import Tokenizer

FLOATS = tuple(DTYPES.values())

ORIGINAL_FILES = "original"  # the folder of a transformers-layout target that holds the source's small files unchanged
TOKENIZER_SET = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint that is to be converted. `config` is in the original layout, whatever layout the files are in."""

    meta_model: MetaModel
    config: Mapping[str, Any]
    dtype: str | None  # of the target, as in the safetensors format; None: each tensor keeps its own
    name: str  # of the folder or repository, which may decide the conversation template
    cut_rows: int | None = (
        None  # the vocabulary rows of the original checkpoint, where an earlier conversion added some
    )

    @property
    def info(self) -> CheckpointInfo:
        return self.meta_model.info

    @property
    def folder(self) -> Path:
        return self.info.folder

    @property
    def model(self) -> LlavaModel:
        return self.meta_model.model

    @property
    def tower(self) -> VisionTower:
        tower = self.model.get_vision_tower()
        assert tower is not None, "a meta model has its tower"
        return tower

    @property
    def prefix(self) -> str:
        """The prefix of the inner model's tensors, `model.` for most language models."""
        return f"{self.model.base_model_prefix}."

    @cached_property
    def settings(self) -> LlavaSettings:
        return LlavaSettings.from_hf(self.model.config)

    @property
    def policy(self) -> ImagePolicy:
        return self.model.image_policy()

    def require_supported(self, layout: str, unsupported: Mapping[str, bool]) -> None:
        """Raise an `InputError` for the first feature of `unsupported` that this checkpoint has."""
        feature = next((feature for feature, is_there in unsupported.items() if is_there), None)
        if feature is not None:
            raise InputError(f"the {layout} layout cannot express {feature}, which {self.folder} has")

    # Tensors

    @cached_property
    def names(self) -> list[str]:
        """All stored tensors by file and position in it, so that files are read sequentially."""
        found = self.meta_model.found
        return sorted(found, key=lambda name: (str(found[name].file), found[name].start or 0))

    def is_tower(self, name: str) -> bool:
        return TOWER_INFIX in name

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.meta_model.shapes[name]
        return (self.cut_rows, *shape[1:]) if self.cut_rows is not None and self.is_vocabulary(name) else shape

    def is_vocabulary(self, name: str) -> bool:
        return VOCABULARY.search(name) is not None

    def dtype_of(self, name: str) -> str:
        stored = self.meta_model.found[name].dtype
        return self.dtype if self.dtype is not None and stored in FLOATS else stored

    def read(self, name: str) -> Tensor:
        tensor = self.meta_model.read(name)
        return tensor[: self.cut_rows] if self.cut_rows is not None and self.is_vocabulary(name) else tensor

    def planned(self, name: str, target_name: str) -> PlannedTensor:
        """Plan a tensor that changes only its name, and its dtype if one is asked for."""
        header, dtype, shape = self.meta_model.found[name], self.dtype_of(name), self.shape(name)
        as_is = self.meta_model.is_stored_as_is(name) and dtype == header.dtype
        stored = replace(header, shape=shape) if as_is else None
        return PlannedTensor(target_name, dtype, shape, lambda: self.read(name), stored)

    # Config, tower and tokenizer

    @property
    def tower_config(self) -> dict[str, Any]:
        values = self.tower.config.to_dict()
        return {key: value for key, value in values.items() if key not in ("transformers_version", "_name_or_path")}

    @property
    def image_processor(self) -> ClipImageProcessor:
        return self.tower.image_processor

    @cached_property
    def tokenizer_folder(self) -> Path:
        folders = folders_of(self.info, self.meta_model.base)
        if self.is_restored:
            folders.insert(0, self.folder / ORIGINAL_FILES)
        found = next((folder for folder in folders if holds_tokenizer(folder)), None)
        if found is None:
            raise InputError(
                f"{self.folder} holds no tokenizer (tokenizer.model, tokenizer.json or vocab.json); copy its files there"
            )
        return found

    @property
    def is_restored(self) -> bool:
        """Whether the small files come from `ORIGINAL_FILES`, which an earlier conversion kept."""
        return self.cut_rows is not None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.tokenizer_folder, self.model.config)

    @cached_property
    def conv_mode(self) -> str:
        return conv_mode(self.config, self.tokenizer, self.name)

    def copy_tokenizer(self, target: Path) -> None:
        """Copy the tokenizer's files; a base model's tokenizer is saved anew, with the tokens that the checkpoint adds."""
        if self.tokenizer_folder in (self.folder, self.folder / ORIGINAL_FILES):
            copy_files(self.tokenizer_folder, target, TOKENIZER_SET)
        else:
            self.tokenizer.save_pretrained(target)

    def copy_generation_config(self, target: Path) -> None:
        for folder in folders_of(self.info, self.meta_model.base):
            if (folder / "generation_config.json").is_file():
                shutil.copyfile(folder / "generation_config.json", target / "generation_config.json")
                return


def open_source(path: str | Path, *, base: str | Path | None = None, dtype: str | None = None) -> Source:
    """Open a checkpoint for conversion and check that its files fit together.

    Args:
        path: A model folder or hub repository.
        base: The base model of an adapter or projector.
        dtype: The dtype of the target, a key of `DTYPES`; None keeps each tensor's own.
    """
    meta_model = open_meta_model(path, base)
    info = meta_model.info
    config = original_config(info)
    cut_rows = None
    if info.kind == "transformers":
        kept = info.folder / ORIGINAL_FILES / "config.json"
        if kept.is_file():
            before = read_json(kept)
            if _is_same_model(before, config):
                cut_rows = int(before["vocab_size"])
                config = before
    chosen = None if dtype is None else DTYPES[dtype]
    if chosen is None and info.needs_base:  # parts of two checkpoints become one, in the dtype of the larger
        chosen = stored_dtype(meta_model.base or info)
    name = get_model_name_from_path(str(path))
    return Source(meta_model, config, chosen, name, cut_rows)


def _is_same_model(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the config that was kept still describes the checkpoint, which may have been changed since."""
    same = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "mm_hidden_size")
    agree = all(before.get(key) == now.get(key) for key in same)
    return agree and isinstance(before.get("vocab_size"), int) and before["vocab_size"] <= now.get("vocab_size", 0)


def stored_dtype(info: CheckpointInfo) -> str:
    """The dtype that most of a checkpoint's elements are stored in."""
    counts = Counter(dict.fromkeys(FLOATS, 0))
    for header in info.tensors.values():
        counts[header.dtype] += header.num_elements
    return max(FLOATS, key=lambda name: counts[name])


def chat_command(folder: Path) -> str:
    """The command that starts a conversation with the model in a folder."""
    return f"llava chat -m {shlex.quote(str(folder))}"


def copy_files(folder: Path, target: Path, names: Iterable[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def config_for(source: Source, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config with `changes`, without keys that hold for the source's folder only."""
    dropped = ("_name_or_path", "quantization_config", "dtype", "transformers_version")
    values = {key: value for key, value in source.config.items() if key not in dropped}
    values["torch_dtype"] = TORCH_DTYPES[source.dtype or stored_dtype(source.info)]  # the key that every version reads
    return values | dict(changes)
