"""Read the config.json of a LLaVA, in any published version, as one typed view.

In: a transformers config object (or the dictionary of a config.json). Out: `LlavaSettings`, frozen and validated, and the
language model's type. Only this module knows legacy key names and their defaults; other modules read
`settings.vision.select_layer`. The config classes are beside their models in language_model/; what a folder holds is
decided in checkpoints/inspect.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llava.errors import InputError
from llava.images.image_processor import TOWER_IMAGE_PROCESSORS
from llava.images.layout import (
    MERGES,
    CropSplit,
    ImageSize,
    Merge,
    Mode,
    TileRange,
    crop_split,
    image_mode,
    max_tiles_of,
    merge_type,
    read_pinpoints,
)
from llava.images.video_layout import VideoPolicy

SELECT_FEATURES = ("patch", "cls_patch")

# The model type of a LLaVA is that of its language model with this prefix: llama -> llava_llama.
PREFIX = "llava_"

# The name of a tower whose config (`vision_config`) and weights are the checkpoint's own.
OWN_FOLDER = "."

# Language models (by transformers' name) with LLaMA's structure: attention keeps packed samples apart when positions begin
# anew, and logits are the output layer's product with the last hidden states. Other language models take no packed rows,
# compute their own loss, and are read by no other program after a conversion.
PLAIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3")

# The keys of config files that this package itself reads, by the type of their values. A key that is null counts as absent.
KEYS_BY_TYPE: dict[str, tuple[type | tuple[type, ...], tuple[str, ...]]] = {
    "an integer": (int, (
        "mm_hidden_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
        "max_sequence_length", "tokenizer_model_max_length", "max_position_embeddings", "max_seq_len", "image_size",
        "patch_size", "pad_token_id", "bos_token_id", "image_crop_resolution", "image_split_resolution",
        "mm_spatial_pool_stride", "faster_token_stride",
    )),
    "a string": (str, (
        "mm_vision_tower", "mm_vision_select_feature", "mm_projector_type", "mm_resampler_type", "image_aspect_ratio",
        "mm_patch_merge_type", "tokenizer_padding_side", "conv_mode", "model_type", "dtype", "torch_dtype", "_name_or_path",
        "vision_feature_select_strategy", "mm_spatial_pool_mode", "mm_newline_position",
    )),
    "true or false": (bool, (
        "unfreeze_mm_vision_tower", "s2", "mm_use_im_start_end", "mm_use_im_patch_token", "add_faster_video",
        "mm_spatial_pool_before_projector", "add_time_instruction",
    )),
    "an object": (Mapping, ("text_config", "vision_config", "quantization_config", "rope_parameters", "rope_scaling")),
    "an integer or a list of integers": ((int, list), ("eos_token_id", "mm_vision_select_layer", "vision_feature_layer",
        "vision_feature_layers",
    )),
    "a list": (list, ("architectures",)),
    "a list of integers or a string": ((str, list, tuple), ("s2_scales",)),
}  # fmt: skip
TYPES_BY_KEY = {key: (words, kind) for words, (kind, keys) in KEYS_BY_TYPE.items() for key in keys}

# A config that has one of these is of a model that was trained with videos, or to be asked about them.
VIDEO_KEYS = ("mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_newline_position", "mm_resampler_type")

MAX_REASON = 300  # characters of a library's error in a sentence; some list all model types

# The largest value of sizes in config files, above that of any model: memory and time are taken by them.
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers"), 1000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_heads", "n_head"), 2**12),
    **dict.fromkeys(("image_size", "patch_size"), 2**14),
    **dict.fromkeys(("hidden_size", "mm_hidden_size", "d_model", "n_embd", "intermediate_size", "head_dim"), 2**20),
    **dict.fromkeys(("vocab_size", "max_sequence_length", "max_position_embeddings", "max_seq_len"), 2**24),
}
# Keys by which transformers picks an implementation, which may be code of the hub. The machine and the user pick it here.
IMPLEMENTATIONS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "kernel_config",
)  # fmt: skip

# Values of mm_resampler_type with which features reach the projector as they are: the first names the reduction of videos'
# frames, which mm_spatial_pool_mode says too; the second leaves features out in training only.
RESAMPLERS_WITHOUT_EFFECT = ("spatial_pool", "masked_drop")

# Multimodal settings that answers do not depend on.
NOT_FOR_ANSWERS = (
    "mm_projector_lr", "mm_vision_tower_lr", "mm_tunable_parts", "mm_vision_tower_pretrained", "mm_spatial_pool_out_channels",
    "mm_resampler_location",
)  # fmt: skip

# The types of vision towers that are read, as their own config.json says, and those that other layouts and programs know too.
TOWER_TYPES = tuple(TOWER_IMAGE_PROCESSORS)
SHARED_TOWER_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")

# Parameters of the inner model that are learned features: the end of a row, image or video, and that of a frame.
LEARNED_ENDS = ("image_newline", "faster_token")

# Published model types that do not follow the prefix rule.
MODEL_TYPE_ALIASES = {"llava_qwen": "qwen2", "llava_qwen_moe": "qwen2_moe", "llava_qwenmoe": "qwen2_moe"}

# Published classes of the type `llava`, whose name says which language model is inside.
ORIGINAL_CLASS = re.compile(r"Llava(\w+)ForCausalLM")


@dataclass(frozen=True)
class VisionSettings:
    """Which vision tower a model has, and which of its hidden states are used."""

    tower: str | None
    select_layer: int | tuple[int, ...] = -2  # several: their features are concatenated, in this order
    select_feature: str = "patch"
    hidden_size: int | None = None
    in_checkpoint: bool = (
        False  # the tower's weights are in the checkpoint, and replace those of the tower's own folder
    )
    s2_scales: tuple[int, ...] = ()  # pixels per side of each scale, ascending; empty: one scale

    def __post_init__(self) -> None:
        if self.select_feature not in SELECT_FEATURES:
            raise InputError(
                f"unknown mm_vision_select_feature {self.select_feature!r}; known: {', '.join(SELECT_FEATURES)}"
            )
        if self.select_layer == ():
            raise InputError("mm_vision_select_layer is an empty list; it must name the hidden states that are used")
        if any(scale % self.s2_scales[0] for scale in self.s2_scales):
            raise InputError(f"s2_scales must be multiples of the smallest one, got {self.s2_scales}")


@dataclass(frozen=True)
class ProjectorSettings:
    """The layers between the tower's width and the language model's."""

    type: str = "linear"
    vision_dim: int | None = None
    text_dim: int | None = None


@dataclass(frozen=True)
class ImageSettings:
    """How an image is cut into tiles, and how the tiles' features are merged into one sequence."""

    mode: Mode = "square"
    merge: Merge = "flat"
    pinpoints: tuple[ImageSize, ...] | TileRange = ()
    max_tiles: int | None = None  # features are reduced to those of this many tiles
    pools: bool = False  # the largest of each four features is taken
    keeps_overview: bool = True
    crop_split: CropSplit | None = None

    @property
    def aspect_ratio(self) -> str:
        """`image_aspect_ratio` as config files spell it."""
        return self.mode if self.max_tiles is None else f"{self.mode}_max_{self.max_tiles}"

    @classmethod
    def of(
        cls,
        aspect_ratio: str | None,
        merge: str,
        pinpoints: object,
        crop: int | None = None,
        split: int | None = None,
    ) -> ImageSettings:
        """Read the settings as config files and flags spell them."""
        mode, joined = image_mode(aspect_ratio), merge_type(merge)
        return cls(
            mode=mode,
            merge=joined.merge,
            pinpoints=read_pinpoints(pinpoints, mode),  # type: ignore[arg-type]
            max_tiles=max_tiles_of(aspect_ratio),
            pools=joined.pools,
            keeps_overview=joined.keeps_overview,
            crop_split=crop_split(crop, split),
        )

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise InputError(f"unknown mm_patch_merge_type {self.merge!r}; known: {', '.join(MERGES)}")


