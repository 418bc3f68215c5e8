"""LLaVA over Mixtral, a Mistral whose layers choose among experts."""

from __future__ import annotations

from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from llava.model.language_model.registry import register
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMixtralConfig(MixtralConfig):
    model_type = "llava_mixtral"


class LlavaMixtralModel(LlavaMetaModel, MixtralModel):
    config_class = LlavaMixtralConfig


class LlavaMixtralForCausalLM(LlavaMetaForCausalLM, MixtralForCausalLM):
    config_class = LlavaMixtralConfig
    model_class = LlavaMixtralModel


register(LlavaMixtralConfig, LlavaMixtralForCausalLM)
