"""How a model is talked to, as its config tells: the conversation template and how much text it takes.

In: a config.json's keys and the model's name. Out: the name of a template, a number of tokens. Nothing is loaded for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.conversation import conv_mode_for_model_name, conv_templates
from llava.model.config import language_model_type

DEFAULT_CONTEXT_LEN = 2048  # where no file says how much text a model takes
CONTEXT_KEYS = ("max_sequence_length", "tokenizer_model_max_length", "max_position_embeddings", "max_seq_len")
CHATML_START = "<|im_start|>"

# The conversation template that a language model's type tells, where its name says nothing better.
CONV_MODES = {
    "mpt": "mpt",
    "mistral": "mistral_instruct",
    "mixtral": "mistral_instruct",
    "qwen2": "qwen_1_5",
    "qwen3": "qwen_1_5",
}
LLAMA_CONV_MODES = ("llava_v1", "llava_llama_2", "chatml_direct", "llava_v0")


def declared_context_len(config: Mapping[str, Any]) -> int:
    """How many tokens, image features included, the model takes: what its files say, the positions it has at most."""
    explicit = config.get("max_sequence_length")
    if explicit is not None:
        return int(explicit)
    trained = config.get("tokenizer_model_max_length") or DEFAULT_CONTEXT_LEN
    positions = config.get("max_position_embeddings") or config.get("max_seq_len")  # MPT's word
    return int(min(trained, positions or trained))


def template_name(config: Mapping[str, Any], name: str, *, uses_chatml: bool) -> str:
    """The conversation template: what the config says, then what the language model tells, then the model's name.

    `uses_chatml` says whether the vocabulary or the chat template knows ChatML's marks.
    """
    declared = config.get("conv_mode")
    if declared in conv_templates:
        return str(declared)
    by_name = conv_mode_for_model_name(name)
    by_model = CONV_MODES.get(language_model_type(config))
    if by_model is not None:
        return by_model
    if uses_chatml:
        return "chatml_direct"
    # `llava_v0` is what the rule answers to any name it does not know: believe it only where the name says so.
    if by_name in LLAMA_CONV_MODES and (by_name != "llava_v0" or "v0" in name.lower()):
        return by_name
    return "llava_v1"
