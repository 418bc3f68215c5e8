"""The model: vision tower, projector and language model composed. Names are imported when they are first used."""

from __future__ import annotations

from llava.utils import lazy_exports

EXPORTS = {
    "llava.model.language_model.llava_llama": ("LlavaConfig", "LlavaLlamaModel", "LlavaLlamaForCausalLM"),
    "llava.model.language_model.llava_mistral": ("LlavaMistralConfig", "LlavaMistralModel", "LlavaMistralForCausalLM"),
    "llava.model.language_model.llava_mpt": ("LlavaMptConfig", "LlavaMptModel", "LlavaMptForCausalLM"),
    "llava.model.language_model.llava_qwen": (
        "LlavaQwenConfig",
        "LlavaQwenModel",
        "LlavaQwenForCausalLM",
        "LlavaQwen3Config",
        "LlavaQwen3Model",
        "LlavaQwen3ForCausalLM",
    ),
}
__all__ = [name for names in EXPORTS.values() for name in names]

__getattr__, __dir__ = lazy_exports(__name__, EXPORTS)
