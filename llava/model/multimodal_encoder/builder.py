"""Build the vision tower that a config names, and save what a checkpoint needs to find its tower again.

In: a config (or training arguments) that names a tower. Out: a tower module whose weights are loaded, expected from the
checkpoint, or loaded later. The type of tower is what its config declares, never how its path is spelled.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llava.errors import InputError
from llava.files import read_json
from llava.images.image_processor import check_side
from llava.images.layout import ImagePolicy, parse_pinpoints
from llava.model.checkpoints.hub import resolve_vision_tower
from llava.model.config import OWN_FOLDER, ImageSettings, LlavaSettings, check_tower_type
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, CLIPVisionTowerS2
from llava.model.multimodal_encoder.hidden_state_towers import (
    Aimv2VisionTower,
    ConvNextVisionTower,
    Dinov2VisionTower,
    Dinov2WithRegistersVisionTower,
    Dinov3VisionTower,
    MlcdVisionTower,
    Siglip2VisionTower,
)
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
from llava.model.protocols import VisionTower

# model_type in the tower's config.json -> (one scale, several scales)
TOWER_CLASSES: dict[str, tuple[type[CLIPVisionTower], type[CLIPVisionTower] | None]] = {
    "clip": (CLIPVisionTower, CLIPVisionTowerS2),
    "clip_vision_model": (CLIPVisionTower, CLIPVisionTowerS2),
    "siglip": (SigLipVisionTower, None),
    "siglip_vision_model": (SigLipVisionTower, None),
    "siglip2_vision_model": (Siglip2VisionTower, None),
    "dinov2": (Dinov2VisionTower, None),
    "dinov2_with_registers": (Dinov2WithRegistersVisionTower, None),
    "dinov3_vit": (Dinov3VisionTower, None),
    "aimv2_vision_model": (Aimv2VisionTower, None),
    "mlcd_vision_model": (MlcdVisionTower, None),
    "convnext": (ConvNextVisionTower, None),
}


def build_vision_tower(vision_tower_cfg: object, **kwargs: Any) -> CLIPVisionTower:
    """Build the tower that a model's config (`mm_vision_tower`) or training arguments (`vision_tower`) name.

    Options are those of the tower's class; `delay_load=True` leaves the weights to `load_model()`.
    """
    vision = LlavaSettings.from_hf(vision_tower_cfg).vision
    if vision.tower is None:
        raise InputError("the config names no vision tower (mm_vision_tower)")
    folder = _own_folder(vision_tower_cfg)
    described = None
    if vision.tower == OWN_FOLDER:
        described = getattr(vision_tower_cfg, "vision_config", None)
        if folder is None or described is None:
            raise InputError(
                f"mm_vision_tower is {OWN_FOLDER!r}, the checkpoint itself, but its config has no vision_config"
            )
    else:
        folder = Path(resolve_vision_tower(vision.tower, checkpoint_folder=folder))
    model_type = str((described or read_json(folder / "config.json")).get("model_type"))
    check_tower_type(model_type, vision.tower)
    one_scale, many_scales = TOWER_CLASSES[model_type]
    tower_class = many_scales if vision.s2_scales else one_scale
    if tower_class is None:
        raise InputError(f"s2 (several scales) is not known for a vision tower of type {model_type!r}, only for CLIP")
    return tower_class(str(folder), args=vision_tower_cfg, described=described, **kwargs)


def check_processor(tower: VisionTower) -> None:
    """Raise an `InputError` if a tower's image processor makes images of another size than the tower takes."""
    check_side(tower.image_processor, tower.tile_size, tower.vision_tower_name)


def policy_of(tower: VisionTower, image: ImageSettings) -> ImagePolicy:
    """How a model with this tower tiles images and merges their features; the tower's weights are not needed."""
    return ImagePolicy(
        mode=image.mode,
        tile_size=tower.tile_size,
        patch_size=tower.tile_size // tower.num_patches_per_side,
        pinpoints=parse_pinpoints(image.pinpoints, tower.tile_size),
        merge=image.merge,
        cls_token=tower.has_class_feature,
        max_tiles=image.max_tiles,
        pools=image.pools,
        keeps_overview=image.keeps_overview,
        crop_split=image.crop_split,
    )


def save_tower(tower: VisionTower, config: PreTrainedConfig, target: Path) -> None:
    """Write the files of the tower that a saved checkpoint's `mm_vision_tower` refers to within its folder.

    Nothing is written where the name finds the tower from anywhere: an absolute folder, one relative to the working
    directory, a hub repository. Of a tower whose weights are in the checkpoint, only the config files are written.
    """
    vision = LlavaSettings.from_hf(config).vision
    name, place = str(vision.tower), Path(tower.vision_tower_name)
    if name == OWN_FOLDER:
        tower.image_processor.save_pretrained(target)
    elif Path(name).is_absolute() or place == Path(name).absolute() or not place.match(name):
        return
    elif vision.in_checkpoint:
        tower.cfg_only.save_pretrained(target / name)  # of a part, too: loading sees which one is stored
        tower.image_processor.save_pretrained(target / name)
    elif place != (target / name).absolute():
        shutil.copytree(place, target / name, dirs_exist_ok=True)


def _own_folder(config: object) -> Path | None:
    """The checkpoint folder that a config was read from, against which a relative tower name is looked up first."""
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None