@dataclass(frozen=True)
class TokenSettings:
    """Which image tokens are in the vocabulary; `<image>` itself never is."""

    use_im_start_end: bool = False
    use_im_patch: bool = False


@dataclass(frozen=True)
class LlavaSettings:
    """What a config says about the multimodal part of a model."""

    vision: VisionSettings
    projector: ProjectorSettings
    image: ImageSettings
    tokens: TokenSettings
    video: VideoPolicy = field(default_factory=VideoPolicy)
    takes_videos: bool = False  # whether it was trained with videos, as far as its config tells
    tells_times: bool = False  # whether its prompts said when the frames are
    max_length: int | None = None  # tokens, image features included; None: the language model's own limit
    padding_side: str = "right"

    @classmethod
    def from_hf(cls, config: object) -> LlavaSettings:
        """Read the settings from an object whose attributes are config keys, of any published version and possibly absent."""

        def read(key: str, default: Any = None) -> Any:
            value = getattr(config, key, None)
            check_type(key, value)
            return default if value is None else value

        resampler = read("mm_resampler_type")
        if resampler not in (None, *RESAMPLERS_WITHOUT_EFFECT):
            raise InputError(
                f"mm_resampler_type is {resampler!r}; models with a resampler between tower and projector are not supported, "
                "use the code that they were trained with"
            )

        layer = read("mm_vision_select_layer", -2)
        return cls(
            vision=VisionSettings(
                tower=read("mm_vision_tower", read("vision_tower")),
                select_layer=tuple(layer) if isinstance(layer, (list, tuple)) else layer,
                select_feature=read("mm_vision_select_feature", "patch"),
                hidden_size=read("mm_hidden_size"),
                in_checkpoint=bool(read("unfreeze_mm_vision_tower", False)),
                s2_scales=_scales(read("s2_scales", "336,672,1008")) if read("s2", False) else (),
            ),
            projector=ProjectorSettings(
                type=read("mm_projector_type", "linear"),
                vision_dim=read("mm_hidden_size"),
                text_dim=read("hidden_size"),
            ),
            image=ImageSettings.of(
                read("image_aspect_ratio"),
                read("mm_patch_merge_type", "flat"),
                read("image_grid_pinpoints", []),
                read("image_crop_resolution"),
                read("image_split_resolution"),
            ),
            video=VideoPolicy(
                pool=read("mm_spatial_pool_mode", "bilinear"),
                # OneVision's configs have null here, and its videos were reduced by 2.
                stride=read("mm_spatial_pool_stride", 2),
                newline=read("mm_newline_position", "one_token"),
                slow_every=read("faster_token_stride", 10) if read("add_faster_video", False) else None,
                before_projector=bool(read("mm_spatial_pool_before_projector", False)),
            ),
            takes_videos=any(read(key) is not None for key in VIDEO_KEYS)
            or str(read("image_aspect_ratio")).startswith("anyres_max"),
            tells_times=bool(read("add_time_instruction", False)),
            tokens=TokenSettings(
                use_im_start_end=bool(read("mm_use_im_start_end", False)),
                # The key is younger than the token: configs without it come from models that have the token.
                use_im_patch=bool(read("mm_use_im_patch_token", True)),
            ),
            max_length=read("tokenizer_model_max_length"),
            padding_side=read("tokenizer_padding_side", "right"),
        )


