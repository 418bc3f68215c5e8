"""Set up what a loaded model has besides its weights: tokenizer, vocabulary size, generation config, context length, template.

In: the files of a model folder and the config. Out: each of these as the model was trained with it. Tokenizer files are
read by text/tokenization.py, templates are data in conversation_templates.py; model/builder.py calls this after loading.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedConfig

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.files import read_json
from llava.model.checkpoints.inspect import CheckpointInfo, folders_of
from llava.model.config import LlavaSettings, check_types, described_by, is_multimodal
from llava.model.multimodal_projector.pretrained import load_new_token_embeddings
from llava.model.protocols import LanguageModel, VisionArguments
from llava.model.template_defaults import CONTEXT_KEYS, TemplateChoice, choose_template, declared_context_len
from llava.text import tokenization
from llava.text.tokenization import Tokenizer

logger = logging.getLogger(__name__)


def read_tokenizer(folder: Path, config: PreTrainedConfig | SimpleNamespace) -> Tokenizer:
    """Load the tokenizer of a folder and add the image tokens that the config, or its keys as attributes, asks for."""
    tokenizer = tokenization.load_tokenizer(folder)
    if is_multimodal(vars(config) if isinstance(config, SimpleNamespace) else config.to_dict()):
        tokens = LlavaSettings.from_hf(config).tokens
        if tokens.use_im_patch:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
        if tokens.use_im_start_end:
            tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return tokenizer


def add_image_tokens(model: LanguageModel, model_args: VisionArguments, tokenizer: Tokenizer) -> None:
    """Add the image tokens that training asks for to tokenizer and model, and initialise their embeddings.

    `<im_start>` and `<im_end>` start as the mean of the other rows, in the input and the output embeddings. With
    `tune_mm_mlp_adapter` only the input embeddings are trained; with a pretrained projector they come from its file.
    """
    if model_args.mm_use_im_patch_token:
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if model_args.mm_use_im_start_end:
        num_new = tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        if num_new:
            for table in tables:
                table.data[-num_new:] = table.data[:-num_new].mean(dim=0, keepdim=True)
        if model_args.tune_mm_mlp_adapter:
            model.get_input_embeddings().requires_grad_(True)
            model.get_output_embeddings().requires_grad_(False)
        if model_args.pretrain_mm_mlp_adapter and num_new:
            load_new_token_embeddings(model.get_input_embeddings().weight, model_args.pretrain_mm_mlp_adapter, num_new)
    elif model_args.mm_use_im_patch_token and model_args.tune_mm_mlp_adapter:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)


def fit_vocabulary(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Add embedding rows for tokens that have none; rows beyond the tokenizer's are kept, since some layouts pad them."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    logger.warning(
        "the tokenizer has %d tokens and the model %d rows; the new rows begin as the mean of the others",
        len(tokenizer),
        rows,
    )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[rows:] = layer.weight[:rows].float().mean(dim=0).to(layer.weight.dtype)


def read_generation_config(model: LanguageModel, info: CheckpointInfo, base_info: CheckpointInfo | None) -> None:
    """Set the model's generation config from the checkpoint's file or, without one, its base's."""
    from transformers import GenerationConfig

    for folder in folders_of(info, base_info):
        if (folder / "generation_config.json").is_file():
            file = folder / "generation_config.json"
            values = read_json(file)
            check_types(values, file)
            with described_by(file, "how to generate"):
                model.generation_config = GenerationConfig.from_dict(values)
            return


def context_len(config: PreTrainedConfig) -> int:
    """The context length of a model in tokens, image features included."""
    return declared_context_len({key: getattr(config, key, None) for key in CONTEXT_KEYS})


def template_choice(config: Mapping[str, object], tokenizer: Tokenizer, name: str) -> TemplateChoice:
    """The conversation template of a loaded model, by its config, the tokenizer and its folder, and its name."""
    folder = Path(tokenizer.name_or_path)
    vocabulary = tokenizer.get_vocab()
    return choose_template(
        config, name, folder=folder if folder.is_dir() else None, has_token=lambda token: token in vocabulary
    )


def conv_mode(config: Mapping[str, object], tokenizer: Tokenizer, name: str) -> str:
    """The name of the conversation template of a loaded model, as `get_template` takes it."""
    return template_choice(config, tokenizer, name).name
