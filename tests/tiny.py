"""A complete model that is built in a moment: two layers, width 64, 28-pixel images, byte tokenizer, random weights.

`build(folder)` writes a checkpoint in the original layout with its tower inside, as a released one looks on disk: config,
weights, tokenizer, and a folder `tower` with the tower's config. Keyword arguments change the config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}
SIGLIP = TOWER | {"model_type": "siglip_vision_model"}
SIGLIP_PREPROCESSOR = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}
NUM_TOKENS = 259  # three special ones and 256 bytes

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mm_vision_tower": "tower",
    "unfreeze_mm_vision_tower": True,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "pad",
    "use_mm_proj": True,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
}
ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
}


def build(
    folder: Path,
    language_model: str = "llama",
    *,
    seed: int = 0,
    siglip: bool = False,
    tower: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a model folder and return it; `changes` go into its config.json, `tower` is the config of another tower."""
    from llava.model.language_model.registry import llava_classes

    folder.mkdir(parents=True, exist_ok=True)
    save_tower_config(folder / "tower", siglip=siglip)
    if tower is not None:
        (folder / "tower" / "config.json").write_text(json.dumps(tower))
    save_tokenizer(folder)
    config_class, model_class = llava_classes(language_model)
    config = config_class(**{**CONFIG, **changes})
    config.name_or_path = str(folder)
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    values = config.to_dict() | {"architectures": [model_class.__name__]}
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    save_file(
        {k: v for k, v in state.items() if k not in tied}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def save_tower_config(folder: Path, *, siglip: bool = False) -> None:
    """What describes a tower, without its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIGLIP if siglip else TOWER))
    (folder / "preprocessor_config.json").write_text(json.dumps(SIGLIP_PREPROCESSOR if siglip else PREPROCESSOR))


def save_tower(folder: Path, *, seed: int = 1) -> Path:
    """A whole tower folder, as one downloads it, in the names of its time."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    save_tower_config(folder)
    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**{key: value for key, value in TOWER.items() if key != "model_type"}))
    state = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: ids 0, 1, 2 are pad, begin and end; byte b is id 3 + b in the order of its alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<unk>",
                "model_max_length": 2048,
            }
        )
    )
