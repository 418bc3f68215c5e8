"""Read GGUF files: their keys and tensor table without any library, and their tensors, one at a time.

In: a `.gguf` file. Out: `GgufHeader`, whose long arrays (a vocabulary) are counted and not kept unless asked for; tensors,
for which torch is imported. The format is little-endian: magic, version, counts, then key-value pairs, then names, shapes,
types and offsets of tensors, then their data. Files are not trusted: every count, length and offset is compared with the
file's size before memory is taken. What the keys and names mean is in config.py and names.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from llava.errors import InputError

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
MAX_STRING = 2**26
MAX_KEYS, MAX_TENSORS, MAX_SIDES = 2**16, 2**17, 4
MAX_ALIGNMENT = 2**20
WHOLE = 2**31  # as `longest`: every array is kept
# Value type -> its struct format.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Tensor type -> its name, elements per block, bytes per block; the types of published files.
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}


class GgufTensor(NamedTuple):
    shape: tuple[int, ...]  # as torch has it, the fastest side last
    kind: str
    num_bytes: int | None  # None for a kind that is not known here
    start: int  # byte offset in the file


@dataclass(frozen=True)
class GgufHeader:
    """Keys with their values (of a long array its length), and tensors by name."""

    file: Path
    keys: Mapping[str, object]
    tensors: Mapping[str, GgufTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture"))

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_gguf_header(file: Path, *, longest: int = 64) -> GgufHeader:
    """Read the header of a GGUF file; of an array of more than `longest` items the value is its length.

    Raises:
        InputError: The file is no GGUF file of a known version, or it is damaged.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise InputError(f"{file} is not a GGUF file: it does not begin with the letters GGUF")
            return _Reader(file, stream, longest).header()
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
        raise InputError(f"the header of {file} is damaged or cut short ({error}); copy it again") from error


class _Reader:
    """Reads one header. A number that cannot be right is an `OverflowError` with what it counts."""

    def __init__(self, file: Path, stream: BinaryIO, longest: int) -> None:
        self.file, self.stream, self.longest = file, stream, longest
        self.size = file.stat().st_size

    def header(self) -> GgufHeader:
        (version,) = self.unpack("I")
        if version not in (2, 3):
            raise InputError(f"{self.file} is of GGUF version {version}; versions 2 and 3 are known")
        num_tensors, num_keys = self.unpack("QQ")
        self.check("tensors", num_tensors, MAX_TENSORS)
        self.check("keys", num_keys, MAX_KEYS)
        keys: dict[str, object] = {}
        for _ in range(num_keys):
            name = self.string()
            if name in keys:
                raise OverflowError(f"the key {name!r} twice")
            keys[name] = self.value(self.unpack("I")[0])
        tables = [self.tensor() for _ in range(num_tensors)]
        return GgufHeader(self.file, keys, self.placed(tables, keys.get("general.alignment", 32)))

    def check(self, what: str, number: int, most: int) -> None:
        if number > most:
            raise OverflowError(f"{number} {what}")

    def unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack("<" + form, self.stream.read(struct.calcsize("<" + form)))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        self.check("bytes of text", length, min(MAX_STRING, self.size))
        text = self.stream.read(length)
        if len(text) < length:
            raise OverflowError("a text beyond the end")
        return text.decode()

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.unpack(SCALARS[kind])[0]
        (item,), (count,) = self.unpack("I"), self.unpack("Q")
        width = 8 if item == STRING else struct.calcsize("<" + SCALARS[item])  # of a text, its length alone
        self.check("items of an array", count, (self.size - self.stream.tell()) // width)
        if item == STRING:
            texts = [self.string() for _ in range(count)]
            return texts if count <= self.longest else count
        if count > self.longest:
            self.stream.seek(count * width, 1)
            return count
        return list(self.unpack(f"{count}{SCALARS[item]}"))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (num_sides,) = self.unpack("I")
        self.check("dimensions of a tensor", num_sides, MAX_SIDES)
        sides = self.unpack(f"{num_sides}Q")
        kind, offset = self.unpack("IQ")
        return name, tuple(reversed(sides)), kind, offset

    def placed(self, tables: list[tuple[str, tuple[int, ...], int, int]], alignment: object) -> dict[str, GgufTensor]:
        """Compute where each tensor's data begin, and check that they lie within the file."""
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise OverflowError(f"an alignment of {alignment} bytes")
        data = -(-self.stream.tell() // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in tables:
            label, block, size = KINDS.get(kind, (f"kind {kind}", 0, 0))
            if name in tensors:
                raise OverflowError(f"the tensor {name!r} twice")
            if block and shape and shape[-1] % block:
                raise OverflowError(f"a row of {shape[-1]} elements of type {label} in {name!r}")
            num_bytes = math.prod(shape) // block * size if block else None
            tensors[name] = GgufTensor(shape, label, num_bytes, data + offset)
        last = max(tensors, key=lambda name: _end(tensors[name]), default=None)
        if last is not None and _end(tensors[last]) > self.size:
            raise InputError(
                f"{self.file} is truncated: tensor {last!r} {list(tensors[last].shape)} ends at byte {_end(tensors[last])} "
                f"and the file has {self.size}; copy it again"
            )
        return tensors


def _end(tensor: GgufTensor) -> int:
    return tensor.start + (tensor.num_bytes or 0)


def read_gguf_tensor(file: Path, tensor: GgufTensor) -> torch.Tensor:
    """Read a tensor's numbers: those of F32, F16 and BF16 as stored, quantized ones in float32."""
    import torch

    from llava.model.checkpoints.gguf.blocks import dequantize

    if tensor.num_bytes is None:
        known = ", ".join(name for name, _, _ in KINDS.values())
        raise InputError(f"{file} stores tensors of {tensor.kind}, which is not known; known: {known}")
    stored = torch.empty(tensor.num_bytes, dtype=torch.uint8)
    with file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        target = memoryview(stored.numpy())
        while target:  # the system reads at most 2 GiB at once
            count = stream.readinto(target)
            if not count:
                raise InputError(f"{file} ends within a tensor; copy it again")
            target = target[count:]
    return dequantize(stored, tensor.kind, tensor.shape)
