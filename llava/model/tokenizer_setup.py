"""What belongs to a loaded model beside its weights: tokenizer, vocabulary rows, context length, conversation template.

In: a model folder's files and the config. Out: each of these as the model was trained with it. Reading tokenizer files is
text/tokenization.py's matter, templates are data in conversation.py; builder.py calls this when the weights are in place.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.files import read_json
from llava.model.checkpoints.inspect import CheckpointInfo
from llava.model.config import LlavaSettings, is_multimodal
from llava.model.template_defaults import CHATML_START, CONTEXT_KEYS, declared_context_len, template_name
from llava.text import tokenization

logger = logging.getLogger(__name__)


class ConfigView:
    """A config.json's keys as attributes, for `LlavaSettings.from_hf`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


def read_tokenizer(folder: Path, config: Any) -> Any:
    """The folder's tokenizer, with the marker tokens that the config asks for."""
    tokenizer = tokenization.load_tokenizer(folder)
    if is_multimodal(vars(config) if isinstance(config, ConfigView) else config.to_dict()):
        tokens = LlavaSettings.from_hf(config).tokens
        if tokens.use_im_patch:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
        if tokens.use_im_start_end:
            tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return tokenizer


def fit_vocabulary(model: Any, tokenizer: Any) -> None:
    """Give every token an embedding row; rows beyond the tokenizer's stay, since some layouts pad them."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    logger.warning(
        "the tokenizer has %d tokens and the model %d rows; the new rows are not trained", len(tokenizer), rows
    )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[rows:] = layer.weight[:rows].float().mean(dim=0).to(layer.weight.dtype)


def read_generation_config(model: Any, info: CheckpointInfo, base_info: CheckpointInfo | None) -> None:
    from transformers import GenerationConfig

    for folder in [info.folder] + ([base_info.folder] if base_info is not None else []):
        if (folder / "generation_config.json").is_file():
            read_json(folder / "generation_config.json")  # says so where it is damaged
            model.generation_config = GenerationConfig.from_pretrained(folder)
            return


def context_len(config: Any) -> int:
    """How many tokens, image features included, the model takes."""
    return declared_context_len({key: getattr(config, key, None) for key in CONTEXT_KEYS})


def conv_mode(config: Mapping[str, Any], tokenizer: Any, name: str) -> str:
    """The conversation template of a loaded model."""
    template = getattr(tokenizer, "chat_template", None)
    marks = CHATML_START in tokenizer.get_vocab() or (isinstance(template, str) and CHATML_START in template)
    return template_name(config, name, uses_chatml=marks)
