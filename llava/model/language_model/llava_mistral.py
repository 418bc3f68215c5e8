"""LLaVA over Mistral, with its sliding attention window where the config has one."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from llava.model.language_model.registry import register
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralConfig(MistralConfig):
    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    config_class = LlavaMistralConfig
    model_class = LlavaMistralModel


register(LlavaMistralConfig, LlavaMistralForCausalLM)
