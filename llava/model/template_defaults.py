"""The conversation template and the context length that a model's config and name imply.

In: the keys of a config.json and the model's name. Out: the name of a template, a number of tokens. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.conversation import conv_mode_for_model_name, conv_templates
from llava.model.config import language_model_type

DEFAULT_CONTEXT_LEN = 2048  # tokens, where no file declares a context length
CONTEXT_KEYS = ("max_sequence_length", "tokenizer_model_max_length", "max_position_embeddings", "max_seq_len")
CHATML_START = "<|im_start|>"

# The conversation templates of language models whose type decides it.
CONV_MODES = {
    "mpt": "mpt",
    "mistral": "mistral_instruct",
    "mixtral": "mistral_instruct",
    "qwen2": "qwen_1_5",
    "qwen3": "qwen_1_5",
}
LLAMA_CONV_MODES = ("llava_v1", "llava_llama_2", "chatml_direct", "llava_v0")


def declared_context_len(config: Mapping[str, Any]) -> int:
    """The context length that a config declares, in tokens with image features, and at most its number of positions."""
    explicit = config.get("max_sequence_length")
    if explicit is not None:
        return int(explicit)
    trained = config.get("tokenizer_model_max_length") or DEFAULT_CONTEXT_LEN
    positions = config.get("max_position_embeddings") or config.get("max_seq_len")  # MPT's word
    return int(min(trained, positions or trained))


def template_name(config: Mapping[str, object], name: str, *, uses_chatml: bool) -> str:
    """Choose the conversation template: by the config's `conv_mode`, then the language model's type, then the model's name.

    `uses_chatml` says whether the vocabulary or the chat template has ChatML's tokens.
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
    # `llava_v0` is also the result for names that are not known: use it only where the name contains "v0".
    if by_name in LLAMA_CONV_MODES and (by_name != "llava_v0" or "v0" in name.lower()):
        return by_name
    return "llava_v1"
