"""LLaVA over Gemma, the first generation."""

from __future__ import annotations

from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel

from llava.model.language_model.registry import register
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaGemmaConfig(GemmaConfig):
    model_type = "llava_gemma"


class LlavaGemmaModel(LlavaMetaModel, GemmaModel):
    config_class = LlavaGemmaConfig


class LlavaGemmaForCausalLM(LlavaMetaForCausalLM, GemmaForCausalLM):
    config_class = LlavaGemmaConfig
    model_class = LlavaGemmaModel


register(LlavaGemmaConfig, LlavaGemmaForCausalLM)
