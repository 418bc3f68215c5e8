"""The layout of transformers' own classes, one of those in model/checkpoints/hf_layout.py, which reads it.

In: a `Source`. Out: the planned tensors of a target, its config, processors, tokenizer and chat template; or an error that
names the feature which the layout cannot express. Images and videos become tokens of the vocabulary, whose tables are padded
to a multiple of 64 rows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template, image_placeholder
from llava.convert.chat_template import chat_template
from llava.convert.options import NAME_VERSIONS
from llava.convert.source import ORIGINAL_FILES, TOKENIZER_SET, Source, chat_command, copy_files, stored_dtype
from llava.convert.tokenizer_json import PAD_TOKEN, TokenizerDifference, convert_tokenizer, differences, save_tokenizer
from llava.convert.verify import Verification, verify_folder
from llava.convert.writer import SHARD_BYTES, ByteProgress, PlannedTensor, write_json, write_shards
from llava.errors import InputError
from llava.images.video_layout import VideoPolicy
from llava.model.checkpoints.hf_layout import HF_MODELS, NORM_PROJECTOR, SELECT_FEATURES, HFModel
from llava.model.checkpoints.loading import pad_rows
from llava.model.checkpoints.weight_files import TORCH_DTYPES
from llava.model.tokenizer_setup import context_len

VOCABULARY_MULTIPLE = 64


VIDEO_TOKEN = "<video>"
VIDEO_TOKENS = (VIDEO_TOKEN,)


def _name_rules(prefix: str, tower_level: str, *language_model: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (
        (rf"^model\.vision_tower\.vision_tower\.{tower_level}", f"{prefix}vision_tower."),
        (r"^model\.mm_projector\.0\.", f"{prefix}multi_modal_projector.linear_1."),
        (r"^model\.mm_projector\.2\.", f"{prefix}multi_modal_projector.linear_2."),
        (r"^model\.mm_projector\.norm\.", f"{prefix}multi_modal_projector.projector_layernorm."),
        (r"^model\.image_newline$", f"{prefix}image_newline"),
        *language_model,
    )


# Tensor names by the version of transformers that writes them. All readers (every later version, vLLM) accept the first,
# which is that of the published checkpoints.
NAME_RULES = {
    "4.36": _name_rules("", "", (r"^", "language_model.")),
    # What these versions write for a plain state dict.
    "4.52": _name_rules("model.", "", (r"^model\.", "model.language_model."), (r"^", "")),
    "5": _name_rules("", r"vision_model\.", (r"^", "language_model.")),
}


class HFLayout:
    """A target in transformers' layout."""

    def __init__(self, source: Source, *, names: str = NAME_VERSIONS[0], shard_bytes: int = SHARD_BYTES) -> None:
        self.source = source
        self.shard_bytes = shard_bytes
        self.rules = NAME_RULES[names]
        self.model_type = hf_model_type(source)
        self.model = HF_MODELS[self.model_type]
        _check_expressible(source, self.model)
        self.tokenizer = convert_tokenizer(source.tokenizer, VIDEO_TOKENS if self.model.takes_videos else ())
        self.image_token = self.tokenizer.token_to_id(DEFAULT_IMAGE_TOKEN)
        self.differences: list[TokenizerDifference] = differences(source.tokenizer, self.tokenizer)
        if any(difference.what == "ids" for difference in self.differences):
            raise InputError(
                f"the tokenizer of {source.folder} cannot be expressed as tokenizer.json: {self.differences[0]}; use the "
                "checkpoint in the original layout"
            )

    # Tensors

    def tensors(self) -> list[PlannedTensor]:
        return [self._with_more_rows(name) for name in self.source.names]

    def target_name(self, name: str) -> str:
        for pattern, replacement in self.rules:
            if re.search(pattern, name):
                return re.sub(pattern, replacement, name, count=1)
        raise AssertionError(name)

    def _with_more_rows(self, name: str) -> PlannedTensor:
        source = self.source
        plain = source.planned(name, self.target_name(name))
        if not source.is_vocabulary(name) or plain.shape[0] >= self.num_rows:
            return plain
        shape = (self.num_rows, *plain.shape[1:])
        return PlannedTensor(plain.name, plain.dtype, shape, lambda: pad_rows(source.read(name), self.num_rows))

    @property
    def num_rows(self) -> int:
        """Rows of the embedding tables: enough for the new tokens, padded as in the published conversions."""
        rows = next(self.source.shape(name)[0] for name in self.source.names if self.source.is_vocabulary(name))
        needed = self.tokenizer.get_vocab_size()
        return rows if needed <= rows else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    # Config

    def config(self) -> dict[str, Any]:
        source, model = self.source, self.model
        values: dict[str, Any] = {
            "architectures": [model.architecture],
            "model_type": self.model_type,
            "ignore_index": -100,
            "image_token_index": self.image_token,
            "image_seq_length": source.policy.features_per_tile,
            "multimodal_projector_bias": True,
            "pad_token_id": self.tokenizer.token_to_id(PAD_TOKEN),
            "projector_hidden_act": "gelu",
            "text_config": self.text_config(),
            "tie_word_embeddings": bool(source.model.config.tie_word_embeddings),
            "torch_dtype": TORCH_DTYPES[source.dtype or stored_dtype(source.info)],
            "vision_config": source.tower_config,
            # ViP-LLaVA's word in every version; the newer one of transformers 5 is another name of it.
            model.layer_key: layers if isinstance(layers := source.tower.select_layer, int) else list(layers),
            "vision_feature_select_strategy": self._select_strategy(),
            "conv_mode": source.conv_mode,
            "tokenizer_model_max_length": context_len(source.model.config),
        }
        if get_template(source.conv_mode).chat_template is not None:  # the chat template that is written says it
            del values["conv_mode"]
        if model.has_tiles:
            values |= {"image_grid_pinpoints": self._pinpoints(), "use_image_newline_parameter": True}
        if model.takes_videos:
            values["video_token_index"] = self.tokenizer.token_to_id(VIDEO_TOKEN)
        if model.reduces_features:
            values["vision_aspect_ratio"] = source.settings.image.aspect_ratio
        elif model.takes_videos:
            video = source.settings.video
            values |= {"spatial_pool_mode": video.pool, "spatial_pool_stride": video.stride}
        return values

    def _select_strategy(self) -> str:
        strategies = {value: key for key, value in SELECT_FEATURES[self.source.tower_config["model_type"]].items()}
        return strategies[self.source.settings.vision.select_feature]

    def text_config(self) -> dict[str, Any]:
        """The language model's own keys, with the position encoding under the keys of every version."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        model_type = self.source.info.language_model
        known = AutoConfig.for_model(model_type).to_dict().keys()
        now = self.source.model.config.to_dict()
        values = {key: value for key, value in now.items() if key in known and value is not None}
        rope = values.get("rope_parameters") or {}
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = {**rope, "type": rope["rope_type"]}
        for key in ("transformers_version", "_name_or_path", "dtype", "id2label", "label2id"):
            values.pop(key, None)
        return values | {
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
            "model_type": model_type,
            "vocab_size": self.num_rows,
        }

    def _pinpoints(self) -> list[list[int]]:
        """Grid pinpoints as (height, width), the order of this layout."""
        return [[height, width] for width, height in self.source.policy.pinpoints]

    # Files

    @property
    def num_bytes(self) -> int:
        return sum(planned.num_bytes for planned in self.tensors())

    def write(self, folder: Path, progress: ByteProgress) -> None:
        write_shards(folder, self.tensors(), shard_bytes=self.shard_bytes, progress=progress)
        self.write_small_files(folder)

    def verify(self, folder: Path, *, logits: bool) -> Verification:
        return verify_folder(self.source, folder, logits=logits)

    def write_small_files(self, folder: Path) -> None:
        source = self.source
        template = self.chat_template()
        save_tokenizer(self.tokenizer, source.tokenizer, folder)
        write_json(folder / "preprocessor_config.json", self.image_processor())
        write_json(folder / "processor_config.json", self.processor())
        if self.model.takes_videos:
            write_json(folder / "video_preprocessor_config.json", self.video_processor())
        # Versions since 4.50 read the first file, older ones the second.
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_json(folder / "chat_template.json", {"chat_template": template})
        source.copy_generation_config(folder)
        if not source.is_restored and source.info.kind != "transformers":
            # Kept for converting back: this layout has no keys for some of it.
            copy_files(source.tokenizer_folder, folder / ORIGINAL_FILES, TOKENIZER_SET)
            write_json(folder / ORIGINAL_FILES / "config.json", dict(source.config))
        write_json(folder / "config.json", self.config())

    def chat_template(self) -> str:
        placeholder = image_placeholder(self.source.settings.tokens.use_im_start_end)
        return chat_template(self.source.conv_mode, placeholder, VIDEO_TOKEN if self.model.takes_videos else None)

    def processor(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "image_token": DEFAULT_IMAGE_TOKEN,
            "processor_class": self.model.processor,
            "vision_feature_select_strategy": self._select_strategy(),
        }
        if self.model.takes_videos:
            values["video_token"] = VIDEO_TOKEN
        if self.model.reduces_features:
            return values | {
                "num_image_tokens": self.source.policy.features_per_tile,
                "vision_aspect_ratio": self.source.settings.image.aspect_ratio,
            }
        return values | {
            "num_additional_image_tokens": int(self.source.tower.has_class_token),
            "patch_size": self.source.policy.patch_size,
        }

    def image_processor(self) -> dict[str, Any]:
        """The tower's image processor; for padding and tiles the class is one of LLaVA's, which has the same keys."""
        values: dict[str, Any] = self.source.image_processor.to_dict()
        values["processor_class"] = self.model.processor
        if self.model.has_tiles:
            kind = f"{'LlavaOnevision' if self.model.reduces_features else 'LlavaNext'}ImageProcessor"
            values |= {"image_processor_type": kind, "image_grid_pinpoints": self._pinpoints()}
        elif self.source.settings.image.mode == "pad":
            values |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        return values

    def video_processor(self) -> dict[str, Any]:
        """The processor of a video's frames: that of an image which is one tile."""
        processor = self.source.image_processor
        values = {key: value for key, value in processor.to_dict().items() if key not in processor.extra}
        return values | {
            "image_processor_type": self.image_processor()["image_processor_type"],
            "video_processor_type": f"{self.model.name}VideoProcessor",
            "processor_class": self.model.processor,
            "do_sample_frames": False,
        }

    def commands(self, target: Path) -> list[str]:
        return [chat_command(target)]

    def notes(self) -> list[str]:
        """Properties of the target that a user should know."""
        notes = [f"the tokenizer decodes {d.text!r} to other text: {d.theirs!r}" for d in self.differences]
        if self.model.name == "LlavaNextVideo" and not self._computes_videos_alike():
            notes.append(
                "transformers' class reduces the features of a video's frames before the projector and adds no newline, this "
                "model reduces them behind it: answers about images are the same, those about videos differ"
            )
        if self.source.settings.image.mode == "pad":
            notes.append("images are padded by LlavaImageProcessor, which transformers has since 4.49")
        return notes

    def _computes_videos_alike(self) -> bool:
        """Whether the target's class makes the same features of a video."""
        video = self.source.settings.video
        return self.model.reduces_features or (video.before_projector and video.newline == "no_token")

    def left_out(self) -> dict[str, tuple[str, ...]]:
        return {}


