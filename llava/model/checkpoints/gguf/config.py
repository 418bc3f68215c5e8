"""The config of a model whose weights are a pair of GGUF files: the language model, and the tower with its projector.

In: the headers of both. Out: `GgufConfig`: a config.json in the original layout, the tower's config and the settings of its
image processor. Sizes are those of the tensors, and keys that disagree with them are refused, so that no model is built
larger than its files. Keys are read in all spellings of llama.cpp's converters; what they do not say is noted at its default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.errors import InputError
from llava.images.image_processor import CLIP_MEAN, CLIP_STD, TOWER_IMAGE_PROCESSORS
from llava.model.checkpoints.gguf.file import GgufHeader, GgufTensor
from llava.model.checkpoints.gguf.names import ARCHITECTURES, ROPE_FACTORS

TOWER_FOLDER = "vision_tower"
# The layers of the public towers, by their width: a file with fewer of them holds those that are used, and no more.
WHOLE_TOWERS = {768: 12, 1024: 24, 1152: 27}
# Llama 3's position encoding: (factor for short wave lengths, for long ones, positions before it was extended).
LLAMA_3_ROPE = (1.0, 4.0, 8192)

# What GGUF has no key for; written by convert/gguf/pair.py, and absent in files of other converters.
OWN_TYPE, OWN_PROJECTOR = "llava.language_model", "llava.mm_projector_type"
OWN_LENGTH, OWN_LEGACY = "llava.tokenizer_model_max_length", "llava.tokenizer.legacy"
# How videos are reduced: keys of the config, stored as `llava.KEY`, and the fields of the `VideoPolicy`.
VIDEO_TEXTS = {"mm_spatial_pool_mode": "pool", "mm_newline_position": "newline"}
OWN_STRIDE, OWN_BEFORE = "llava.mm_spatial_pool_stride", "llava.mm_spatial_pool_before_projector"
SINGLE_LAYER = ("linear", "mlp1x_gelu")  # projectors that the writer stores as two layers
PROJECTORS = ("mlp2x_gelu", *SINGLE_LAYER)  # that are written


@dataclass(frozen=True)
class GgufConfig:
    """`values` is a config.json in the original layout."""

    values: dict[str, Any]
    tower: dict[str, Any]
    image_processor: dict[str, Any]


@dataclass(frozen=True)
class GgufKeys:
    """The keys of a header by type; a value of another type is an `InputError`."""

    header: GgufHeader

    def number(self, key: str, default: float | None = None) -> float:
        value = self.header.keys.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError(f"{self.header.file} has {key} {value!r}; it must be a number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or not 0 < value < 2**31:
            raise InputError(f"{self.header.file} has {key} {value!r}; it must be a whole number above 0")
        return int(value)

    def text(self, key: str, default: str = "") -> str:
        value = self.header.keys.get(key, default)
        if not isinstance(value, str):
            raise InputError(f"{self.header.file} has {key} {value!r}; it must be text")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.header.keys.get(key, default))

    def numbers(self, key: str, default: Sequence[float] = ()) -> list[Any]:
        value = self.header.keys.get(key, list(default))
        if not isinstance(value, list) or not all(isinstance(item, (int, float)) for item in value):
            raise InputError(f"{self.header.file} has {key} {value!r}; it must be a short list of numbers")
        return value

    def tensor(self, name: str) -> GgufTensor:
        if name not in self.header.tensors:
            raise InputError(f"{self.header.file} has no tensor {name!r}; it is not complete, or another kind of model")
        return self.header.tensors[name]

    def agree(self, key: str, value: int, tensor: str, size: int) -> int:
        """Check a size that a key gives against that of a tensor."""
        if value != size:
            raise InputError(
                f"{self.header.file} has {key} {value}, but tensor {tensor!r} has {size} there; the file is damaged"
            )
        return value

    def num_blocks(self, prefix: str) -> int:
        """The number of layers whose tensors are stored."""
        numbers = {int(m[1]) for name in self.header.tensors if (m := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
        if numbers != set(range(len(numbers))):
            raise InputError(f"{self.header.file} lacks tensors of a layer; copy it again")
        return len(numbers)


def language_model_of(header: GgufHeader) -> str:
    """The type of the language model, as transformers names it.

    Raises:
        InputError: It is none that is read here.
    """
    if header.architecture not in ARCHITECTURES:
        raise InputError(
            f"{header.file} holds a language model of architecture {header.architecture!r}; known: "
            f"{', '.join(ARCHITECTURES)}; run others with llama.cpp"
        )
    known, keys = ARCHITECTURES[header.architecture], GgufKeys(header)
    own = keys.text(OWN_TYPE)
    if own in known:
        return own
    # LLaMA and Mistral are one architecture here. Their weights are used alike; the type decides the prompt.
    names = f"{header.file.name} {keys.text('general.name')} {keys.text('general.basename')}".lower()
    return next((kind for kind in known[1:] if kind in names), known[0])


def read_gguf_config(text: GgufHeader, vision: GgufHeader, rope_factors: Sequence[float] | None) -> GgufConfig:
    """Build the config of a pair; `rope_factors` are the numbers of the language model's `ROPE_FACTORS`, if it has any."""
    tower, layer = _tower_config(vision)
    language = _language_config(text, rope_factors)
    keys = GgufKeys(vision)
    pinpoints = [int(side) for side in keys.numbers("clip.vision.image_grid_pinpoints")]
    if len(pinpoints) % 2:
        raise InputError(f"{vision.file} has clip.vision.image_grid_pinpoints {pinpoints}; it must hold pairs")
    values = language | _projector(vision, tower["hidden_size"], language["hidden_size"])
    values |= {
        "mm_vision_tower": TOWER_FOLDER,
        "unfreeze_mm_vision_tower": True,
        "mm_vision_select_layer": layer - tower["num_hidden_layers"] - 1,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "mm_patch_merge_type": keys.text("clip.vision.mm_patch_merge_type", "flat"),
        "image_aspect_ratio": keys.text("clip.vision.image_aspect_ratio", "anyres" if pinpoints else "pad"),
    }
    values |= {key: keys.text(f"llava.{key}") for key in VIDEO_TEXTS if f"llava.{key}" in vision.keys}
    if OWN_STRIDE in vision.keys:
        values["mm_spatial_pool_stride"] = keys.count(OWN_STRIDE)
    if keys.flag(OWN_BEFORE):
        values["mm_spatial_pool_before_projector"] = True
    if pinpoints:
        values["image_grid_pinpoints"] = [pinpoints[at : at + 2] for at in range(0, len(pinpoints), 2)]
    return GgufConfig(values, tower, _image_processor(keys, tower))


