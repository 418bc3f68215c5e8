"""Which programs read a checkpoint as it is, and which conversion the others need. torch is not needed.

In: what model/checkpoints/inspect.py found in a folder, its settings, the type of its vision tower. Out: a word for each
program, which `llava info` prints. What a conversion refuses is decided in layouts/hf.py and gguf/pair.py.
"""

from __future__ import annotations

from pathlib import Path

from llava.images.video_layout import VideoPolicy
from llava.model.checkpoints.gguf.config import PROJECTORS
from llava.model.checkpoints.gguf.names import ARCHITECTURE_OF
from llava.model.checkpoints.hf_layout import NORM_PROJECTOR
from llava.model.checkpoints.inspect import CheckpointInfo
from llava.model.config import PLAIN_DECODERS, SHARED_TOWER_TYPES, LlavaSettings

OTHERS = ("original LLaVA code", "transformers", "vLLM", "SGLang", "llama.cpp")
VLLM_TILES = 9  # to whose features vLLM reduces those of OneVision's images, whatever the config says


def readers_of(
    info: CheckpointInfo, settings: LlavaSettings | None, *, tower_type: str | None, tower_folder: Path | None
) -> dict[str, str]:
    """Name the programs that read a folder as it is, and the conversion that others need.

    Args:
        settings: None for a language model without a vision tower.
        tower_type: The `model_type` of the tower in `tower_folder`; None where it is not on this disk.
    """
    if info.kind == "lora" and not info.is_adapter_of_llava:
        return {"llava": "yes, with its base model", "PEFT": "yes, over the base in the layout that it was trained in"}
    if settings is None:
        return {"llava": "text only"}
    own = "yes" if not info.needs_base else "yes, with its base model"
    if tower_type is not None and tower_type not in SHARED_TOWER_TYPES:
        return {"llava": own, **dict.fromkeys(OTHERS, f"no, since its vision tower is of type {tower_type}")}
    in_gguf = info.language_model in ARCHITECTURE_OF and _is_in_gguf(settings)
    is_plain = info.language_model in PLAIN_DECODERS and _is_in_transformers(settings)
    return {
        "llava": own,
        "original LLaVA code": _original(info, settings),
        "transformers": "yes"
        if info.kind == "transformers"
        else "after llava convert --to transformers"
        if is_plain
        else "no",
        "vLLM": _vllm(info, settings, is_plain=is_plain),
        "SGLang": _sglang(info, settings, tower_folder, is_plain=is_plain and not info.needs_base),
        "llama.cpp": "after llava convert --to gguf" if in_gguf else "no",
    }


def _is_in_gguf(settings: LlavaSettings) -> bool:
    """Whether a pair of GGUF files holds what a model with these settings computes."""
    image, vision = settings.image, settings.vision
    return (
        settings.projector.type in PROJECTORS
        and isinstance(vision.select_layer, int)
        and vision.select_feature == "patch"
        and not vision.s2_scales
        and image.mode in ("square", "pad", "anyres")
        and image.keeps_overview
        and not image.pools
        and settings.video.slow_every is None
    )


def _is_in_transformers(settings: LlavaSettings) -> bool:
    """Whether one of transformers' classes computes what a model with these settings does."""
    image = settings.image
    joins_as_theirs = (image.mode == "anyres") == (image.merge == "spatial_unpad")
    if settings.vision.s2_scales or not joins_as_theirs or image.pools or not image.keeps_overview:
        return False
    if settings.projector.type == NORM_PROJECTOR:
        return image.mode in ("square", "pad")
    if settings.projector.type != "mlp2x_gelu" or image.mode not in ("square", "pad", "anyres"):
        return False
    return settings.video.slow_every is None and (image.max_tiles is None or settings.video == VideoPolicy())


def _original(info: CheckpointInfo, settings: LlavaSettings) -> str:
    image = settings.image
    has_layers = not isinstance(settings.vision.select_layer, int)
    if settings.projector.type == NORM_PROJECTOR or has_layers or settings.video.before_projector:
        return "no"
    if image.max_tiles is not None or image.mode in ("highres", "crop_split"):
        return "no, LLaVA-NeXT's code does"
    return "yes" if info.kind != "transformers" else "after llava convert --to original"


def _vllm(info: CheckpointInfo, settings: LlavaSettings, *, is_plain: bool) -> str:
    is_theirs = info.kind == "transformers"
    is_video = settings.video.before_projector or info.config.get("mm_resampler_type") == "spatial_pool"
    if settings.projector.type == NORM_PROJECTOR or settings.image.max_tiles not in (None, VLLM_TILES):
        return "no"
    if is_video:
        return "yes, for videos alone" if is_theirs else "for videos alone, after llava convert --to transformers"
    if is_theirs:
        return "yes"
    if is_plain and not info.needs_base and info.language_model != "qwen3":
        return "yes, with this package installed beside it"
    return "after llava convert --to transformers" if is_plain else "no"


def _sglang(info: CheckpointInfo, settings: LlavaSettings, tower_folder: Path | None, *, is_plain: bool) -> str:
    """SGLang reads the original layout with a tower that its own loader finds by name."""
    if not is_plain or settings.projector.type == NORM_PROJECTOR or settings.video.before_projector:
        return "no"
    if info.kind == "transformers":
        return "after llava convert --to original --tower out"
    tower = str(settings.vision.tower)
    outside = not info.tower_in_checkpoint and (Path(tower).is_absolute() or tower_folder is None)
    return "yes" if outside else "with mm_vision_tower set to a hub repository or an absolute folder"
