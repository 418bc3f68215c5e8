"""Small models of transformers' own LLaVA classes, saved as its different versions write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import save_tokenizer
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

IMAGE_TOKEN = 300  # a real row of the vocabulary in this layout
TEXT = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
           "original_max_position_embeddings": 1024, "rope_theta": 500000.0}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
# (height, width), as transformers writes them; not symmetric, so that a swap shows.
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84]]

# The names of three generations of files, made from what today's version writes.
GENERATIONS: dict[str, Callable[[str], str]] = {
    "today": lambda name: name,
    "4.3x": lambda name: name.replace("vision_tower.", "vision_tower.vision_model.", 1),
    "4.5x": lambda name: {"language_model.lm_head.weight": "lm_head.weight"}.get(
        name, "model." + name.replace("language_model.model.", "language_model.", 1)
    ),
}


def save_peer(folder: Path, model: Any, generation: str = "today", image_size: int = 28) -> Path:
    torch.manual_seed(7)
    for parameter in model.parameters():  # transformers starts some of them at zero, where a mix-up cannot show
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    file = folder / "model.safetensors"
    state = {GENERATIONS[generation](name): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    return folder


def small_llava(
    text: str = "llama", *, layer: int = -2, strategy: str = "default", tower: Any = None, side: int = 28
) -> Any:
    vision = tower or CLIPVisionConfig(**TOWER, image_size=side, patch_size=14)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=TEXT[text](),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=text == "qwen2",
        )
    ).eval()


def small_llava_next(text: str = "llama", side: int = 28) -> Any:
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**TOWER, image_size=side, patch_size=14),
            text_config=TEXT[text](),
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=[[h * side // 28, w * side // 28] for h, w in PINPOINTS],
        )
    ).eval()


def small_vipllava(layers: Sequence[int] = (-2, -3, 1), text: str = "llama", num_layers: int = 3) -> Any:
    return VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER | {"num_hidden_layers": num_layers}, image_size=28, patch_size=14),
            text_config=TEXT[text](),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layers=list(layers),  # the name in every version
        )
    ).eval()


VIDEO_TOKEN = 301
# As OneVision has them, one tile to six in both directions; here of two sizes, so that features are reduced.
MANY = [[28 * rows, 28 * cols] for rows in range(1, 7) for cols in range(1, 7)]


def small_onevision(text: str = "qwen2", *, tower: Any = None, patch: int = 7, **changes: Any) -> Any:
    """LLaVA-OneVision: SigLIP without its last layer and head, tiles whose features are reduced, videos."""
    vision = tower or SiglipVisionConfig(**TOWER, image_size=28, patch_size=patch, vision_use_head=False)
    values = {
        "image_token_index": IMAGE_TOKEN, "video_token_index": VIDEO_TOKEN, "image_grid_pinpoints": MANY,
        "tie_word_embeddings": text == "qwen2",
    }  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(vision_config=vision, text_config=TEXT[text](), **(values | changes))
    ).eval()


def small_next_video(text: str = "llama", *, patch: int = 7, **changes: Any) -> Any:
    """LLaVA-NeXT-Video: as LLaVA-NeXT, with videos whose frames are reduced before the projector."""
    values = {"image_token_index": IMAGE_TOKEN, "video_token_index": VIDEO_TOKEN, "image_grid_pinpoints": PINPOINTS}
    return LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(**TOWER, image_size=28, patch_size=patch),
            text_config=TEXT[text](),
            **(values | changes),
        )
    ).eval()


def small_granite_vision(layers: Sequence[int] = (-4, -3, 1, -1)) -> Any:
    """Granite Vision: the class of LLaVA-NeXT over SigLIP, with the features of several layers.

    With a `logits_scaling` other than 1 transformers' class would give other logits than Granite's own: it leaves it out.
    """
    text = AutoConfig.for_model("granite", **SIZES, num_key_value_heads=2, embedding_multiplier=3.0, logits_scaling=1.0)
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=SiglipVisionConfig(**TOWER, image_size=28, patch_size=14, vision_use_head=False),
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=list(layers),
            vision_feature_select_strategy="full",
        )
    ).eval()
