"""The model: vision tower, projector and language model composed. Names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "LlavaConfig": "llava_llama",
    "LlavaLlamaModel": "llava_llama",
    "LlavaLlamaForCausalLM": "llava_llama",
    "LlavaMistralConfig": "llava_mistral",
    "LlavaMistralModel": "llava_mistral",
    "LlavaMistralForCausalLM": "llava_mistral",
    "LlavaMptConfig": "llava_mpt",
    "LlavaMptModel": "llava_mpt",
    "LlavaMptForCausalLM": "llava_mpt",
    "LlavaQwenConfig": "llava_qwen",
    "LlavaQwenModel": "llava_qwen",
    "LlavaQwenForCausalLM": "llava_qwen",
    "LlavaQwen3Config": "llava_qwen",
    "LlavaQwen3Model": "llava_qwen",
    "LlavaQwen3ForCausalLM": "llava_qwen",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"llava.model.language_model.{_HOME[name]}"), name)
