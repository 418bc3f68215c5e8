"""LLaVA over MPT, which has ALiBi biases instead of position embeddings."""

from __future__ import annotations

from transformers import MptConfig, MptForCausalLM, MptModel

from llava.model.language_model.registry import register
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMptConfig(MptConfig):
    model_type = "llava_mpt"


class LlavaMptModel(LlavaMetaModel, MptModel):
    config_class = LlavaMptConfig


class LlavaMptForCausalLM(LlavaMetaForCausalLM, MptForCausalLM):
    config_class = LlavaMptConfig
    model_class = LlavaMptModel


register(LlavaMptConfig, LlavaMptForCausalLM)
