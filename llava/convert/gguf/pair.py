"""The pair of GGUF files that llama.cpp reads: the language model, and the tower with its projector (`mmproj`).

In: a `Source` and a precision. Out: two files, written tensor by tensor with the gguf package; or an error that names the
feature which llama.cpp does not support. Names, keys and the order of query and key rows are those of llama.cpp's readers.
The tokenizer's fields are in tokenizer.py. The pair is verified here too, from the files alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from llava.convert.gguf.blocks import BLOCK, pack, unpack
from llava.convert.gguf.tokenizer import add_tokenizer, tokenizer_notes
from llava.convert.source import Source
from llava.convert.verify import (
    TensorComparison,
    Verification,
    VerificationError,
    compare_logits,
    largest_difference,
    make_sample,
    own_logits,
    require_same_names,
)
from llava.convert.writer import ByteProgress
from llava.errors import InputError, require
from llava.model.tokenizer_setup import context_len

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# The precisions, and the file type of a model whose matrices have that precision.
FILE_TYPES = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16", "f32": "ALL_F32"}

# Language models and the GGUF name of their architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Architectures whose rotary embedding rotates neighbouring elements where transformers rotates halves: rows are reordered.
INTERLEAVED = ("llama",)

TEXT_NAMES = (
    (r"model\.embed_tokens\.", "token_embd."),
    (r"model\.norm\.", "output_norm."),
    (r"lm_head\.", "output."),
    (r"model\.layers\.(\d+)\.input_layernorm\.", r"blk.\1.attn_norm."),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.", r"blk.\1.ffn_norm."),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.", r"blk.\1.attn_output."),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blk.\1.attn_\2."),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm\.", r"blk.\1.attn_\2_norm."),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"blk.\1.ffn_\2."),
)
TOWER = r"model\.vision_tower\.vision_tower\.vision_model\."
VISION_NAMES = (
    (TOWER + r"embeddings\.class_embedding$", "v.class_embd"),
    (TOWER + r"embeddings\.patch_embedding\.", "v.patch_embd."),
    (TOWER + r"embeddings\.position_embedding\.", "v.position_embd."),
    (TOWER + r"pre_layrnorm\.", "v.pre_ln."),
    (TOWER + r"encoder\.layers\.(\d+)\.layer_norm1\.", r"v.blk.\1.ln1."),
    (TOWER + r"encoder\.layers\.(\d+)\.layer_norm2\.", r"v.blk.\1.ln2."),
    (TOWER + r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"v.blk.\1.attn_out."),
    (TOWER + r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"v.blk.\1.attn_\2."),
    (TOWER + r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"v.blk.\1.ffn_up."),
    (TOWER + r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"v.blk.\1.ffn_down."),
    (r"model\.mm_projector\.(\d+)\.", r"mm.\1."),
    (r"model\.image_newline$", "v.image_newline"),
)
# Parts of a tower behind the layer whose features are used; llama.cpp would apply them if they were stored.
UNUSED = re.compile(TOWER + r"(post_layernorm|head)\.")


@dataclass(frozen=True)
class PlannedGgufTensor:
    """One tensor of a GGUF file, and the published name of the tensor that it is made of."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType


