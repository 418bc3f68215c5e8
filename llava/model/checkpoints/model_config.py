"""The base model of a checkpoint, and the config object that its model is built from.

In: `CheckpointInfo` of a folder. Out: that of its base, and a transformers config with `mm_*` attributes. While a model is
built, `resolved_tower_path` lets the config name its vision tower by an absolute path. Models are built in
model/builder.py, and without memory in meta_model.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from llava.errors import InputError
from llava.model.checkpoints.hf_layout import translate_config
from llava.model.checkpoints.hub import resolve_checkpoint, resolve_vision_tower
from llava.model.checkpoints.inspect import CheckpointInfo, folders_of, inspect
from llava.model.config import OWN_FOLDER, is_multimodal

logger = logging.getLogger(__name__)


def find_base(info: CheckpointInfo, base: str | Path | None) -> CheckpointInfo | None:
    """Find the base model of a checkpoint: the one given, or the one that its files name.

    A whole model needs none (None); a base that is given for it is used for the files that the model lacks, with a warning.

    Raises:
        InputError: The base is needed and not found, or is no whole model itself.
    """
    if base is None:
        if not info.needs_base:
            return None
        base = named_base(info)
    elif not info.needs_base:
        logger.warning("%s is a whole model: the base %s is used only for what it lacks", info.folder, base)
    try:
        found = inspect(resolve_checkpoint(base, what="base model"))
    except InputError as error:
        raise InputError(
            f"{info.folder} needs its base model: {error}; pass its path as model_base (--model-base)"
        ) from error
    if found.needs_base:
        raise InputError(
            f"the base {found.folder} is itself without a language model; pass the folder of a whole model as model_base"
        )
    return found


def named_base(info: CheckpointInfo) -> str:
    """The base model that a checkpoint's own files name, as a folder or hub repository."""
    what = "a LoRA adapter" if info.kind == "lora" else "a projector without a language model"
    if info.base_hint is None:
        raise InputError(f"{info.folder} is {what}; pass the folder of its base model as model_base (--model-base)")
    logger.info("%s is %s; its files name the base model %s", info.folder, what, info.base_hint)
    beside = info.folder / info.base_hint
    return str(beside) if beside.is_dir() and beside != info.folder else info.base_hint


def build_config(info: CheckpointInfo, base_info: CheckpointInfo | None) -> PreTrainedConfig:
    """Build the config object of a checkpoint's model, in the original layout whatever layout the folder has."""
    values: Mapping[str, object] = info.config
    if info.kind == "transformers":
        values = translate_config(values, folder=info.folder)
    elif not values and base_info is not None:  # an adapter for a plain language model comes without a config
        values = base_info.config
    values = {key: value for key, value in values.items() if key != "quantization_config" or info.stores_quantized}
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = _config_object(values, info.language_model)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{info.folder / 'config.json'} does not describe a model: {reason}") from error
    config.name_or_path = str(info.folder)
    return config


def _config_object(values: Mapping[str, object], language_model: str) -> PreTrainedConfig:
    if is_multimodal(values):
        from llava.model.language_model.registry import llava_classes

        config_class, _ = llava_classes(language_model)
        return config_class.from_dict({key: value for key, value in values.items() if key != "model_type"})
    return AutoConfig.for_model(**values)


@contextmanager
def resolved_tower_path(
    config: PreTrainedConfig, info: CheckpointInfo, base_info: CheckpointInfo | None, *, stored: bool
) -> Iterator[None]:
    """Within the block, let `config` name its vision tower by an absolute path.

    The config of an adapter is a copy of its base's, so a relative folder that it names may be the base's. `stored` says
    whether the tower's weights are among the checkpoint's.
    """
    name, unfrozen = config.mm_vision_tower, getattr(config, "unfreeze_mm_vision_tower", None)
    if name != OWN_FOLDER:
        beside = next(
            (folder for folder in folders_of(info, base_info) if (folder / name / "config.json").is_file()), info.folder
        )
        config.mm_vision_tower = resolve_vision_tower(name, checkpoint_folder=beside)
    config.unfreeze_mm_vision_tower = stored
    try:
        yield
    finally:
        config.mm_vision_tower = name
        config.unfreeze_mm_vision_tower = unfrozen
        if unfrozen is None:
            del config.unfreeze_mm_vision_tower


def restore_config(built: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Give the config of a built model, a copy made within `resolved_tower_path`, the names that its file has."""
    built.name_or_path = config.name_or_path
    for key in ("mm_vision_tower", "unfreeze_mm_vision_tower"):
        if hasattr(config, key):
            setattr(built, key, getattr(config, key))
        elif hasattr(built, key):
            delattr(built, key)
