"""The config object that a checkpoint's model is built from.

In: `CheckpointInfo` of a folder, completed by base_model.py. Out: a transformers config with `mm_*` attributes. While a model
is built, `resolved_tower_path` lets the config name its vision tower by an absolute path. Models are built in
model/builder.py, and without memory in meta_model.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from llava.errors import InputError
from llava.model.checkpoints.base_model import original_config
from llava.model.checkpoints.hub import DEFAULT_HUB, HubOptions, resolve_vision_tower
from llava.model.checkpoints.inspect import TOWER_INFIX, CheckpointInfo, folders_of
from llava.model.config import OWN_FOLDER, LlavaSettings, described_by, is_multimodal
from llava.model.transformers_internals import forget_implementations

TOWER_LAYER = re.compile(re.escape(TOWER_INFIX) + r"vision_model\.encoder\.layers\.(\d+)\.")
TOWER_HEAD = f"{TOWER_INFIX}vision_model.head."


def build_config(info: CheckpointInfo) -> PreTrainedConfig:
    """Build the config object of a checkpoint's model, in the original layout whatever layout the folder has."""
    values: Mapping[str, object] = original_config(info)
    values = {key: value for key, value in values.items() if key != "quantization_config" or info.stores_quantized}
    file = info.config_folder / "config.json"
    with described_by(file):
        config = _config_object(values, info.language_model)
    activation = getattr(config, "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        raise InputError(f"{file} has hidden_act {activation!r}, which transformers does not have")
    if is_multimodal(values):
        LlavaSettings.from_hf(config)  # refused here, before a model is built
    config.name_or_path = str(info.folder)
    forget_implementations(config)
    return config


def _config_object(values: Mapping[str, object], language_model: str) -> PreTrainedConfig:
    if is_multimodal(values):
        from llava.model.language_model.registry import llava_classes

        config_class, _ = llava_classes(language_model)
        return config_class.from_dict(
            {key: value for key, value in values.items() if key not in ("model_type", "text_config")}
        )
    return AutoConfig.for_model(**values)


@contextmanager
def resolved_tower_path(
    config: PreTrainedConfig,
    info: CheckpointInfo,
    base_info: CheckpointInfo | None,
    *,
    stored: bool,
    names: Collection[str] = (),
    hub: HubOptions = DEFAULT_HUB,
) -> Iterator[None]:
    """Within the block, let `config` name its vision tower by an absolute path.

    The config of an adapter is a copy of its base's, so a relative folder that it names may be the base's. `stored` says
    whether the tower's weights are among the checkpoint's, and `names` are those of the checkpoint's tensors: LLaVA-NeXT
    stores SigLIP towers without parts that it does not use.
    """
    name, unfrozen = config.mm_vision_tower, getattr(config, "unfreeze_mm_vision_tower", None)
    place = config.name_or_path
    if name == OWN_FOLDER:
        config.name_or_path = str(info.config_folder)
    if name != OWN_FOLDER:
        beside = next(
            (folder for folder in folders_of(info, base_info) if (folder / name / "config.json").is_file()), info.folder
        )
        config.mm_vision_tower = resolve_vision_tower(name, checkpoint_folder=beside, hub=hub)
    config.unfreeze_mm_vision_tower = stored
    layers = {int(match[1]) for name in names if (match := TOWER_LAYER.search(name))}
    if layers:
        config.stored_tower = {"layers": len(layers), "head": any(TOWER_HEAD in name for name in names)}
    try:
        yield
    finally:
        if layers:
            del config.stored_tower
        config.mm_vision_tower, config.name_or_path = name, place
        config.unfreeze_mm_vision_tower = unfrozen
        if unfrozen is None:
            del config.unfreeze_mm_vision_tower


def restore_config(built: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Give the config of a built model, a copy made within `resolved_tower_path`, the names that its file has."""
    built.name_or_path = config.name_or_path
    for key in ("mm_vision_tower", "unfreeze_mm_vision_tower", "stored_tower"):
        if hasattr(config, key):
            setattr(built, key, getattr(config, key))
        elif hasattr(built, key):
            delattr(built, key)
