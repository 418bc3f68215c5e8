"""Recognise models that look like a LLaVA and that this package does not read, and say what reads them. torch is not needed.

In: the content of a config.json, which may be anybody's. Out: a `ForeignModel`, or None where nothing speaks against
reading the folder. inspect.py asks here once for every folder, so that all commands give the same sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava.errors import InputError
from llava.images.image_processor import TOWER_IMAGE_PROCESSORS
from llava.model.checkpoints.hf_layout import is_transformers_layout, unknown_feature
from llava.model.config import (
    RESAMPLERS_WITHOUT_EFFECT,
    TYPES_BY_KEY,
    is_causal_language_model,
    is_multimodal,
    language_model_type,
)

TRANSFORMERS = "transformers"
ITS_OWN_CODE = "the code that it was published with"


@dataclass(frozen=True)
class ForeignModel:
    """A kind of model that is not read: `name` completes "holds …", `reason` "is not read: …", `readers` "use …"."""

    name: str
    reason: str
    readers: tuple[str, ...] = (ITS_OWN_CODE,)
    # How it is recognised, by any of these: its model_type or architecture, keys that only it has, or a look at the config.
    declared: str = ""  # a regular expression for the whole type, in lower case without separators
    keys: tuple[str, ...] = ()
    matches: Callable[[Mapping[str, object]], bool] | None = None

    def is_declared_by(self, config: Mapping[str, object]) -> bool:
        return (
            any(re.fullmatch(self.declared, name) for name in _declared_types(config))
            or any(config.get(key) for key in self.keys)
            or (self.matches is not None and self.matches(config))
        )

    def sentence(self, folder: Path) -> str:
        return f"{folder} holds {self.name}, which llava does not read: {self.reason}; use {' or '.join(self.readers)}"


class ForeignModelError(InputError):
    """A folder holds a model that this package does not read; `model` says which."""

    def __init__(self, model: ForeignModel, folder: Path) -> None:
        super().__init__(model.sentence(folder))
        self.model = model


def foreign_model(config: Mapping[str, object], tensor_names: Iterable[str] = ()) -> ForeignModel | None:
    """Recognise a model that is not read by its config and, where that shows no images, the names of its tensors.

    A `model_type` of another type is the fault of a value, which `check_types` names.
    """
    if not isinstance(config.get("model_type", ""), (str, type(None))):
        return None
    known = next((model for model in FOREIGN_MODELS if model.is_declared_by(config)), None)
    if known is not None:
        return known
    if is_transformers_layout(config):
        return _foreign_in_transformers_layout(config)
    if is_multimodal(config):
        return _foreign_original(config)
    return _foreign_language_model(config, tensor_names)


def quantized_model(method: str, reason: str) -> ForeignModel:
    """A LLaVA whose weights are stored in a form that nothing here reads."""
    return ForeignModel(
        f"a model whose weights are stored quantized by {method}",
        reason,
        ("the checkpoint that they were quantized from",),
    )


def _declared_types(config: Mapping[str, object]) -> list[str]:
    architectures = config.get("architectures")
    names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [])]
    return [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names if isinstance(name, str)]


def _vision_type(config: Mapping[str, object]) -> object:
    part = config.get("vision_config")
    return part.get("model_type") if isinstance(part, Mapping) else None


def _text(config: Mapping[str, object], key: str) -> str:
    value = config.get(key)
    return value if isinstance(value, str) else ""


# --- published families -----------------------------------------------------------------------------------------------

_CLASS = "(forconditionalgeneration)?"
_BOTH = (TRANSFORMERS, "vLLM")

# The first match holds.
FOREIGN_MODELS = (
    # transformers' own classes beside those of LLaVA-1.5 and 1.6
    ForeignModel(
        "Video-LLaVA in transformers' layout (video_llava)",
        "it has one tower for images and another one for videos",
        (TRANSFORMERS,),
        declared="videollava" + _CLASS,
    ),
    ForeignModel(
        "Pixtral (a vision tower of type pixtral)",
        "its tower takes images of any size, not tiles",
        _BOTH,
        matches=lambda config: _vision_type(config) == "pixtral",
    ),
    ForeignModel(
        "LLaVA-OneVision-1.5",
        "its vision tower takes images of any size, not tiles",
        declared="llavaonevision15.*",
    ),
    # Research code that grew out of the original
    ForeignModel(
        "ShareGPT4V", "its classes and the tower that it trained are its own", ("the code of ShareGPT4V",), "share4v.*"
    ),
    ForeignModel(
        "Bunny", "its language models and projectors are built by its own classes", ("the code of Bunny",), "bunny.*"
    ),
    ForeignModel(
        "TinyLLaVA", "its parts are built and named by its own classes", ("the code of TinyLLaVA",), "tinyllava.*"
    ),
    ForeignModel("MoE-LLaVA", "its layers are mixtures of experts", ("the code of MoE-LLaVA",), "(eval)?moellava.*"),
    ForeignModel(
        "VILA or NVILA",
        "its parts are in folders of their own, and its projector reduces features",
        ("the code of VILA",),
        "n?vila.*|llavallamamodel",
        keys=("llm_cfg", "mm_projector_cfg", "vision_tower_cfg"),
    ),
    ForeignModel(
        "LLaVA-HR",
        "it has a second vision tower for images of high resolution",
        ("the code of LLaVA-HR",),
        keys=("vision_tower_slow", "mm_vision_tower_slow", "is_multipath_encoder"),
    ),
    ForeignModel(
        "Mini-Gemini",
        "it has a second vision tower",
        ("the code of Mini-Gemini",),
        "(minigemini|mgm).*",
        keys=("mm_vision_tower_aux",),
    ),
    ForeignModel(
        "Cambrian",
        "it joins several vision towers",
        ("the code of Cambrian",),
        "cambrian.*",
        keys=("mm_vision_tower_aux_list",),
    ),
    ForeignModel(
        "Video-LLaVA in the original layout",
        "it has one tower for images and another one for videos",
        ("the code of Video-LLaVA", "transformers with the checkpoint that was converted for it"),
        keys=("mm_image_tower", "mm_video_tower"),
    ),
    ForeignModel(
        "ViP-LLaVA in the original layout",
        "its projector joins the features of several vision layers",
        ("the code of ViP-LLaVA", "the checkpoint that was converted for transformers, which llava reads"),
        matches=lambda config: _text(config, "mm_vision_tower").startswith("clip_4layer"),
    ),
    ForeignModel(
        "FastVLM",
        "its vision tower is a MobileCLIP",
        ("the code of FastVLM",),
        matches=lambda config: "mobileclip" in _text(config, "mm_vision_tower"),
    ),
    ForeignModel(
        "a model with a resampler (mm_resampler_type)",
        "its features are resampled between tower and projector",
        ("the code that it was trained with",),
        matches=lambda config: _text(config, "mm_resampler_type") not in ("", *RESAMPLERS_WITHOUT_EFFECT),
    ),
)


# --- any other --------------------------------------------------------------------------------------------------------

NO_LANGUAGE_MODEL = "transformers has no causal language model of type {!r} for a LLaVA to build on"

# Keys about the vision tower that is read; any other that names a tower declares one more.
TOWER_KEYS = (*TYPES_BY_KEY, "vision_tower", "vision_tower_pretrained", "mm_vision_tower_pretrained")
# Keys, and parts of tensor names, that a model of text alone does not have.
VISION_KEYS = ("vision_config", "visual", "image_token_index", "image_token_id", "vision_tower", "audio_config")
# The names of classes that generate text, by their ends: LlamaForCausalLM, GPT2LMHeadModel.
CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel")
VISION_TENSOR = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|vision_embed_tokens|image_encoder)\."
)


def _foreign_in_transformers_layout(config: Mapping[str, object]) -> ForeignModel | None:
    """Recognise what transformers' own LLaVA classes can be configured to and the original cannot."""
    feature = unknown_feature(config)
    if feature is not None:
        return ForeignModel("a LLaVA of transformers' own", f"it has {feature}", (TRANSFORMERS,))
    kind = language_model_type(config)
    if not is_causal_language_model(kind):
        return ForeignModel("a LLaVA of transformers' own", NO_LANGUAGE_MODEL.format(kind), (TRANSFORMERS,))
    return None