# --- the language model -----------------------------------------------------------------------------------------------


def _language_config(header: GgufHeader, rope_factors: Sequence[float] | None) -> dict[str, Any]:
    kind, name, keys = language_model_of(header), header.architecture, GgufKeys(header)
    rows, width = _matrix(keys, "token_embd.weight")
    heads = keys.count(f"{name}.attention.head_count")
    key_heads = keys.count(f"{name}.attention.head_count_kv", heads)
    head_dim = keys.count(f"{name}.attention.key_length", max(1, width // heads))
    keys.agree(f"{name}.embedding_length", keys.count(f"{name}.embedding_length"), "token_embd.weight", width)
    blocks = keys.num_blocks("blk.")
    keys.agree(f"{name}.block_count", keys.count(f"{name}.block_count"), "blk.*", blocks)
    inner = keys.count(f"{name}.feed_forward_length")
    keys.agree(f"{name}.feed_forward_length", inner, "blk.0.ffn_up.weight", _matrix(keys, "blk.0.ffn_up.weight")[0])
    for letter, number in (("q", heads), ("k", key_heads)):
        tensor = f"blk.0.attn_{letter}.weight"
        keys.agree("attention heads", number * head_dim, tensor, _matrix(keys, tensor)[0])
    positions = keys.count(f"{name}.context_length", 2048)
    values: dict[str, Any] = {
        "model_type": f"llava_{kind}",
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _short(keys.number(f"{name}.attention.layer_norm_rms_epsilon", 1e-6)),
        "max_position_embeddings": positions,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _rope(keys, head_dim, rope_factors),
    }
    if kind in ("llama", "mistral"):
        values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        values["sliding_window"] = None
    for token in ("bos", "eos"):
        if (key := f"tokenizer.ggml.{token}_token_id") in header.keys:
            values[f"{token}_token_id"] = int(keys.number(key))
    if OWN_LENGTH in header.keys:
        values["tokenizer_model_max_length"] = keys.count(OWN_LENGTH)
    else:
        values["max_sequence_length"] = positions  # no other key says how long the model was trained
    return values


def _matrix(keys: GgufKeys, name: str) -> tuple[int, int]:
    shape = keys.tensor(name).shape
    if len(shape) != 2:
        raise InputError(f"{keys.header.file}: tensor {name!r} has shape {list(shape)}, and should be a matrix")
    return shape[0], shape[1]


def _rope(keys: GgufKeys, head_dim: int, factors: Sequence[float] | None) -> dict[str, Any]:
    name = keys.header.architecture
    base = _short(keys.number(f"{name}.rope.freq_base", 10000.0))
    rotated = keys.count(f"{name}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise InputError(
            f"{keys.header.file} rotates {rotated} of {head_dim} dimensions of a head, which is not supported"
        )
    if factors is not None and set(factors) != {1.0}:
        return llama_3_rope(factors, base) | {"rope_theta": base}
    kind = keys.text(f"{name}.rope.scaling.type", "none")
    old = keys.number(f"{name}.rope.scale_linear", 1.0)
    factor = keys.number(f"{name}.rope.scaling.factor", old)
    if kind not in ("none", "linear"):
        raise InputError(f"{keys.header.file} scales positions by {kind!r}; known: none, linear, and Llama 3's factors")
    if factor in (0.0, 1.0):
        return {"rope_type": "default", "rope_theta": base}
    return {"rope_type": "linear", "rope_theta": base, "factor": factor}


def llama_3_factors(base: float, head_dim: int, rope: dict[str, Any]) -> list[float]:
    """By how much Llama 3 divides each frequency of its position encoding.

    `rope` are the config's `rope_parameters`.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    positions, factor = rope["original_max_position_embeddings"], rope["factor"]
    factors = []
    for index in range(head_dim // 2):
        waves = positions / (2 * math.pi * base ** (2 * index / head_dim))  # of this frequency, in the first training
        smooth = min(1.0, max(0.0, (waves - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def llama_3_rope(factors: Sequence[float], base: float) -> dict[str, Any]:
    """The `rope_parameters` of which `llama_3_factors` makes these factors.

    The numbers follow from the factors but for one, which is 1 in every published model. A head of few dimensions may have
    fewer than two factors between the ends; the numbers are then those of Llama 3 as far as they make these factors.
    """
    head_dim, factor = 2 * len(factors), max(factors)
    if factor <= 1 or min(factors) < 1:
        raise InputError(f"the factors in {ROPE_FACTORS!r} are not those of Llama 3's position encoding")
    low, high, positions = LLAMA_3_ROPE
    frequencies = [1 / (2 * math.pi * base ** (2 * index / head_dim)) for index in range(len(factors))]
    between = [
        ((1 / value - 1 / factor) / (1 - 1 / factor), frequency)
        for value, frequency in zip(factors, frequencies, strict=True)
        if 1.0001 < value < factor * 0.9999
    ]
    if len(between) > 1:  # smooth = slope * frequency - low / (high - low)
        (first, a), (last, b) = between[0], between[-1]
        slope = (first - last) / (a - b)
        high = low + low / (slope * a - first)
        positions = round(slope * (high - low))
    elif between:
        smooth, frequency = between[0]
        positions = round((low + smooth * (high - low)) / frequency)
    elif kept := [frequency for value, frequency in zip(factors, frequencies, strict=True) if value <= 1.0001]:
        changed = max((f for value, f in zip(factors, frequencies, strict=True) if value > 1.0001))
        fits = positions * min(kept) >= high and positions * changed <= low
        positions = positions if fits else math.ceil(high / min(kept))
    rope = {
        "rope_type": "llama3",
        "factor": _short(factor),
        "low_freq_factor": low,
        "high_freq_factor": float(f"{high:.4g}"),
        "original_max_position_embeddings": positions,
    }
    expected = llama_3_factors(base, head_dim, rope)
    if any(abs(ours - theirs) > 1e-3 * theirs for ours, theirs in zip(expected, factors, strict=True)):
        raise InputError(f"the factors in {ROPE_FACTORS!r} are not those of Llama 3's position encoding")
    return rope


def _short(number: float) -> float:
    """A number that was stored in single precision, as it was written before."""
    return float(f"{number:.7g}")


# --- the tower and the projector --------------------------------------------------------------------------------------


def _tower_config(header: GgufHeader) -> tuple[dict[str, Any], int]:
    """The tower's config, and the index of the hidden state that is used."""
    keys = GgufKeys(header)
    if header.architecture != "clip" or not keys.flag("clip.has_vision_encoder", True):
        raise InputError(f"{header.file} is of architecture {header.architecture!r} and holds no vision tower")
    patch = keys.tensor("v.patch_embd.weight").shape
    if len(patch) != 4 or patch[2] != patch[3]:
        raise InputError(
            f"{header.file}: tensor 'v.patch_embd.weight' has shape {list(patch)}; known: (width, 3, side, side)"
        )
    width, blocks = patch[0], keys.num_blocks("v.blk.")
    is_clip = "v.class_embd" in header.tensors
    heads = keys.count("clip.vision.attention.head_count")
    inner = keys.count("clip.vision.feed_forward_length")
    side, step = keys.count("clip.vision.image_size"), keys.count("clip.vision.patch_size")
    keys.agree("clip.vision.embedding_length", keys.count("clip.vision.embedding_length"), "v.patch_embd.weight", width)
    keys.agree("clip.vision.patch_size", step, "v.patch_embd.weight", patch[3])
    keys.agree("clip.vision.block_count", keys.count("clip.vision.block_count"), "v.blk.*", blocks)
    keys.agree("clip.vision.feed_forward_length", inner, "v.blk.0.ffn_up.bias", _inner_size(keys, width))
    positions = _matrix(keys, "v.position_embd.weight")[0]
    keys.agree("positions", (side // step) ** 2 + is_clip, "v.position_embd.weight", positions)
    if width % heads:
        raise InputError(f"{header.file} has clip.vision.attention.head_count {heads}, which does not divide {width}")
    if keys.flag("clip.use_silu"):
        raise InputError(f"{header.file} has a tower with the activation SiLU, which neither CLIP nor SigLIP has")
    kind = "clip_vision_model" if is_clip else "siglip_vision_model"
    plain = "gelu" if is_clip else "gelu_pytorch_tanh"
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": step,
        "layer_norm_eps": _short(keys.number("clip.vision.attention.layer_norm_epsilon", 1e-5)),
        "hidden_act": plain if keys.flag("clip.use_gelu") or not is_clip else "quick_gelu",
    }
    if not is_clip:
        config["vision_use_head"] = False  # pools the features, which LLaVA does not use
    return config, _layer_used(keys, width, blocks)


def _inner_size(keys: GgufKeys, width: int) -> int:
    """The size of the tower's hidden layers, which some files have under the other's name."""
    up, down = keys.tensor("v.blk.0.ffn_up.bias").shape, keys.tensor("v.blk.0.ffn_down.bias").shape
    return int(next((shape[0] for shape in (up, down) if len(shape) == 1 and shape[0] != width), width))


def _layer_used(keys: GgufKeys, width: int, blocks: int) -> int:
    """The index of the hidden state that the projector reads, 0 being the input of the first layer."""
    layers = keys.numbers("clip.vision.feature_layer")
    if len(layers) > 1:
        raise InputError(f"{keys.header.file} joins the vision layers {layers}; only a single one is supported")
    if layers:
        layer = int(layers[0])
        if not 0 <= layer <= blocks:
            raise InputError(f"{keys.header.file} has clip.vision.feature_layer {layer}, but {blocks} layers")
        return layer
    return blocks - 1 if WHOLE_TOWERS.get(width) == blocks else blocks


def _projector(header: GgufHeader, tower_width: int, text_width: int) -> dict[str, Any]:
    keys = GgufKeys(header)
    kind = keys.text("clip.vision.projector_type", keys.text("clip.projector_type", "mlp"))
    numbers = sorted({int(m[1]) for name in header.tensors if (m := re.fullmatch(r"mm\.(\d+)\.weight", name))})
    first = "mm.0.weight"
    if not numbers and "mm.weight" in header.tensors:
        numbers, first = [0], "mm.weight"
    if kind != "mlp" or not numbers or numbers != list(range(0, 2 * len(numbers), 2)):
        found = f"of type {kind!r}" if kind != "mlp" else f"with the layers {numbers}"
        raise InputError(
            f"{header.file} has a projector {found}; only LLaVA's are read, which are linear layers with GELU between them"
        )
    last = _matrix(keys, first if len(numbers) == 1 else f"mm.{numbers[-1]}.weight")[0]
    if last != text_width:
        raise InputError(
            f"the projector in {header.file} makes features of {last} numbers, and the language model takes {text_width}; the "
            "two files do not belong together"
        )
    keys.agree("clip.vision.embedding_length", tower_width, first, _matrix(keys, first)[1])
    own = keys.text(OWN_PROJECTOR)
    name = own if own in SINGLE_LAYER else "linear" if len(numbers) == 1 else f"mlp{len(numbers)}x_gelu"
    return {"mm_projector_type": name, "mm_hidden_size": tower_width}


def _image_processor(keys: GgufKeys, tower: dict[str, Any]) -> dict[str, Any]:
    side = tower["image_size"]
    is_clip = tower["model_type"] == "clip_vision_model"
    values: dict[str, Any] = {
        "image_processor_type": TOWER_IMAGE_PROCESSORS[tower["model_type"]],
        "image_mean": [_short(value) for value in keys.numbers("clip.vision.image_mean", CLIP_MEAN)],
        "image_std": [_short(value) for value in keys.numbers("clip.vision.image_std", CLIP_STD)],
    }
    size = {"height": side, "width": side}
    return values | ({"size": {"shortest_edge": side}, "crop_size": size} if is_clip else {"size": size})
