"""The pair of GGUF files that llama.cpp reads: the language model, and the tower with its projector (`mmproj`).

In: a `Source` and a precision. Out: two files, written tensor by tensor with the gguf package; or an error that names the
feature which llama.cpp does not support. Names, keys and the order of query and key rows are those of llama.cpp's readers.
The tokenizer's fields are in tokenizer.py. The pair is verified here too, from the files alone.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llava.convert.gguf.blocks import BLOCK, pack
from llava.convert.gguf.tokenizer import add_tokenizer, tokenizer_notes
from llava.convert.source import Source, chat_command
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
from llava.model.checkpoints.gguf.blocks import dequantize
from llava.model.checkpoints.gguf.config import (
    OWN_BEFORE,
    OWN_LENGTH,
    OWN_PROJECTOR,
    OWN_STRIDE,
    OWN_TYPE,
    PROJECTORS,
    SINGLE_LAYER,
    VIDEO_TEXTS,
    llama_3_factors,
)
from llava.model.checkpoints.gguf.names import (
    ARCHITECTURE_OF,
    INTERLEAVED,
    ROPE_FACTORS,
    SCALED_FEATURES,
    SHIFTED_NORMS,
    gguf_name,
    interleave,
    is_vision,
    makes_features,
    uninterleave,
)
from llava.model.config import SHARED_TOWER_TYPES
from llava.model.tokenizer_setup import context_len

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedConfig

# The precisions, and the file type of a model whose matrices have that precision.
FILE_TYPES = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16", "f32": "ALL_F32"}

ROPE_TYPES = ("default", "linear", "llama3")
# Parts of a tower behind the layer whose features are used; llama.cpp would apply them if they were stored.
UNUSED = re.compile(r"model\.vision_tower\.vision_tower\.vision_model\.(post_layernorm|head)\.")


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
        self.architecture = ARCHITECTURE_OF[source.info.language_model]
        kept = [name for name in source.names if not UNUSED.match(name)]
        self.text = [self._entry(name) for name in kept if not is_vision(name)]
        config = source.model.config
        if config.rope_parameters.get("rope_type") == "llama3":
            shape = (_head_dim(config) // 2,)
            self.text.insert(0, PlannedGgufTensor(ROPE_FACTORS, ROPE_FACTORS, shape, self._kind(ROPE_FACTORS, shape)))
        self.vision = [self._entry(name) for name in kept if is_vision(name)]
        if self.is_single_layer:
            self.vision += self._second_layer()

    def _entry(self, name: str) -> PlannedGgufTensor:
        target, shape = gguf_name(name), self.source.shape(name)
        if target is None:
            raise InputError(f"GGUF has no name for tensor {name!r} of {self.source.folder}")
        if target.startswith("mm.") and self.is_single_layer:
            shape = (2 * shape[0], *shape[1:])
        return PlannedGgufTensor(target, name, shape, self._kind(target, shape))

    @property
    def is_single_layer(self) -> bool:
        """Whether the projector is a single linear layer, which llama.cpp does not compute.

        It is stored as two: as GELU(x) - GELU(-x) is x, the first makes x and -x, and the second subtracts them.
        """
        return self.source.settings.projector.type in SINGLE_LAYER

    def _second_layer(self) -> list[PlannedGgufTensor]:
        width, kinds = self.source.model.config.hidden_size, self.gguf.GGMLQuantizationType
        return [
            PlannedGgufTensor("mm.2.weight", "", (width, 2 * width), kinds.F16),
            PlannedGgufTensor("mm.2.bias", "", (width,), kinds.F32),
        ]

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
            data = pack(self.gguf, self._stored(entry), entry.kind.name)
            writer.write_tensor_data(data)
            progress.update(data.nbytes)
        writer.close()

    def _stored(self, entry: PlannedGgufTensor) -> Tensor:
        """The tensor as llama.cpp expects it: with its rows reordered, or one added to a norm."""
        if entry.source == ROPE_FACTORS:
            return self._rope_factors()
        if not entry.source:
            return _difference_layer(entry.shape)
        tensor, heads = self.source.read(entry.source), self._heads(entry)
        if self._is_scaled(entry):
            tensor = tensor.float() / self._feature_scale
        if entry.name.startswith("mm.") and self.is_single_layer:
            return torch.cat([tensor, -tensor])
        if self._is_shifted(entry):
            return tensor.float() + 1
        return tensor if heads is None else interleave(tensor, heads)

    @property
    def _feature_scale(self) -> float:
        return float(self.source.model.config.hidden_size) ** 0.5

    def _is_scaled(self, entry: PlannedGgufTensor) -> bool:
        is_there = self.architecture in SCALED_FEATURES
        return is_there and makes_features(entry.source, self.source.settings.projector.type)

    def _is_shifted(self, entry: PlannedGgufTensor) -> bool:
        return self.architecture in SHIFTED_NORMS and entry.name.endswith("norm.weight")

    def _rope_factors(self) -> Tensor:
        config = self.source.model.config
        return torch.tensor(
            llama_3_factors(config.rope_parameters["rope_theta"], _head_dim(config), config.rope_parameters)
        )

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
        head_dim, rope = _head_dim(config), config.rope_parameters
        writer.add_type("model")
        writer.add_string(OWN_TYPE, self.source.info.language_model)
        if length := self.source.config.get("tokenizer_model_max_length"):
            writer.add_uint32(OWN_LENGTH, length)
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
        writer.add_string(OWN_PROJECTOR, source.settings.projector.type)
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
        writer.add_array("clip.vision.feature_layer", tower.hidden_state_indices)
        writer.add_string("clip.vision.image_aspect_ratio", source.settings.image.aspect_ratio)
        if source.policy.mode == "anyres":
            writer.add_string("clip.vision.mm_patch_merge_type", source.policy.merge)
            writer.add_array(
                "clip.vision.image_grid_pinpoints", [side for size in source.policy.pinpoints for side in size]
            )

        self._describe_videos(writer)

    def _describe_videos(self, writer: GGUFWriter) -> None:
        """Write how frames are reduced, for reading the pair back; llama.cpp takes no videos for these models."""
        video = self.source.settings.video
        for key, name in VIDEO_TEXTS.items():
            writer.add_string(f"llava.{key}", getattr(video, name))
        writer.add_uint32(OWN_STRIDE, video.stride)
        writer.add_bool(OWN_BEFORE, video.before_projector)

    def left_out(self) -> dict[str, tuple[str, ...]]:
        names = tuple(name for name in self.source.names if UNUSED.match(name))
        return {"parts of the vision tower behind the features": names} if names else {}

    def commands(self, target: Path) -> list[str]:
        text, vision = (shlex.quote(str(target / name)) for name in self.file_names())
        return [chat_command(target), f"llama-mtmd-cli -m {text} --mmproj {vision} --jinja --image IMAGE -p QUESTION"]

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
        self._verify_rope_factors(stored.pop(ROPE_FACTORS, None))
        for name in [name for name in stored if name.startswith("mm.2.")]:
            stored.pop(name)()
        kept = [name for name in self.source.names if not UNUSED.match(name)]
        require_same_names(kept, stored)
        largest = max(largest_difference(self.source.read(name), stored[name]()) for name in kept)
        tensors = TensorComparison(len(kept), self.num_bytes, largest)
        if not math.isfinite(largest):
            raise InputError(
                f"some numbers of {self.source.folder} are beyond the range of {self.precision}; use --precision bf16"
            )
        # One added and taken away again, or a factor, rounds what it is applied to.
        if self.precision == "f32" and largest > (1e-5 if self.architecture in SHIFTED_NORMS else 0):
            raise VerificationError(f"tensors differ by {largest:.3g} in float32")
        if not logits:
            return Verification(tensors)
        sample = make_sample(self.source)
        ours = own_logits(self.source.model, self.source.meta_model.read, sample.inputs)

        def read(name: str) -> Tensor:
            return stored[name]() if name in stored else self.source.read(name)

        theirs = own_logits(self.source.model, read, sample.inputs)
        return Verification(tensors, compare_logits(ours, theirs, exact=tensors.is_exact))

    def _verify_rope_factors(self, read: Callable[[], Tensor] | None) -> None:
        if read is not None and not torch.equal(read(), self._rope_factors()):
            raise VerificationError(f"tensor {ROPE_FACTORS!r} has other numbers than the config says")

    def _read_back(self, folder: Path) -> dict[str, Callable[[], Tensor]]:
        """Published name -> a function that reads the tensor from the pair, in our row order."""
        by_name = {entry.name: entry for entry in (*self.text, *self.vision)}
        readers: dict[str, Callable[[], Tensor]] = {}
        for file in self.file_names():
            for item in self.gguf.GGUFReader(folder / file).tensors:
                entry, shape = by_name.get(item.name), tuple(reversed(item.shape.tolist()))
                if entry is None or (shape, item.tensor_type) != (entry.shape, entry.kind):
                    raise VerificationError(
                        f"{file} holds {item.name!r} of shape {item.shape.tolist()}, which was not planned"
                    )
                readers[entry.source or entry.name] = partial(
                    self._unpacked, folder / file, int(item.data_offset), entry
                )
        return readers

    def _unpacked(self, file: Path, offset: int, entry: PlannedGgufTensor) -> Tensor:
        size = self._size(entry)
        data = np.fromfile(file, dtype=np.uint8, count=size, offset=offset)
        numbers = dequantize(torch.from_numpy(data), entry.kind.name, entry.shape).float()
        if not entry.source and not torch.equal(numbers, _difference_layer(entry.shape)):
            raise VerificationError(f"tensor {entry.name!r} is not the layer that subtracts")
        if entry.name.startswith("mm.") and self.is_single_layer and entry.source:
            numbers, negative = numbers.chunk(2)
            if not torch.equal(numbers, -negative):
                raise VerificationError(f"the halves of tensor {entry.name!r} are not each other's negative")
        if self._is_scaled(entry):
            return numbers * self._feature_scale
        if self._is_shifted(entry):
            return numbers - 1
        heads = self._heads(entry)
        return numbers if heads is None else uninterleave(numbers, heads)


def _difference_layer(shape: tuple[int, ...]) -> Tensor:
    """Weight or bias of the layer that subtracts the second half of its input from the first."""
    if len(shape) == 1:
        return torch.zeros(shape)
    one = torch.eye(shape[0])
    return torch.cat([one, -one], dim=1)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_expressible(source: Source) -> None:
    settings, tower = source.settings, source.tower
    rope = getattr(source.model.config, "rope_parameters", None) or {}
    unsupported = {
        f"a language model of type {source.info.language_model!r}": source.info.language_model not in ARCHITECTURE_OF,
        f"a projector of type {settings.projector.type!r}": settings.projector.type not in PROJECTORS,
        "a tower with several scales (s2)": bool(settings.vision.s2_scales),
        "features of several layers of the tower": not isinstance(settings.vision.select_layer, int),
        f"mm_vision_select_feature {settings.vision.select_feature!r}": settings.vision.select_feature != "patch",
        f"a tower of type {tower.config.model_type!r}": tower.config.model_type not in SHARED_TOWER_TYPES,
        f"image_aspect_ratio {settings.image.mode!r}": settings.image.mode in ("highres", "crop_split"),
        "mm_patch_merge_type with maxpool2x2 or nobase": settings.image.pools or not settings.image.keeps_overview,
        "add_faster_video": settings.video.slow_every is not None,
        f"a position encoding of type {rope.get('rope_type')!r}": rope.get("rope_type", "default") not in ROPE_TYPES,
    }
    source.require_supported("gguf", unsupported)
