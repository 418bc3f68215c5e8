"""Load the model that a run starts from, and prepare it for training.

In: the three argument dataclasses. Out: the tokenizer, the conversation template, and a model with tower and projector,
its parts frozen or trained and in their dtypes. The model is in main memory (the trainer moves it to its device) or, if
`--bits` quantizes it, on this process's device. run.py calls these functions in order.

model/checkpoints/inspect.py finds out what a folder holds, model/builder.py loads a LLaVA, model/llava_arch.py attaches the
tower, lora.py adds adapters.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils.quantization_config import QuantizationConfigMixin

from llava.conversation import OWN_TEMPLATE, SeparatorStyle, conv_templates, is_template
from llava.errors import InputError
from llava.images.layout import TileRange, image_mode, parse_pinpoints
from llava.model.builder import default_dtype, load, load_tokenizer
from llava.model.checkpoints.base_model import inspect_base
from llava.model.checkpoints.inspect import CheckpointInfo
from llava.model.checkpoints.loading import (
    build_with_transformers,
    check_origins,
    load_weights,
    load_with_transformers,
    plan_sources,
)
from llava.model.config import LEARNED_ENDS, OWN_FOLDER, LlavaSettings, is_multimodal
from llava.model.language_model.registry import llava_classes
from llava.model.protocols import LanguageModel, LlavaModel, VisionTower
from llava.model.quantization import quantization_config
from llava.model.template_defaults import choose_base_template
from llava.model.tokenizer_setup import fit_vocabulary, read_generation_config, template_choice
from llava.model.transformers_internals import set_attention
from llava.text.end_token import end_token_id, missing_end_token
from llava.text.tokenization import Tokenizer
from llava.train.arguments import LANGUAGE_MODEL, PROJECTOR, RESAMPLER, DataArguments, ModelArguments, TrainingArguments
from llava.train.lora import add_lora
from llava.train.run_folder.save import smart_tokenizer_and_embedding_resize

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

# Names of --version besides those of the templates.
VERSION_ALIASES = {"v0.5": "v1"}

# Settings in the config of a LLaVA checkpoint, by the name of the argument that would replace each.
CONFIG_OF_ARGUMENT = {
    "vision_tower": "mm_vision_tower",
    "mm_vision_select_layer": "mm_vision_select_layer",
    "mm_vision_select_feature": "mm_vision_select_feature",
    "mm_projector_type": "mm_projector_type",
    "mm_patch_merge_type": "mm_patch_merge_type",
    "mm_use_im_start_end": "mm_use_im_start_end",
    "mm_use_im_patch_token": "mm_use_im_patch_token",
}


AUTO_VERSION = "auto"  # the template that the model's files say


def check_version(version: str | None) -> str:
    """The name of the template that `--version` gives, without its alias; raise `InputError` for one that is not known."""
    name = VERSION_ALIASES.get(str(version), str(version))
    if name == AUTO_VERSION:
        return name
    try:
        conv_templates[name]
    except KeyError:
        known = ", ".join(sorted({AUTO_VERSION, *conv_templates, *VERSION_ALIASES}))
        raise InputError(f"--version is {version!r}; known: {known}") from None
    return name


def name_template(version: str | None, tokenizer: Tokenizer, config: Mapping[str, object]) -> str:
    """The name of a run's template, as `get_template` takes it; `auto` is that of the model's files.

    A LLaVA goes on with its own template, a language model with its chat template.
    """
    name = check_version(version)
    if name != AUTO_VERSION:
        return name
    folder = Path(tokenizer.name_or_path)
    if is_multimodal(config):
        choice = template_choice(config, tokenizer, folder.name)
    else:
        vocabulary = tokenizer.get_vocab()
        choice = choose_base_template(config, folder=folder, has_token=lambda token: token in vocabulary)
    logger.info("--version auto: %s, %s", choice.name, choice.origin)
    return choice.name


def fit_template(name: str, tokenizer: Tokenizer, generation_config: GenerationConfig | None) -> str:
    """Have answers end with a token that the model can learn to stop at; return the name of the template that does.

    An end mark that is no token here is replaced by the tokenizer's own. A chat template from elsewhere becomes the
    tokenizer's, so that the result's folder has it. Generation stops at the token.
    """
    conv = conv_templates[name]
    if conv.sep_style == SeparatorStyle.PLAIN:
        return name
    if (end := missing_end_token(conv, tokenizer)) is not None:
        spelt = f"the template {name} ends answers with {end}, and this end mark is no token of the vocabulary"
        if conv.chat_template is not None or tokenizer.eos_token is None:
            logger.warning("%s: it is trained as text, and only programs that look for this text stop at it", spelt)
        else:
            logger.warning(
                "%s (it takes %d): answers end with %s instead, so that the model learns to stop; --version auto takes the "
                "model's own template", spelt, len(tokenizer(end, add_special_tokens=False).input_ids), tokenizer.eos_token,
            )  # fmt: skip
            name = f"{name}:{tokenizer.eos_token}"
            conv = conv_templates[name]
    if conv.chat_template is not None:
        tokenizer.chat_template = conv.chat_template.source
    end_id = end_token_id(conv, tokenizer)
    if generation_config is not None and end_id is not None:
        known = generation_config.eos_token_id
        stops = [] if known is None else [known] if isinstance(known, int) else list(known)
        if end_id not in stops:
            generation_config.eos_token_id = [*stops, end_id]
    return name


@dataclass(frozen=True)
class LoadPlan:
    """How to load the language model's weights."""

    dtype: torch.dtype
    attn_implementation: str | None
    quantization: QuantizationConfigMixin | None
    device: str | torch.device

    @property
    def loader_options(self) -> dict[str, Any]:
        """Options of `from_pretrained` for quantized weights."""
        if self.quantization is None:
            return {}
        return {"quantization_config": self.quantization, "device_map": {"": str(self.device)}}