def unused_settings(values: Mapping[str, object]) -> list[str]:
    """The multimodal settings of a config.json, in the original layout, that nothing here reads or knows to be for training.

    A key that is null, false, zero or empty counts as absent.
    """
    known = (*TYPES_BY_KEY, *NOT_FOR_ANSWERS)
    return [key for key, value in values.items() if key.startswith("mm_") and value and key not in known]


def check_types(values: Mapping[str, object], source: object) -> None:
    """Check the types of a config file's values that this package reads, those of its parts too.

    Args:
        values: The file's content.
        source: The file, for the error.

    Raises:
        InputError: A value has another type.
    """
    for key, value in values.items():
        check_type(key, value, source)
        check_size(key, value, source)
        if key == "mm_projector_type" and isinstance(value, str):
            check_projector_type(value)
        if key in IMPLEMENTATIONS and "/" in str(value):
            raise InputError(
                f"{source} has {key} {value!r}, which is code of the hub; no code that a checkpoint names is loaded, so remove "
                "the key"
            )
    for part in ("text_config", "vision_config"):
        inner = values.get(part)
        if isinstance(inner, Mapping):
            check_types(inner, f"{part} of {source}")


def check_type(key: str, value: object, source: object = "the config") -> None:
    """Raise an `InputError` if a key's value has another type than this package reads."""
    if value is None or key not in TYPES_BY_KEY:
        return
    words, kind = TYPES_BY_KEY[key]
    if not _has_type(value, kind):
        raise InputError(f"{source} has {key} {value!r}; it must be {words}")