def hf_model_type(source: Source) -> str:
    """The model_type of the class that computes what a source computes."""
    settings = source.settings
    if settings.projector.type == NORM_PROJECTOR:
        return "vipllava"
    if settings.image.mode != "anyres":
        return "llava"
    if settings.image.max_tiles is not None:
        return "llava_onevision"
    pools = settings.video.before_projector or source.config.get("mm_resampler_type") == "spatial_pool"
    return "llava_next_video" if pools else "llava_next"


def _check_expressible(source: Source, model: HFModel) -> None:
    settings, tower = source.settings, source.tower
    select = SELECT_FEATURES.get(tower.config.model_type, {})
    video = settings.video
    unsupported = {
        f"a projector of type {settings.projector.type!r}": settings.projector.type != model.projector,
        f"a projector of type {model.projector!r} over tiles": settings.image.mode == "anyres" and not model.has_tiles,
        f"a language model of type {source.info.language_model!r}": source.prefix != "model.",
        "a tower with several scales (s2)": bool(settings.vision.s2_scales),
        f"a tower of type {tower.config.model_type!r}": not select,
        f"mm_vision_select_feature {settings.vision.select_feature!r}": settings.vision.select_feature
        not in select.values(),
        f"image_aspect_ratio {settings.image.mode!r}": settings.image.mode not in ("square", "pad", "anyres"),
        f"tiles joined by mm_patch_merge_type {settings.image.merge!r}": settings.image.mode == "anyres"
        and (settings.image.merge != "spatial_unpad" or settings.image.pools or not settings.image.keeps_overview),
        "mm_patch_merge_type 'spatial_unpad' without tiles": settings.image.mode != "anyres"
        and settings.image.merge == "spatial_unpad",
        "mm_vision_select_feature 'cls_patch' of several layers": model.name == "VipLlava"
        and settings.vision.select_feature != "patch",
        _video_words(video): model.reduces_features and video != VideoPolicy(),
        "add_faster_video": video.slow_every is not None,
        "mm_spatial_pool_mode 'bilinear' without anyres_max": model.name == "LlavaNextVideo"
        and video.pool == "bilinear",
    }
    source.require_supported("transformers", unsupported)


def _video_words(video: VideoPolicy) -> str:
    place = "before" if video.before_projector else "behind"
    return (
        f"videos reduced by {video.pool} {place} the projector with stride {video.stride} and newlines {video.newline!r}, "
        "where its class has bilinear, 2 and 'one_token'"
    )
