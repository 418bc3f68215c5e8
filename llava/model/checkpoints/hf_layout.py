"""Translate the layout of transformers' own LLaVA classes to the original one.

In: the config.json and tensor names of a folder that one of the classes in `HF_MODELS` saved, in any version. Out: the same
config with `mm_*` keys, and published tensor names.
Nothing here needs torch; what a folder holds is decided in inspect.py.

The layouts differ in more than names: transformers writes grid pinpoints as (height, width), keeps the tower's config and
weights in the checkpoint, and has `<image>` as a token of the vocabulary with an unused embedding row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.images.image_processor import read_processor_config
from llava.images.layout import ANYRES_MAX, read_pinpoints
from llava.model.config import OWN_FOLDER, described_by

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"


@dataclass(frozen=True)
class HFModel:
    """One of transformers' LLaVA classes: its name, and what its config means where keys are left out."""

    name: str  # of the classes: LlavaNext for LlavaNextConfig and LlavaNextForConditionalGeneration
    tower: str = CLIP
    select: str = "default"  # vision_feature_select_strategy
    has_tiles: bool = True
    takes_videos: bool = False
    reduces_features: bool = False  # of many tiles, by interpolation
    projector: str = "mlp2x_gelu"
    layer_key: str = "vision_feature_layer"

    @property
    def architecture(self) -> str:
        return f"{self.name}ForConditionalGeneration"

    @property
    def processor(self) -> str:
        return f"{self.name.removeprefix('Vip')}Processor"


NORM_PROJECTOR = "norm_mlp2x_gelu"

# By model_type.
HF_MODELS = {
    "llava": HFModel("Llava", has_tiles=False),
    "llava_next": HFModel("LlavaNext"),
    "llava_next_video": HFModel("LlavaNextVideo", takes_videos=True),
    "llava_onevision": HFModel("LlavaOnevision", tower=SIGLIP, select="full", takes_videos=True, reduces_features=True),
    "vipllava": HFModel("VipLlava", has_tiles=False, projector=NORM_PROJECTOR, layer_key="vision_feature_layers"),
}
ARCHITECTURES = tuple(model.architecture for model in HF_MODELS.values())

# First match wins. Three generations of names: 4.3x-4.4x and what version 5 writes (`language_model.model.…`), the names
# in memory since 4.5x (`model.language_model.…`), each with or without the tower's `vision_model.` level.
NAME_RULES = (
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "model.vision_tower.vision_tower.vision_model."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.linear_1\."), "model.mm_projector.0."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.linear_2\."), "model.mm_projector.2."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.projector_layernorm\."), "model.mm_projector.norm."),
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
    CLIP: {"default": "patch", "full": "cls_patch"},
    SIGLIP: {"full": "patch"},
}
LAYER_NORM_EPS = 1e-5  # of ViP-LLaVA's projector


def is_transformers_layout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this layout; the model type `llava` alone means either layout."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in HF_MODELS:
        return False
    architectures = config.get("architectures")
    is_named = isinstance(architectures, list) and any(name in ARCHITECTURES for name in architectures)
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
    model = HF_MODELS[config["model_type"]]
    config = {key: value for key, value in config.items() if value is not None}
    vision = config.get("vision_config")
    tower_type = vision.get("model_type", model.tower) if isinstance(vision, Mapping) else model.tower
    features = SELECT_FEATURES.get(tower_type, {}) if isinstance(tower_type, str) else {}
    # Tiles are joined by rows, where a class feature has no place.
    strategies = tuple(name for name, feature in features.items() if feature == "patch" or not model.has_tiles)
    # ViP-LLaVA's class has no such key, and always drops the first feature.
    select = model.select if model.name == "VipLlava" else config.get("vision_feature_select_strategy", model.select)
    for name, value, known in (
        ("a vision tower of type", tower_type, tuple(SELECT_FEATURES)),
        ("vision_feature_select_strategy", select, strategies),
        ("projector_hidden_act", config.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("multimodal_projector_bias", config.get("multimodal_projector_bias", True), (True,)),
        ("projector_layernorm_eps", config.get("projector_layernorm_eps", LAYER_NORM_EPS), (LAYER_NORM_EPS,)),
        ("spatial_pool_mode", config.get("spatial_pool_mode", "average"), ("average", "max")),
    ):
        if value not in known:
            return f"{name} {value!r}; known: {', '.join(map(str, known))}"
    aspect_ratio = config.get("vision_aspect_ratio", "anyres_max_9")
    if model.reduces_features and ANYRES_MAX.fullmatch(str(aspect_ratio)) is None:
        return f"vision_aspect_ratio {aspect_ratio!r}; known: anyres_max_<N>"
    return None


def original_keys(config: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """The keys of the original layout for a complete config in this one, which is not checked."""
    model = HF_MODELS[config["model_type"]]
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    layers = config.get("vision_feature_layers") or config["vision_feature_layer"]  # ViP-LLaVA's word before 5.2x
    num_layers = 1 if isinstance(layers, int) else len(layers)
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
        "mm_hidden_size": vision["hidden_size"] * num_layers,
        "mm_projector_type": model.projector,
        "mm_vision_select_layer": layers if isinstance(layers, int) else list(layers),
        "mm_vision_select_feature": select_features.get(str(config.get("vision_feature_select_strategy")), "patch"),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,  # the tower's weights are in the checkpoint
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    }
    if model.has_tiles:
        values |= {
            "image_aspect_ratio": config.get("vision_aspect_ratio", "anyres"),
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": _swapped(config["image_grid_pinpoints"]),
        }
        if model.takes_videos:
            values |= _video_keys(config)
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


def _video_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """How frames are reduced: OneVision's class has no keys for it, LLaVA-NeXT-Video's reduces before the projector."""
    if config["model_type"] == "llava_onevision":
        return {"mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": 2, "mm_newline_position": "one_token"}
    return {
        "mm_spatial_pool_mode": config["spatial_pool_mode"],
        "mm_spatial_pool_stride": config["spatial_pool_stride"],
        "mm_spatial_pool_before_projector": True,
        "mm_newline_position": "no_token",
    }


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
    import transformers

    config_class = getattr(transformers, f"{HF_MODELS[config['model_type']].name}Config")
    given = {key: value for key, value in config.items() if value is not None}
    full: dict[str, Any] = config_class.from_dict(given).to_dict()
    return full
