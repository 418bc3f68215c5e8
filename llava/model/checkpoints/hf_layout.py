"""Translate the layout of transformers' own LLaVA classes to the original one.

In: the config.json and tensor names of a folder that `LlavaForConditionalGeneration` or
`LlavaNextForConditionalGeneration` saved, in any version. Out: the same config with `mm_*` keys, and published tensor names.
Nothing here needs torch; what a folder holds is decided in inspect.py.

The layouts differ in more than names: transformers writes grid pinpoints as (height, width), keeps the tower's config and
weights in the checkpoint, and has `<image>` as a token of the vocabulary with an unused embedding row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.images.image_processor import read_processor_config
from llava.images.layout import read_pinpoints
from llava.model.config import OWN_FOLDER, described_by

MODEL_TYPES = ("llava", "llava_next")
CLASSES = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")

# First match wins. Three generations of names: 4.3x-4.4x and what version 5 writes (`language_model.model.…`), the names
# in memory since 4.5x (`model.language_model.…`), each with or without the tower's `vision_model.` level.
NAME_RULES = (
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "model.vision_tower.vision_tower.vision_model."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.linear_1\."), "model.mm_projector.0."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.linear_2\."), "model.mm_projector.2."),
    (re.compile(r"^(?:model\.)?image_newline$"), "model.image_newline"),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\."), ""),
)

# A tower's tensors in the original layout, and the level of their names that not every version of transformers writes.
PUBLISHED_TOWER = "model.vision_tower.vision_tower."
VISION_MODEL_LEVEL = re.compile(r"(^vision_tower\.|\.vision_tower\.vision_tower\.)vision_model\.")

# Keys that this layout does not have and our conversion writes to its config; other readers ignore them.
OWN_KEYS = ("conv_mode", "tokenizer_model_max_length")

# "full" keeps all features; "default" drops the first one, which only CLIP has beside the patches'.
SELECT_FEATURES = {
    "clip_vision_model": {"default": "patch", "full": "cls_patch"},
    "siglip_vision_model": {"full": "patch"},
}
DEFAULT_TOWER = "clip_vision_model"


def is_transformers_layout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this layout; the model type `llava` alone means either layout."""
    if config.get("model_type") not in MODEL_TYPES:
        return False
    architectures = config.get("architectures")
    is_named = isinstance(architectures, list) and any(name in CLASSES for name in architectures)
    return is_named or any(isinstance(config.get(part), Mapping) for part in ("text_config", "vision_config"))


def published_name(name: str) -> str:
    """The name of a tensor in published checkpoints in the original layout; such a name is returned as it is."""
    if name.startswith(PUBLISHED_TOWER):
        return name
    for pattern, replacement in NAME_RULES:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


def comparable_name(name: str) -> str:
    """The name without the tower's `vision_model.` level, which not every version of transformers writes."""
    return VISION_MODEL_LEVEL.sub(r"\1", name)


def translate_config(config: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """Translate a config to the original layout, with the keys of the text part at the top level.

    The vision part stays under `vision_config`, and the tower's name `.` says that it is in the checkpoint's own folder.
    The image processor in `folder` decides whether images are padded to squares.

    A config with an `unknown_feature` is none of these, and is refused before (foreign.py).
    """
    with described_by(folder / "config.json"):
        full = _with_defaults(config)
    return original_keys({**config, **full}, folder=folder)


def unknown_feature(config: Mapping[str, Any]) -> str | None:
    """Name the first setting of a config with which the original layout has no words for the model; None without one."""
    vision = config.get("vision_config")
    tower_type = vision.get("model_type", DEFAULT_TOWER) if isinstance(vision, Mapping) else DEFAULT_TOWER
    features = SELECT_FEATURES.get(tower_type) if isinstance(tower_type, str) else None
    for name, value, known in (
        ("a vision tower of type", tower_type, tuple(SELECT_FEATURES)),
        (
            "vision_feature_select_strategy",
            config.get("vision_feature_select_strategy", "default"),
            tuple(features or ()),
        ),
        ("projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("multimodal_projector_bias", config.get("multimodal_projector_bias", True), (True,)),
    ):
        if value not in known:
            return f"{name} {value!r}; known: {', '.join(map(str, known))}"
    return None


def original_keys(config: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """The keys of the original layout for a complete config in this one, which is not checked."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    select_features = SELECT_FEATURES.get(vision["model_type"], {})
    values = {
        key: value
        for key, value in text.items()
        if key not in ("_name_or_path", "architectures", "transformers_version")
    }
    values |= {
        "model_type": f"llava_{text['model_type']}",
        "mm_vision_tower": OWN_FOLDER,
        "vision_config": vision,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config["vision_feature_layer"],
        "mm_vision_select_feature": select_features.get(config["vision_feature_select_strategy"], "patch"),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,  # the tower's weights are in the checkpoint
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    }
    if config["model_type"] == "llava_next":
        values |= {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": _swapped(config["image_grid_pinpoints"]),
        }
    else:
        mode = "pad" if pads_images(folder) else "square"
        values |= {"image_aspect_ratio": mode, "mm_patch_merge_type": "flat"}
    for key in OWN_KEYS:
        if config.get(key) is not None:
            values[key] = config[key]
    if text.get("max_position_embeddings") and not config.get("tokenizer_model_max_length"):
        # This layout has no other key for the context length.
        values["max_sequence_length"] = text["max_position_embeddings"]
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    return values | ({"dtype": dtype} if dtype else {})


def _swapped(pinpoints: list[list[int]]) -> list[list[int]]:
    """Write pairs as (width, height), which this layout has as (height, width)."""
    pairs = read_pinpoints(pinpoints)
    return [list(reversed(pair)) for pair in pairs] if isinstance(pairs, tuple) else []


def pads_images(folder: Path) -> bool:
    """Whether the folder's image processor pads images."""
    processor = read_processor_config(folder) or {}
    return bool(processor.get("do_pad")) and "Llava" in str(processor.get("image_processor_type"))


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of transformers' config classes, which config files leave out."""
    from transformers import LlavaConfig, LlavaNextConfig

    classes = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
    return classes[config["model_type"]].from_dict(dict(config)).to_dict()