def load_base_model(
    model_args: ModelArguments, training_args: TrainingArguments, *, attn_implementation: str | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """Load the model and the tokenizer that `--model_name_or_path` names, as a LLaVA if the run has a tower."""
    if attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError("FlashAttention needs the package 'flash_attn'; install it with: pip install flash-attn")
    info = inspect_base(str(model_args.model_name_or_path))
    plan = LoadPlan(
        dtype=_load_dtype(model_args, training_args),
        attn_implementation=attn_implementation,
        quantization=_quantization(training_args),
        device="cpu" if training_args.bits == 16 else training_args.device,
    )
    if info.is_multimodal or info.needs_base:
        model, tokenizer = _load_llava(info, model_args, plan)
    else:
        tokenizer = load_tokenizer(info.folder)
        load_language_model = _load_with_images if model_args.vision_tower else _load_text_only
        model = load_language_model(info, plan)
        fit_vocabulary(model, tokenizer)
    tokenizer.model_max_length = training_args.model_max_length
    tokenizer.padding_side = "right"
    return model, tokenizer


def _load_dtype(model_args: ModelArguments, training_args: TrainingArguments) -> torch.dtype:
    """The dtype of most of the language model; `cast_weights` casts the rest afterwards."""
    frozen = model_args.tune_mm_mlp_adapter or training_args.lora_enable or model_args.freeze_backbone
    frozen = frozen or model_args.trains(LANGUAGE_MODEL) is False
    return training_args.compute_dtype if frozen else training_args.weight_dtype


def _quantization(training_args: TrainingArguments) -> QuantizationConfigMixin | None:
    if training_args.bits == 16:
        return None
    return quantization_config(
        f"{training_args.bits}bit",
        training_args.compute_dtype,
        bnb_4bit_quant_type=training_args.quant_type,
        bnb_4bit_use_double_quant=training_args.double_quant,
    )


def _load_llava(info: CheckpointInfo, model_args: ModelArguments, plan: LoadPlan) -> tuple[LanguageModel, Tokenizer]:
    if info.stores_quantized and plan.quantization is not None:
        raise InputError(f"{info.folder} is quantized already; leave --bits out, or start from the unquantized model")
    loaded = load(
        info.folder,
        device=plan.device,
        dtype=plan.dtype,
        quantization=plan.quantization,
        attn_implementation=plan.attn_implementation,
    )
    own_tower = loaded.model.config.mm_vision_tower
    if info.tower_in_checkpoint:  # also where its config says so by parts, which this run's may replace
        loaded.model.config.unfreeze_mm_vision_tower = True
    if model_args.vision_tower and model_args.vision_tower != own_tower:
        if info.tower_in_checkpoint or own_tower == OWN_FOLDER:
            logger.warning(
                "%s has a trained vision tower of its own, which is used; --vision_tower %s is not",
                info.folder, model_args.vision_tower,
            )  # fmt: skip
            model_args.vision_tower = own_tower
        else:
            logger.info("--vision_tower %s replaces the checkpoint's %s", model_args.vision_tower, own_tower)
            del loaded.model.get_model().vision_tower
    return loaded.model, loaded.tokenizer


def _load_text_only(info: CheckpointInfo, plan: LoadPlan) -> LanguageModel:
    model, _ = load_with_transformers(
        AutoModelForCausalLM, info.folder, dtype=plan.dtype, attn_implementation=plan.attn_implementation,
        **plan.loader_options,
    )  # fmt: skip
    return model


def _load_with_images(info: CheckpointInfo, plan: LoadPlan) -> LanguageModel:
    config_class, model_class = llava_classes(info.language_model)
    config = config_class.from_dict({key: value for key, value in info.config.items() if key != "model_type"})
    config.name_or_path = str(info.folder)
    if plan.attn_implementation is not None:
        set_attention(config, plan.attn_implementation)
    sources = plan_sources(info, None, prefix=model_class.base_model_prefix)
    if plan.quantization is not None:
        model, origins = build_with_transformers(model_class, config, sources, plan.dtype, plan.loader_options)
    else:
        with default_dtype(plan.dtype), no_init_weights():
            model = model_class(config)
        origins = load_weights(model, sources)
    check_origins(model, origins)
    read_generation_config(model, info, None)
    return model


def prepare_tokenizer(tokenizer: Tokenizer, model: LanguageModel, version: str | None) -> None:
    """Set the tokenizer's padding token: its unknown token; for `v0`, as in the original, a new token."""
    if version == "v0":
        if tokenizer.pad_token is None:
            smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    elif tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:  # byte-level vocabularies have no unknown token
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError("this model's tokenizer has neither a padding, an unknown nor an end token to pad with")


def inherit_vision_settings(
    config: PreTrainedConfig, model_args: ModelArguments, data_args: DataArguments
) -> tuple[ModelArguments, DataArguments]:
    """Complete the arguments from a LLaVA checkpoint's config, for the settings that are not given."""
    if not getattr(config, "mm_vision_tower", None):
        return model_args, data_args
    image = LlavaSettings.from_hf(config).image
    pinpoints = image.pinpoints if isinstance(image.pinpoints, TileRange) else [list(size) for size in image.pinpoints]
    own = {argument: getattr(config, key, None) for argument, key in CONFIG_OF_ARGUMENT.items()}
    own_data = {"image_aspect_ratio": image.aspect_ratio, "image_grid_pinpoints": str(pinpoints) if pinpoints else None}
    kept, kept_data = (
        {name: value for name, value in values.items() if value is not None and not args.is_given(name)}
        for values, args in ((own, model_args), (own_data, data_args))
    )
    for args, values in ((model_args, own), (data_args, own_data)):
        for name, value in values.items():
            wanted = getattr(args, name)
            if name not in {**kept, **kept_data, "vision_tower": None, "mm_projector_type": None} and wanted != value:
                logger.warning("--%s %s replaces the checkpoint's %s", name, wanted, value)
    if kept:
        logger.info("settings that were not given are the checkpoint's: %s", {**kept, **kept_data})
    model_args, data_args = replace_settings(model_args, kept), replace_settings(data_args, kept_data)
    return model_args, data_args


A = TypeVar("A", ModelArguments, DataArguments)


def replace_settings(args: A, values: dict[str, Any]) -> A:
    """A copy with other values, which counts the same settings as given."""
    changed = dataclasses.replace(args, **values)
    changed.given = args.given
    return changed


def prepare_language_model(
    model: LanguageModel, model_args: ModelArguments, training_args: TrainingArguments
) -> LanguageModel | PeftModel:
    """Freeze the language model or add adapters, before tower and projector are attached."""
    model.config.use_cache = False
    _allow_saving(model.generation_config)
    if model_args.freeze_backbone:
        model.base_model.requires_grad_(False)
    if training_args.gradient_checkpointing:
        # Checkpointed layers need an input with a gradient, even if the embedding table is frozen.
        model.enable_input_require_grads()
    return add_lora(model, training_args) if training_args.lora_enable else model


# Keys of the config that are written where the arguments of the same names are given.
MODEL_VIDEO_KEYS = (
    "mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_newline_position", "add_faster_video", "faster_token_stride",
)  # fmt: skip
DATA_VIDEO_KEYS = ("add_time_instruction", "force_sample", "frames_upbound")


def add_vision(
    model: LlavaModel,
    tokenizer: Tokenizer,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Attach tower and projector, record their settings in the config, and choose which parts are trained."""
    config = model.config
    config.image_aspect_ratio = data_args.image_aspect_ratio
    pinpoints = data_args.image_grid_pinpoints
    mode = image_mode(data_args.image_aspect_ratio)
    if mode in ("anyres", "highres") and not pinpoints:
        raise InputError(
            f"--image_aspect_ratio {data_args.image_aspect_ratio} needs --image_grid_pinpoints, the tilings to choose from"
        )
    inner = model.get_model()
    kept = getattr(config, "mm_projector_type", None) if getattr(inner, "mm_projector", None) is not None else None
    if kept is not None and kept != model_args.mm_projector_type:
        logger.warning(
            "the model has a projector (%s) and keeps it; --mm_projector_type %s is not used",
            kept, model_args.mm_projector_type,
        )  # fmt: skip
    for args, keys in ((model_args, MODEL_VIDEO_KEYS), (data_args, DATA_VIDEO_KEYS)):
        for key in keys:
            if args.is_given(key):
                setattr(config, key, getattr(args, key))
    inner.initialize_vision_modules(model_args=model_args, fsdp=training_args.fsdp or None)
    tower = model.get_vision_tower()
    assert tower is not None
    if mode == "anyres":
        config.image_grid_pinpoints = [list(size) for size in parse_pinpoints(pinpoints, tower.tile_size)]
    elif mode == "highres":
        config.image_grid_pinpoints = pinpoints
    for key in ("image_crop_resolution", "image_split_resolution"):
        if getattr(data_args, key) is None:
            setattr(data_args, key, getattr(config, key, None))
        setattr(config, key, getattr(data_args, key))
    data_args.ends_with_newline = model.image_policy().merge == "spatial_unpad"
    tower.requires_grad_(False)  # adapters with `lora_bias all` unfreeze the biases of a tower that is attached already
    data_args.image_processor = tower.image_processor
    if not tower.resamples_pixels:  # its first layer would cast them anyway; loaders transfer half the bytes
        data_args.pixel_dtype = training_args.compute_dtype
    data_args.is_multimodal = True
    data_args.mm_use_im_start_end = model_args.mm_use_im_start_end

    config.tokenizer_padding_side = tokenizer.padding_side
    config.tokenizer_model_max_length = tokenizer.model_max_length
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = training_args.freeze_mm_mlp_adapter
    config.mm_use_im_start_end = model_args.mm_use_im_start_end
    config.mm_use_im_patch_token = model_args.mm_use_im_patch_token
    config.mm_projector_lr = training_args.mm_projector_lr
    version = str(model_args.version)
    if conv_templates[version].sep_style != SeparatorStyle.PLAIN:  # which is for training only
        config.conv_mode = version if is_template(version) else OWN_TEMPLATE
    training_args.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    training_args.use_im_start_end = model_args.mm_use_im_start_end
    training_args.unfreeze_mm_vision_tower = model_args.unfreeze_mm_vision_tower

    ends = [end for name in LEARNED_ENDS if (end := getattr(inner, name, None)) is not None]
    if training_args.bits != 16:  # a quantized model is on its device already, and the trainer does not move it
        for part in (tower, inner.mm_projector):
            part.to(training_args.device)
        for end in ends:
            end.data = end.data.to(training_args.device)
    if model_args.mm_tunable_parts is not None:
        config.mm_tunable_parts = model_args.mm_tunable_parts
        train_parts(model, model_args)
    elif model_args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
        inner.mm_projector.requires_grad_(True)
        for end in ends:
            end.requires_grad_(True)
    if training_args.freeze_mm_mlp_adapter:
        inner.mm_projector.requires_grad_(False)
    if model_args.unfreeze_mm_vision_tower:
        config.unfreeze_mm_vision_tower = True
        config.mm_vision_tower_lr = training_args.mm_vision_tower_lr
        unfreeze_tower(tower)
    model.initialize_vision_tokenizer(model_args, tokenizer=tokenizer)
    data_args.image_policy, data_args.video_policy = model.image_policy(), model.video_policy()


def train_parts(model: LlavaModel, model_args: ModelArguments) -> None:
    """Freeze what `--mm_tunable_parts` does not name, and train a named projector; `add_vision` trains a named tower.

    As in LLaVA-NeXT, the language model's part is all that belongs to no other: the learned line break too.
    """
    if not model_args.trains(LANGUAGE_MODEL):
        model.requires_grad_(False)
    for infix, part in (("mm_projector.", PROJECTOR), ("vision_resampler.", RESAMPLER)):
        for name, parameter in model.named_parameters():
            if infix in name:
                parameter.requires_grad_(bool(model_args.trains(part)))


def unfreeze_tower(tower: VisionTower) -> None:
    """Train the tower up to the layer that the projector reads; later layers get no gradient.

    A trained parameter without a gradient would stop a distributed run, which waits for all gradients.
    """
    tower.requires_grad_(False)
    for part in tower.modules_used():
        part.requires_grad_(True)


def cast_weights(model: nn.Module, training_args: TrainingArguments) -> None:
    """Cast trained weights to `weight_dtype` and frozen ones to `compute_dtype`. Buffers keep their dtype.

    A tower that is partly trained has one dtype, since its layers pass activations to each other.
    """
    if training_args.deepspeed:  # it casts by itself, and may have partitioned the weights already
        return
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    in_tower = {id(parameter) for parameter in tower.parameters()} if tower is not None and tower.trainable else set()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            trained = parameter.requires_grad or id(parameter) in in_tower
            wanted = training_args.weight_dtype if trained else training_args.compute_dtype
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)


def count_trained(model: nn.Module) -> int:
    """Count the trained values; raise `InputError` if there are none."""
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if num_trained == 0:
        raise InputError(
            "there is nothing to train: every part is frozen (--freeze_backbone, --tune_mm_mlp_adapter, "
            "--freeze_mm_mlp_adapter, --mm_tunable_parts)"
        )
    return num_trained


def _allow_saving(generation_config: GenerationConfig | None) -> None:
    """Set `do_sample` where a published model sets a temperature without it, which transformers refuses to save."""
    if generation_config is None or generation_config.do_sample:
        return
    if any(getattr(generation_config, key, None) not in (None, 1.0) for key in ("temperature", "top_p")):
        generation_config.do_sample = True
