"""What a run starts from: a language model or a LLaVA checkpoint, and its tokenizer.

In: ModelArguments and TrainingArguments. Out: a model whose class has images where the run has a tower; in main memory
(the trainer moves it to its device, once) or, where `--bits` packs its weights, on the device of this process. What a
folder holds is decided by model/checkpoints/inspect.py; a whole LLaVA is loaded by model/builder.py; tower and projector join a
language model in model_setup.py.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from llava.errors import InputError
from llava.model.builder import load, load_tokenizer
from llava.model.checkpoints.inspect import CheckpointInfo, inspect
from llava.model.checkpoints.loading import build_with_transformers, load_weights, plan_sources
from llava.model.language_model.registry import llava_classes
from llava.model.quantization import quantization_config
from llava.train.arguments import ModelArguments, TrainingArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadPlan:
    """How the language model's weights are to be held."""

    dtype: torch.dtype
    attn_implementation: str | None
    quantization: Any  # transformers' configuration object, or None
    device: str | torch.device

    @property
    def loader_options(self) -> dict[str, Any]:
        """What transformers' loader has to know where it packs weights."""
        if self.quantization is None:
            return {}
        return {"quantization_config": self.quantization, "device_map": {"": str(self.device)}}


def load_base(
    model_args: ModelArguments, training_args: TrainingArguments, *, attn_implementation: str | None = None
) -> tuple[Any, Any]:
    """The model and the tokenizer that `--model_name_or_path` names."""
    if attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError("FlashAttention needs the package 'flash_attn'; install it with: pip install flash-attn")
    info = inspect(str(model_args.model_name_or_path))
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
    tokenizer.model_max_length = training_args.model_max_length
    tokenizer.padding_side = "right"
    return model, tokenizer


def _load_dtype(model_args: ModelArguments, training_args: TrainingArguments) -> torch.dtype:
    """The precision in which most of the language model will be held; model_setup.py casts the rest afterwards."""
    frozen = model_args.tune_mm_mlp_adapter or training_args.lora_enable or model_args.freeze_backbone
    return training_args.compute_dtype if frozen else training_args.weight_dtype


def _quantization(training_args: TrainingArguments) -> Any:
    if training_args.bits == 16:
        return None
    return quantization_config(
        f"{training_args.bits}bit",
        training_args.compute_dtype,
        bnb_4bit_quant_type=training_args.quant_type,
        bnb_4bit_use_double_quant=training_args.double_quant,
    )


def _load_llava(info: CheckpointInfo, model_args: ModelArguments, plan: LoadPlan) -> tuple[Any, Any]:
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
    if model_args.vision_tower and model_args.vision_tower != own_tower:
        if info.tower_in_checkpoint:
            logger.warning(
                "%s has a trained vision tower of its own, which is used; --vision_tower %s is not",
                info.folder, model_args.vision_tower,
            )  # fmt: skip
            model_args.vision_tower = own_tower
        else:
            logger.info("--vision_tower %s takes the place of the checkpoint's %s", model_args.vision_tower, own_tower)
            del loaded.model.get_model().vision_tower
    return loaded.model, loaded.tokenizer


def _load_text_only(info: CheckpointInfo, plan: LoadPlan) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        info.folder, dtype=plan.dtype, attn_implementation=plan.attn_implementation, **plan.loader_options
    )


def _load_with_images(info: CheckpointInfo, plan: LoadPlan) -> Any:
    config_class, model_class = llava_classes(info.language_model)
    config = config_class.from_dict({key: value for key, value in info.config.items() if key != "model_type"})
    config.name_or_path = str(info.folder)
    if plan.attn_implementation is not None:
        config._attn_implementation = plan.attn_implementation
    sources = plan_sources(info, None, prefix=model_class.base_model_prefix)
    if plan.quantization is not None:
        model = build_with_transformers(model_class, config, sources, plan.dtype, plan.loader_options)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(plan.dtype)
        try:
            with no_init_weights():
                model = model_class(config)
        finally:
            torch.set_default_dtype(before)
        load_weights(model, sources)
    if (info.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(info.folder)
    return model
