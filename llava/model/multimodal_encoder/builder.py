"""Which vision tower a config means.

In: a config (or training arguments) that names a tower. Out: a tower module, its weights read, promised by the checkpoint,
or still to be loaded. The kind of tower is what the named folder's config.json declares, never how its path is spelled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.model.checkpoint import resolve_vision_tower
from llava.model.config import LlavaSettings
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, CLIPVisionTowerS2
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower

# model_type in the tower's config.json -> (one scale, several scales)
TOWERS: dict[str, tuple[type[CLIPVisionTower], type[CLIPVisionTower] | None]] = {
    "clip": (CLIPVisionTower, CLIPVisionTowerS2),
    "clip_vision_model": (CLIPVisionTower, CLIPVisionTowerS2),
    "siglip": (SigLipVisionTower, None),
    "siglip_vision_model": (SigLipVisionTower, None),
}


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> CLIPVisionTower:
    """Build the tower named by `mm_vision_tower` (a config) or `vision_tower` (training arguments).

    `delay_load=True` leaves its weights for `load_model()`.
    """
    vision = LlavaSettings.from_hf(vision_tower_cfg).vision
    if vision.tower is None:
        raise InputError("the config names no vision tower (mm_vision_tower)")
    folder = resolve_vision_tower(vision.tower, checkpoint_folder=_own_folder(vision_tower_cfg))
    model_type = _model_type(Path(folder))
    if model_type not in TOWERS:
        raise InputError(f"the vision tower {vision.tower!r} is of type {model_type!r}; known: {', '.join(TOWERS)}")
    one_scale, many_scales = TOWERS[model_type]
    tower_class = many_scales if vision.s2_scales else one_scale
    if tower_class is None:
        raise InputError(f"s2 (several scales) is not known for a vision tower of type {model_type!r}, only for CLIP")
    return tower_class(folder, args=vision_tower_cfg, **kwargs)


def _own_folder(config: Any) -> Path | None:
    """The checkpoint folder that a config was read from, against which a relative tower name is looked up first."""
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"the vision tower's {str(path)!r} cannot be read as a config: {error}") from None
