"""Read the header of a GGUF file, its keys and tensor table, without any library.

In: a `.gguf` file. Out: `GgufHeader`. Long arrays (a vocabulary) are counted and not kept unless asked for. The format is
little-endian: magic, version, counts, then key-value pairs, then names, shapes and types of tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llava.errors import InputError

MAGIC = b"GGUF"
MAX_STRING = 2**26
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
    30: ("BF16", 1, 2),
}


class GgufTensor(NamedTuple):
    shape: tuple[int, ...]  # as torch has it, the fastest side last
    kind: str
    num_bytes: int | None  # None for a kind that is not known here


@dataclass(frozen=True)
class GgufHeader:
    """Keys with their values (of a long array its length), and tensors by name."""

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
            (version,) = _unpack(stream, "<I")
            if version not in (2, 3):
                raise InputError(f"{file} is of GGUF version {version}; versions 2 and 3 are known")
            num_tensors, num_keys = _unpack(stream, "<QQ")
            keys = {_string(stream): _value(stream, _unpack(stream, "<I")[0], longest) for _ in range(num_keys)}
            tensors = dict(_tensor(stream) for _ in range(num_tensors))
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
        raise InputError(f"the header of {file} is damaged or cut short ({error}); copy it again") from error
    return GgufHeader(keys, tensors)


def _unpack(stream: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "<Q")
    if length > MAX_STRING:
        raise OverflowError(f"a text of {length} bytes")
    return stream.read(length).decode()


def _value(stream: BinaryIO, kind: int, longest: int) -> object:
    if kind == STRING:
        return _string(stream)
    if kind != ARRAY:
        return _unpack(stream, "<" + SCALARS[kind])[0]
    (item,), (count,) = _unpack(stream, "<I"), _unpack(stream, "<Q")
    if item in SCALARS and count > longest:
        stream.seek(count * struct.calcsize("<" + SCALARS[item]), 1)
        return count
    values = [_value(stream, item, longest) for _ in range(count)]
    return values if count <= longest else count


def _tensor(stream: BinaryIO) -> tuple[str, GgufTensor]:
    name = _string(stream)
    (num_sides,) = _unpack(stream, "<I")
    sides = _unpack(stream, f"<{num_sides}Q")
    kind, _ = _unpack(stream, "<IQ")
    label, block, size = KINDS.get(kind, (f"kind {kind}", 0, 0))
    num_bytes = math.prod(sides) // block * size if block else None
    return name, GgufTensor(tuple(reversed(sides)), label, num_bytes)
