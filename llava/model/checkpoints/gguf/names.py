"""The names of tensors in GGUF files, beside those of published checkpoints, and the order of rows that llama.cpp expects.

In: a tensor's name. Out: its name on the other side, None where there is none. One table serves the reader (folder.py)
and the writer (convert/gguf/pair.py). Nothing here needs torch; rows are reordered by the tensors' own methods.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Language models of llama.cpp, by the name that GGUF gives to their architecture, and those of transformers.
ARCHITECTURES = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",), "gemma": ("gemma",)}
ARCHITECTURE_OF = {kind: name for name, kinds in ARCHITECTURES.items() for kind in kinds}
# Architectures whose rotary embedding rotates neighbouring elements where transformers rotates halves: rows are reordered.
INTERLEAVED = ("llama",)
# Architectures whose norms are stored with one added, as they are used.
SHIFTED_NORMS = ("gemma",)
# Architectures for which llama.cpp multiplies image features, as it does embeddings, by the root of their width; transformers
# multiplies embeddings alone. The numbers that make the features are stored divided by it.
SCALED_FEATURES = ("gemma",)

ROPE_FACTORS = "rope_freqs.weight"  # computed from the config: no tensor of a checkpoint

_LAYER, _BLOCK = "model.layers.{}.", "blk.{}."
_TOWER = "model.vision_tower.vision_tower.vision_model."
_ENCODER, _TOWER_BLOCK = _TOWER + "encoder.layers.{}.", "v.blk.{}."
# Published name -> GGUF's, without what follows (`.weight`, `.bias` or nothing); {} is a number.
TEXT_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    _LAYER + "input_layernorm": _BLOCK + "attn_norm",
    _LAYER + "post_attention_layernorm": _BLOCK + "ffn_norm",
    **{f"{_LAYER}self_attn.{name}_proj": f"{_BLOCK}attn_{name}" for name in "qkv"},
    **{f"{_LAYER}self_attn.{name}_norm": f"{_BLOCK}attn_{name}_norm" for name in "qk"},
    _LAYER + "self_attn.o_proj": _BLOCK + "attn_output",
    **{f"{_LAYER}mlp.{name}_proj": f"{_BLOCK}ffn_{name}" for name in ("gate", "up", "down")},
}
VISION_NAMES = {
    _TOWER + "embeddings.class_embedding": "v.class_embd",
    _TOWER + "embeddings.patch_embedding": "v.patch_embd",
    _TOWER + "embeddings.position_embedding": "v.position_embd",
    _TOWER + "pre_layrnorm": "v.pre_ln",
    _TOWER + "post_layernorm": "v.post_ln",
    _ENCODER + "layer_norm1": _TOWER_BLOCK + "ln1",
    _ENCODER + "layer_norm2": _TOWER_BLOCK + "ln2",
    **{f"{_ENCODER}self_attn.{name}_proj": f"{_TOWER_BLOCK}attn_{name}" for name in "qkv"},
    _ENCODER + "self_attn.out_proj": _TOWER_BLOCK + "attn_out",
    _ENCODER + "mlp.fc1": _TOWER_BLOCK + "ffn_up",
    _ENCODER + "mlp.fc2": _TOWER_BLOCK + "ffn_down",
    "model.mm_projector.{}": "mm.{}",
    "model.mm_projector": "mm.0",  # a single linear layer
    "model.image_newline": "v.image_newline",
}
# Spellings of earlier converters.
OLD_NAMES = {"model.image_newline": "v.image_newline", "mm.weight": "mm.0.weight", "mm.bias": "mm.0.bias"}


def is_vision(name: str) -> bool:
    """Whether a published tensor belongs in the file of tower and projector."""
    return ".vision_tower." in name or ".mm_projector." in name or name.endswith("image_newline")


def gguf_name(name: str) -> str | None:
    """The GGUF name of a published tensor; None where GGUF has none."""
    return _translated(name, VISION_NAMES if is_vision(name) else TEXT_NAMES)


def published_text_name(name: str) -> str | None:
    """The published name of a language model's tensor in a GGUF file."""
    return _translated(name, {theirs: ours for ours, theirs in TEXT_NAMES.items()})


def published_vision_name(name: str, *, is_linear: bool) -> str | None:
    """The published name of a tensor of tower or projector in a GGUF file; `is_linear`: the projector is a single layer."""
    dropped = "model.mm_projector.{}" if is_linear else "model.mm_projector"
    names = {theirs: ours for ours, theirs in VISION_NAMES.items() if ours != dropped}
    return _translated(OLD_NAMES.get(name, name), names)


def _translated(name: str, names: Mapping[str, str]) -> str | None:
    match = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name, re.DOTALL)  # damaged files have names with any character
    assert match is not None
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", match[1])
    found = names.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", match[1])) or names.get(match[1])
    return None if found is None else found.format(*numbers) + (match[2] or "")


def makes_features(name: str, projector: str) -> bool:
    """Whether a published tensor is of the layer that makes image features, or a feature itself.

    `projector` is the config's `mm_projector_type`.
    """
    layers = int(projector[3:].partition("x")[0]) if projector.startswith("mlp") else 0
    last = f"model.mm_projector.{2 * layers - 2}." if layers else "model.mm_projector."
    return name.startswith(last) or name == "model.image_newline"


def interleave(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head from two halves to pairs of neighbours."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def uninterleave(rows: Tensor, num_heads: int) -> Tensor:
    """Undo `interleave`."""
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
