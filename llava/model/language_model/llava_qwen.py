"""LLaVA over Qwen2 and 2.5, their mixture of experts (under the class names that research code imports), and Qwen3."""

from __future__ import annotations

from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2MoeModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from llava.model.language_model.registry import register
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(LlavaMetaForCausalLM, Qwen2ForCausalLM):
    config_class = LlavaQwenConfig
    model_class = LlavaQwenModel


class LlavaQwenMoeConfig(Qwen2MoeConfig):
    model_type = "llava_qwen_moe"


class LlavaQwenMoeModel(LlavaMetaModel, Qwen2MoeModel):
    config_class = LlavaQwenMoeConfig


class LlavaQwenMoeForCausalLM(LlavaMetaForCausalLM, Qwen2MoeForCausalLM):
    config_class = LlavaQwenMoeConfig
    model_class = LlavaQwenMoeModel


class LlavaQwen3Config(Qwen3Config):
    model_type = "llava_qwen3"


class LlavaQwen3Model(LlavaMetaModel, Qwen3Model):
    config_class = LlavaQwen3Config


class LlavaQwen3ForCausalLM(LlavaMetaForCausalLM, Qwen3ForCausalLM):
    config_class = LlavaQwen3Config
    model_class = LlavaQwen3Model


register(LlavaQwenConfig, LlavaQwenForCausalLM)
register(LlavaQwenMoeConfig, LlavaQwenMoeForCausalLM)
register(LlavaQwen3Config, LlavaQwen3ForCausalLM)