def _has_type(value: object, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind == (int, list) and isinstance(value, (list, tuple)):
        return all(type(item) is int for item in value)
    return isinstance(value, kind)


def check_size(key: str, value: object, source: object = "the config") -> None:
    """Raise an `InputError` if a size is negative, or larger than that of any model."""
    if key in LARGEST and isinstance(value, int) and not 0 <= value <= LARGEST[key]:
        raise InputError(f"{source} has {key} {value}; it must be between 0 and {LARGEST[key]}")


def check_tower_type(model_type: object, name: object) -> None:
    """Raise an `InputError` if vision towers of a type are not read; `name` is the tower's."""
    if model_type not in TOWER_TYPES:
        raise InputError(f"the vision tower {name!r} is of type {model_type!r}; known: {', '.join(TOWER_TYPES)}")


def check_projector_type(name: str) -> None:
    """Raise an `InputError` if there is no projector of a name; the table, which needs torch, is asked for unusual ones."""
    if re.fullmatch(r"linear|(norm_)?mlp[1-3]x_gelu", name):
        return
    from llava.model.multimodal_projector.builder import check_projector_name

    check_projector_name(name)


@contextmanager
def described_by(file: object, what: str = "a model") -> Iterator[None]:
    """Within the block, turn what transformers raises for a config file's values into an `InputError` that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        expected = (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
            AssertionError,
            StrictDataclassError,
        )
        if not isinstance(error, expected):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        short = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
        raise InputError(f"{file} does not describe {what}: {short}") from error


def is_multimodal(values: Mapping[str, object]) -> bool:
    """Whether a config.json declares a vision tower in the original layout, whatever its model_type says."""
    return any(values.get(key) is not None for key in ("mm_vision_tower", "mm_hidden_size", "mm_projector_type"))


def language_model_type(values: Mapping[str, object]) -> str:
    """The transformers model type of the language model: `llama` for `llava_llama`, for v0's `llama`, and for `llava`.

    The type `llava` was published for checkpoints over LLaMA, and later by the class's name over others, before transformers
    used it for its own layout, which has a `text_config`.
    """
    text_config = values.get("text_config")
    if isinstance(text_config, Mapping):
        return str(text_config.get("model_type", "llama"))
    model_type = str(values.get("model_type", ""))
    if model_type == "llava":
        architectures = values.get("architectures")
        named = (
            ORIGINAL_CLASS.fullmatch(str(architectures[0]))
            if isinstance(architectures, list) and architectures
            else None
        )
        model_type = PREFIX + (named[1].lower() if named else "llama")
    if model_type in MODEL_TYPE_ALIASES:
        return MODEL_TYPE_ALIASES[model_type]
    return model_type.removeprefix(PREFIX)


def is_causal_language_model(model_type: str) -> bool:
    """Whether transformers has a causal language model of a type; it is imported only for types with no class here."""
    if model_type in (*PLAIN_DECODERS, "mpt"):
        return True
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # The mapping loads its entries when they are indexed; its `get` finds only loaded ones.
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def _scales(value: str | list[int]) -> tuple[int, ...]:
    numbers = re.findall(r"\d+", value) if isinstance(value, str) else value
    if not numbers or not all(str(number).isdecimal() and int(number) > 0 for number in numbers):
        raise InputError(f"s2_scales is {value!r}; it must list pixels per side, such as '336,672,1008'")
    return tuple(sorted(int(number) for number in numbers))
