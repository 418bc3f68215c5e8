"""The tensors of a GGUF file as a checkpoint in the original layout has them.

In: a `.gguf` file. Out: what it stores under published names, and the tensors, with rows in the order of published
checkpoints. The file format is read by file.py, names are translated by names.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llava.errors import InputError
from llava.model.checkpoints.gguf.config import OWN_PROJECTOR, SINGLE_LAYER, GgufKeys
from llava.model.checkpoints.gguf.file import GgufHeader, GgufTensor, read_gguf_header, read_gguf_tensor
from llava.model.checkpoints.gguf.names import (
    INTERLEAVED,
    ROPE_FACTORS,
    SHIFTED_NORMS,
    published_text_name,
    published_vision_name,
    uninterleave,
)

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "F16", "BF16")
LONGEST = 1024  # items of an array that is kept: all but those of a vocabulary
QUANTIZED_AS = "F16"  # how a quantized tensor counts, and is stored by a conversion unless asked otherwise
# A norm behind the features that are used, which converters leave out: in its place one that changes nothing.
MADE = {"v.post_ln.weight": 1.0, "v.post_ln.bias": 0.0}


class PublishedTensor(NamedTuple):
    """A tensor under its published name: its name in the file, its type once read, its shape, and where it begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int | None  # None where the bytes in the file are not the tensor's


@lru_cache(maxsize=8)
def _cached_header(file: Path, size: int, changed_ns: int) -> GgufHeader:
    return read_gguf_header(file, longest=LONGEST)


def gguf_header(file: Path) -> GgufHeader:
    """The header of a file, read again only if the file has changed."""
    if not file.is_file():
        raise InputError(f"the weight file {file} does not exist; put it back, or give the one that is meant")
    state = file.stat()
    return _cached_header(file, state.st_size, state.st_mtime_ns)


def is_mmproj(file: Path) -> bool:
    """Whether a GGUF file is that of a vision tower and projector."""
    return gguf_header(file).architecture == "clip"


def published_tensors(file: Path) -> dict[str, PublishedTensor]:
    """What a file stores, by published name; a tensor that has none keeps its own, and loading will refuse it."""
    header = gguf_header(file)
    names: dict[str, str] = {}
    projector = header.keys.get(OWN_PROJECTOR)
    is_linear = projector == "linear" or (projector is None and "mm.2.weight" not in header.tensors)
    is_swapped = _swaps_layers(header)
    for name in header.tensors:
        if name.startswith("mm.2.") and _halves(header, "mm.0.weight"):
            continue  # the layer that subtracts
        if is_mmproj(file):
            found = published_vision_name(_other_layer(name) if is_swapped else name, is_linear=is_linear)
        else:
            found = published_text_name(name)
        if name != ROPE_FACTORS:
            names[found or name] = name
    tensors = {
        published: PublishedTensor(name, _dtype(header, name), _shape(header, name), _start(header, name))
        for published, name in names.items()
    }
    if is_mmproj(file):
        width = header.tensors["v.patch_embd.weight"].shape[0]
        made = [name for name in MADE if name not in header.tensors]
        tensors |= {
            str(published_vision_name(n, is_linear=False)): PublishedTensor(n, "F32", (width,), None) for n in made
        }
    return tensors


def times(name: str, factor: float) -> str:
    """The name by which `GgufTensors` gives a tensor multiplied by a factor."""
    return f"{name}*{factor!r}"


class GgufTensors:
    """An open GGUF file, with the two methods of an open safetensors file; names are those in the file, or of `times`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.header = gguf_header(file)

    def keys(self) -> Iterable[str]:
        return self.header.tensors.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor; quantized and multiplied ones are computed in float32."""
        import torch

        name, _, factor = name.partition("*")
        if factor:
            return self.get_tensor(name).float() * float(factor)
        if name in MADE and name not in self.header.tensors:
            return torch.full(self.header.tensors["v.patch_embd.weight"].shape[:1], MADE[name])
        tensor = read_gguf_tensor(self.file, self.header.tensors[name])
        if _halves(self.header, name):
            return tensor[: len(tensor) // 2]
        if _is_shifted(self.header, name):
            return tensor.float() - 1
        heads = _heads(self.header, name)
        return tensor if heads is None else uninterleave(tensor, heads)


def _dtype(header: GgufHeader, name: str) -> str:
    kind = header.tensors[name].kind
    return "F32" if _is_shifted(header, name) else kind if kind in FLOATS else QUANTIZED_AS


def _shape(header: GgufHeader, name: str) -> tuple[int, ...]:
    shape = header.tensors[name].shape
    return (shape[0] // 2, *shape[1:]) if _halves(header, name) else shape


def _halves(header: GgufHeader, name: str) -> bool:
    """Whether a tensor holds a layer twice: a projector of a single layer, for which llama.cpp has no arithmetic."""
    return name.startswith("mm.0.") and header.keys.get(OWN_PROJECTOR) in SINGLE_LAYER


def _start(header: GgufHeader, name: str) -> int | None:
    tensor: GgufTensor = header.tensors[name]
    is_changed = _is_shifted(header, name) or _halves(header, name) or _heads(header, name) is not None
    return None if is_changed or tensor.kind not in FLOATS else tensor.start


def _is_shifted(header: GgufHeader, name: str) -> bool:
    return header.architecture in SHIFTED_NORMS and name.endswith("norm.weight")


def _heads(header: GgufHeader, name: str) -> int | None:
    """The number of heads whose rows are in another order; None: not this tensor."""
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", name)
    if match is None or header.architecture not in INTERLEAVED:
        return None
    keys = GgufKeys(header)
    heads = keys.count(f"{header.architecture}.attention.head_count")
    return heads if match[1] == "q" else keys.count(f"{header.architecture}.attention.head_count_kv", heads)


def _swaps_layers(header: GgufHeader) -> bool:
    """Whether a tower's two hidden layers have each other's name, as in files of converters before 2025."""
    up, patches = header.tensors.get("v.blk.0.ffn_up.weight"), header.tensors.get("v.patch_embd.weight")
    return up is not None and patches is not None and up.shape[1:] != patches.shape[:1]


def _other_layer(name: str) -> str:
    """The name with `ffn_up` and `ffn_down` exchanged."""
    return re.sub(r"ffn_(up|down)", lambda match: "ffn_down" if match[1] == "up" else "ffn_up", name)