def _foreign_original(config: Mapping[str, object]) -> ForeignModel | None:
    """Recognise classes that nobody here knows among configs with `mm_*` keys."""
    other = next(
        (
            key
            for key, value in config.items()
            if "tower" in key and key not in TOWER_KEYS and isinstance(value, (str, list))
        ),
        None,
    )
    if other is not None:
        return ForeignModel(f"a model with a further tower ({other})", "only mm_vision_tower is read")
    kind = language_model_type(config)
    if not is_causal_language_model(kind):
        return ForeignModel(f"a model of type {config.get('model_type')!r}", NO_LANGUAGE_MODEL.format(kind))
    return None


def _foreign_language_model(config: Mapping[str, object], tensor_names: Iterable[str]) -> ForeignModel | None:
    """Recognise what is neither a LLaVA nor a language model for text alone."""
    kind = config.get("model_type")
    architectures = config.get("architectures")
    own = architectures[0] if isinstance(architectures, list) and architectures else None
    name = "a model without a model_type" if kind is None else f"a model of type {kind!r}"
    name += f" ({own})" if own is not None else ""
    readers = (ITS_OWN_CODE,) if "auto_map" in config else (TRANSFORMERS, ITS_OWN_CODE)
    if kind in TOWER_IMAGE_PROCESSORS:
        return ForeignModel(
            f"a vision tower of type {kind!r}", "it has no language model", ("it as mm_vision_tower of a LLaVA",)
        )
    if any(config.get(key) is not None for key in VISION_KEYS) or any(map(VISION_TENSOR.search, tensor_names)):
        return ForeignModel(name, "it takes images and is no LLaVA", readers)
    is_causal = own is None or str(own).endswith(CAUSAL_CLASSES)
    if not is_causal or not isinstance(kind, str) or not is_causal_language_model(kind):
        return ForeignModel(name, "it is neither a LLaVA nor a causal language model of transformers", readers)
    return None
