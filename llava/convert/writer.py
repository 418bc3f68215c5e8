"""Write tensors to safetensors shards, one at a time: the header of a file is known before its first tensor is computed.

In: `PlannedTensor`s, in the order in which they are written. Out: `model.safetensors`, or numbered shards with an index. A
tensor that does not change is copied from file to file in pieces.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tqdm import tqdm

from llava.errors import InputError
from llava.model.checkpoints.weight_files import DTYPE_BYTES, TORCH_DTYPES, TensorHeader

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 2**20  # bytes copied at once; four times as fast as 32 MiB, for which new memory is mapped every time
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a target. `make` computes it; `stored` is a tensor of the source with the same bytes, if there is one."""

    name: str
    dtype: str  # as in the safetensors format
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    stored: TensorHeader | None = None

    @property
    def num_bytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for side in self.shape:
            size *= side
        return size


class ByteProgress(tqdm):
    """A progress bar over bytes, shown on a terminal only."""

    def __init__(self, what: str, total: int) -> None:
        super().__init__(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None)


def write_shards(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: ByteProgress | None = None,
) -> None:
    """Write `model.safetensors`, or numbered shards of at most `shard_bytes` with an index."""
    shards = split(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], progress=progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, progress=progress)
        weight_map |= dict.fromkeys((planned.name for planned in shard), name)
    index = {
        "metadata": {"total_size": sum(planned.num_bytes for planned in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / "model.safetensors.index.json", index)


def split(tensors: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    """Split tensors into shards of at most `shard_bytes`; a larger tensor has a shard of its own."""
    if shard_bytes < 1:
        raise InputError(f"the size of a shard is {shard_bytes} bytes; give 1 or more")
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for planned in tensors:
        if shards[-1] and size + planned.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.num_bytes
    return shards


def write_safetensors(file: Path, tensors: Sequence[PlannedTensor], *, progress: ByteProgress | None = None) -> None:
    """Write one safetensors file, tensor by tensor."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for planned in tensors:
        header[planned.name] = {
            "dtype": planned.dtype,
            "shape": list(planned.shape),
            "data_offsets": [end, end + planned.num_bytes],
        }
        end += planned.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight bytes
    with file.open("wb", buffering=0) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for planned in tensors:
            if planned.stored is not None and planned.stored.start is not None:
                _copy(planned.stored, stream, progress)
            else:
                write_bytes(stream, tensor_bytes(planned))
                if progress is not None:
                    progress.update(planned.num_bytes)


def tensor_bytes(planned: PlannedTensor) -> memoryview:
    """Compute a planned tensor and return its bytes as they are stored."""
    import torch

    tensor = planned.make().to(getattr(torch, TORCH_DTYPES[planned.dtype])).contiguous()
    assert tuple(tensor.shape) == planned.shape, f"{planned.name}: {tuple(tensor.shape)}, planned {planned.shape}"
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_bytes(stream: IO[bytes], data: memoryview) -> None:
    """Write all of `data` to an unbuffered stream."""
    while data:  # the system writes at most 2 GiB at once
        data = data[stream.write(data) :]


def pieces(header: TensorHeader) -> Iterable[bytes]:
    """Read a stored tensor's bytes in pieces."""
    assert header.start is not None
    left = header.num_bytes
    with header.file.open("rb", buffering=0) as stream:
        stream.seek(header.start)
        while left:
            piece = stream.read(min(PIECE, left))
            if not piece:
                raise InputError(f"the weight file {header.file} ends within tensor {header.name!r}; copy it again")
            left -= len(piece)
            yield piece


def _copy(header: TensorHeader, stream: IO[bytes], progress: ByteProgress | None) -> None:
    for piece in pieces(header):
        write_bytes(stream, memoryview(piece))
        if progress is not None:
            progress.update(len(piece))


def write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