class GgufPair:
    """A target that is a pair of GGUF files."""

    def __init__(self, source: Source, *, precision: str = "f16") -> None:
        self.gguf = require("gguf", extra="gguf")
        self.source = source
        self.precision = precision
        _check_expressible(source)
        self.architecture = ARCHITECTURES[source.info.language_model]
        kept = [name for name in source.names if not UNUSED.match(name)]
        self.text = [self._entry(name) for name in kept if not is_vision(name)]
        self.vision = [self._entry(name) for name in kept if is_vision(name)]

    def _entry(self, name: str) -> PlannedGgufTensor:
        target, shape = gguf_name(name), self.source.shape(name)
        if target is None:
            raise InputError(f"GGUF has no name for tensor {name!r} of {self.source.folder}")
        return PlannedGgufTensor(target, name, shape, self._kind(target, shape))

    def _kind(self, target: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Choose a tensor's type: the precision asked for, except where llama.cpp computes in another one.

        Vectors and position tables are float32; the patch convolution is float16.
        """
        kinds = self.gguf.GGMLQuantizationType
        if len(shape) < 2 or target.startswith("v.position_embd"):
            return kinds.F32
        if self.precision == "q8_0" and (len(shape) != 2 or shape[-1] % BLOCK):
            return kinds.F16
        if len(shape) > 2 and self.precision == "bf16":
            return kinds.F16
        return kinds[self.precision.upper()]

    @property
    def num_bytes(self) -> int:
        return sum(self._size(entry) for entry in (*self.text, *self.vision))

    def _size(self, entry: PlannedGgufTensor) -> int:
        block, size = self.gguf.constants.GGML_QUANT_SIZES[entry.kind]
        return math.prod(entry.shape) // block * size

    def file_names(self) -> tuple[str, str]:
        name = f"{self.source.name}-{self.precision}.gguf"
        return name, f"mmproj-{name}"

    # Writing

    def write(self, folder: Path, progress: ByteProgress) -> None:
        text, vision = self.file_names()
        self._write(folder / text, self.architecture, self.text, self._describe_text, progress)
        self._write(folder / vision, "clip", self.vision, self._describe_vision, progress)

    def _write(
        self,
        file: Path,
        architecture: str,
        entries: list[PlannedGgufTensor],
        describe: Callable[[GGUFWriter], None],
        progress: ByteProgress,
    ) -> None:
        writer = self.gguf.GGUFWriter(file, architecture)
        writer.add_name(self.source.name)
        writer.add_file_type(self.gguf.LlamaFileType[FILE_TYPES[self.precision]])
        describe(writer)
        for entry in entries:  # the dtype argument is ignored where raw_dtype is given
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), self._size(entry), raw_dtype=entry.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            tensor, heads = self.source.read(entry.source), self._heads(entry)
            data = pack(self.gguf, tensor if heads is None else interleave(tensor, heads), entry.kind.name)
            writer.write_tensor_data(data)
            progress.update(data.nbytes)
        writer.close()

    def _heads(self, entry: PlannedGgufTensor) -> int | None:
        """The number of heads whose rows are reordered for the rotary embedding; None: not this tensor."""
        match = re.search(r"\.attn_([qk])\.", entry.name)
        if match is None or entry.name.startswith("v.") or self.architecture not in INTERLEAVED:
            return None
        config = self.source.model.config
        return config.num_attention_heads if match[1] == "q" else config.num_key_value_heads

    # Keys

    def _describe_text(self, writer: GGUFWriter) -> None:
        config = self.source.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = config.rope_parameters
        writer.add_type("model")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope.get("rope_type", "default") == "linear":
            writer.add_rope_scaling_type(self.gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        writer.add_vocab_size(config.vocab_size)
        add_tokenizer(writer, self.source)

    def _describe_vision(self, writer: GGUFWriter) -> None:
        source, tower = self.source, self.source.tower
        config, processor = tower.config, source.image_processor
        writer.add_type("mmproj")
        writer.add_clip_has_vision_encoder(True)
        writer.add_bool("clip.has_llava_projector", True)  # the key of releases before 2025
        writer.add_clip_projector_type("mlp")
        writer.add_vision_image_size(config.image_size)
        writer.add_vision_patch_size(config.patch_size)
        writer.add_vision_embedding_length(config.hidden_size)
        writer.add_vision_feed_forward_length(config.intermediate_size)
        writer.add_vision_projection_dim(source.model.config.hidden_size)
        writer.add_vision_block_count(config.num_hidden_layers)
        writer.add_vision_head_count(config.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
        writer.add_vision_image_mean([float(value) for value in processor.image_mean])
        writer.add_vision_image_std([float(value) for value in processor.image_std])
        writer.add_vision_use_gelu(config.hidden_act != "quick_gelu")
        layer = tower.hidden_state_index
        if layer != config.num_hidden_layers - 1:  # the default
            writer.add_array("clip.vision.feature_layer", [layer])
        if source.policy.mode == "anyres":
            writer.add_string("clip.vision.mm_patch_merge_type", source.policy.merge)
            writer.add_array(
                "clip.vision.image_grid_pinpoints", [side for size in source.policy.pinpoints for side in size]
            )

    def left_out(self) -> dict[str, tuple[str, ...]]:
        names = tuple(name for name in self.source.names if UNUSED.match(name))
        return {"parts of the vision tower behind the features": names} if names else {}

    def notes(self) -> list[str]:
        notes = tokenizer_notes(self.source)
        if self.source.tower.has_class_token:
            notes.append(
                "llama.cpp since May 2025 reads CLIP towers one patch off "
                "(https://github.com/ggml-org/llama.cpp/issues/25814): until that is fixed, answers about details differ"
            )
        if self.source.policy.mode == "anyres":
            notes.append(
                "llama.cpp concatenates the tiles of an image, without cutting padding off and without newlines, "
                "and gives small images no tiles: its answers about images differ from those of this model elsewhere"
            )
        elif self.source.policy.mode == "square":
            notes.append("llama.cpp pads images to squares, where this model was trained with their middle cut out")
        window = getattr(self.source.model.config, "sliding_window", None)
        if window and window < context_len(self.source.model.config):
            notes.append(f"llama.cpp does not apply this model's sliding window: prompts beyond {window} tokens differ")
        return notes

    # Verification

    def verify(self, folder: Path, *, logits: bool) -> Verification:
        """Read the files back and compare every tensor; logits are computed by our model with the weights of the files."""
        stored = self._read_back(folder)
        kept = [name for name in self.source.names if not UNUSED.match(name)]
        require_same_names(kept, stored)
        largest = max(largest_difference(self.source.read(name), stored[name]()) for name in kept)
        tensors = TensorComparison(len(kept), self.num_bytes, largest)
        if not math.isfinite(largest):
            raise InputError(
                f"some numbers of {self.source.folder} are beyond the range of {self.precision}; use --precision bf16"
            )
        if self.precision == "f32" and largest:
            raise VerificationError(f"tensors differ by {largest:.3g} in float32")
        if not logits:
            return Verification(tensors)
        sample = make_sample(self.source)
        ours = own_logits(self.source.model, self.source.meta_model.read, sample.inputs)

        def read(name: str) -> Tensor:
            return stored[name]() if name in stored else self.source.read(name)

        theirs = own_logits(self.source.model, read, sample.inputs)
        return Verification(tensors, compare_logits(ours, theirs, exact=tensors.is_exact))

    def _read_back(self, folder: Path) -> Mapping[str, Callable[[], Tensor]]:
        """Published name -> a function that reads the tensor from the pair, in our row order."""
        by_name = {entry.name: entry for entry in (*self.text, *self.vision)}
        readers = {}
        for file in self.file_names():
            for item in self.gguf.GGUFReader(folder / file).tensors:
                entry, shape = by_name.get(item.name), tuple(reversed(item.shape.tolist()))
                if entry is None or (shape, item.tensor_type) != (entry.shape, entry.kind):
                    raise VerificationError(
                        f"{file} holds {item.name!r} of shape {item.shape.tolist()}, which was not planned"
                    )
                readers[entry.source] = partial(self._unpacked, folder / file, int(item.data_offset), entry)
        return readers

    def _unpacked(self, file: Path, offset: int, entry: PlannedGgufTensor) -> Tensor:
        size = self._size(entry)
        data = np.fromfile(file, dtype=np.uint8, count=size, offset=offset)
        numbers = unpack(self.gguf, data, entry.kind.name, entry.shape)
        heads = self._heads(entry)
        return numbers if heads is None else uninterleave(numbers, heads)


def interleave(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head from two halves to pairs of neighbours."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def uninterleave(rows: Tensor, num_heads: int) -> Tensor:
    """Undo `interleave`."""
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str | None:
    """The GGUF name of a tensor; None where GGUF has none."""
    for pattern, replacement in VISION_NAMES if is_vision(name) else TEXT_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return None


def is_vision(name: str) -> bool:
    """Whether a tensor belongs in the file of tower and projector."""
    return ".vision_tower." in name or ".mm_projector." in name or name.endswith("image_newline")


def _check_expressible(source: Source) -> None:
    settings, tower = source.settings, source.tower
    rope = getattr(source.model.config, "rope_parameters", None) or {}
    unsupported = {
        f"a language model of type {source.info.language_model!r}": source.info.language_model not in ARCHITECTURES,
        f"a projector of type {settings.projector.type!r}": settings.projector.type != "mlp2x_gelu",
        "a tower with several scales (s2)": bool(settings.vision.s2_scales),
        f"mm_vision_select_feature {settings.vision.select_feature!r}": settings.vision.select_feature != "patch",
        f"a tower of type {tower.config.model_type!r}": tower.config.model_type
        not in ("clip_vision_model", "siglip_vision_model"),
        f"a position encoding of type {rope.get('rope_type')!r}": rope.get("rope_type", "default")
        not in ("default", "linear"),
    }
    source.require_supported("gguf", unsupported)
