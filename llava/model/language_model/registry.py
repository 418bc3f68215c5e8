"""The LLaVA classes over each language model, found by model type.

A language model with published checkpoints has a module of its own (llava_llama.py, …) because outside code imports its
classes by name. Any other one needs no module: `compose("gemma2")` creates its config and model classes and registers them
with transformers' Auto classes under the model type `llava_gemma2`.

In: a model type of transformers. Out: the LLaVA config class and model class over it.
"""

from __future__ import annotations

from importlib import import_module

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llava.errors import InputError
from llava.model.config import PREFIX, is_causal_language_model
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.transformers_internals import share_tensor_names

# Language models with a module of their own: model type in transformers -> (module, config class, model class).
NAMED = {
    "gemma": ("llava_gemma", "LlavaGemmaConfig", "LlavaGemmaForCausalLM"),
    "llama": ("llava_llama", "LlavaConfig", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralConfig", "LlavaMistralForCausalLM"),
    "mixtral": ("llava_mixtral", "LlavaMixtralConfig", "LlavaMixtralForCausalLM"),
    "mpt": ("llava_mpt", "LlavaMptConfig", "LlavaMptForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenConfig", "LlavaQwenForCausalLM"),
    "qwen2_moe": ("llava_qwen", "LlavaQwenMoeConfig", "LlavaQwenMoeForCausalLM"),
    "qwen3": ("llava_qwen", "LlavaQwen3Config", "LlavaQwen3ForCausalLM"),
}

_composed: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {}


def llava_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Look up the LLaVA config class and model class over the language model of type `model_type`."""
    if model_type in NAMED:
        module_name, config_name, model_name = NAMED[model_type]
        module = import_module(f"llava.model.language_model.{module_name}")
        return getattr(module, config_name), getattr(module, model_name)
    return compose(model_type)


def compose(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Create LLaVA classes over any causal language model of transformers, once for each type.

    The inner model must take `inputs_embeds`.
    """
    if model_type not in _composed:
        if not is_causal_language_model(model_type):
            raise InputError(
                f"transformers has no causal language model of type {model_type!r} for a LLaVA to build on; "
                f"those with classes of their own here are {', '.join(NAMED)}"
            )
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        known = CONFIG_MAPPING[model_type]
        causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING[known]
        name = "Llava" + causal_lm.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        config_class = type(f"{name}Config", (known,), {"model_type": PREFIX + model_type, "__module__": __name__})
        about = {"__module__": __name__, "config_class": config_class}
        model_class = type(f"{name}ForCausalLM", (LlavaMetaForCausalLM, causal_lm), about)
        register(config_class, model_class)
        _composed[model_type] = config_class, model_class
    return _composed[model_type]


def register(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Register a pair of classes with transformers' AutoConfig and AutoModelForCausalLM."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    share_tensor_names(getattr(config_class.__bases__[0], "model_type", ""), config_class.model_type)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
