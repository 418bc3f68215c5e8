"""Read weight files: what they hold, from their headers, and their tensors, one at a time.

In: a `.safetensors` or `.bin` file. Out: name -> `TensorHeader` (dtype, shape), without torch and without reading weights;
and the tensors themselves, those of a `.gguf` file too (gguf/tensors.py), for which torch is imported. Files are not
trusted: a safetensors header is bounded and checked against the file's length, and the pickle in a `.bin` is read by an
unpickler that knows only what a tensor is built of (torch reads it with `weights_only=True`). The files of a checkpoint are
found by inspect.py, and loaded by loading.py.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from llava.errors import InputError
from llava.model.checkpoints.gguf.tensors import GgufTensors
from llava.model.checkpoints.pickle_check import check_pickle_file

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself

# Dtypes: the names of the safetensors format -> those of torch.
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

DTYPE_BYTES = {name: 1 if name == "BOOL" else int(re.findall(r"\d+", name)[0]) // 8 for name in TORCH_DTYPES}

# The storage classes that a torch pickle names, as safetensors dtypes.
TORCH_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


@dataclass(frozen=True)
class TensorHeader:
    """A stored tensor: its file, its name there, dtype and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    # Byte offset in the file of its data, in row-major order; None where the data are not contiguous in the file.
    start: int | None = field(default=None, compare=False, repr=False)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]

    @property
    def stored(self) -> tuple[TensorHeader, ...]:
        """What is stored of it: itself, or the parts of a weight that is stored quantized (packed.py)."""
        return (self,)

    def read_from(self, tensors: Tensors) -> torch.Tensor:
        """Read the tensor from its open file."""
        return tensors.get_tensor(self.name)


def read_headers(file: Path) -> dict[str, TensorHeader]:
    """Read the headers of one weight file, by name, in the file's order."""
    if not file.is_file():
        raise InputError(
            f"the weight file {file} does not exist; the download or the copy of this checkpoint is not complete"
        )
    if file.suffix == ".safetensors":
        return _read_safetensors_headers(file)
    return _read_pickle_headers(file)


@contextmanager
def open_tensors(file: Path) -> Iterator[Tensors]:
    """Open one weight file; tensors are on the CPU, and mapped from the file where its format allows."""
    if not file.is_file():
        raise InputError(f"the weight file {file} does not exist")
    if file.suffix == ".gguf":
        yield GgufTensors(file)
        return
    if file.suffix != ".safetensors":
        yield PickledTensors(load_pickled_tensors(file))
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            yield handle
    except SafetensorError as error:
        raise InputError(f"the weight file {file} cannot be read: {error}; copy it again") from error


class Tensors(Protocol):
    """An open weight file."""

    def keys(self) -> Iterable[str]: ...
    def get_tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class PickledTensors:
    """The tensors of a `.bin` file, with the two methods of an open safetensors file."""

    table: dict[str, torch.Tensor]

    def keys(self) -> Iterable[str]:
        return self.table.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.table[name]


def read_tensor(header: TensorHeader) -> torch.Tensor:
    """Read one tensor into memory of its own, without mapping the file."""
    import torch

    if header.start is None:
        with open_tensors(header.file) as tensors:
            return header.read_from(tensors).clone()
    tensor = torch.empty(header.shape, dtype=getattr(torch, TORCH_DTYPES[header.dtype]))
    if header.num_bytes:
        with header.file.open("rb", buffering=0) as stream:
            stream.seek(header.start)
            target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            while target:  # the system reads at most 2 GiB at once
                count = stream.readinto(target)
                if not count:
                    raise InputError(f"the weight file {header.file} ends within tensor {header.name!r}; copy it again")
                target = target[count:]
    return tensor


def load_pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of a `.bin` file, mapped from disk where its format allows; anything but tensors is an `InputError`."""
    import torch

    mapped = zipfile.is_zipfile(file)
    try:
        check_pickle_file(file, KNOWN_NAMES)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # bytes that are no pickle can raise any error
        raise InputError(_cannot_read_pickle(file, error)) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"the weight file {file} does not hold a table of tensors; it is not a model's weight file")
    return state


# --- safetensors ------------------------------------------------------------------------------------------------------


def _read_safetensors_headers(file: Path) -> dict[str, TensorHeader]:
    size = file.stat().st_size
    if size < 8:
        raise InputError(
            f"the weight file {file} is truncated: it has {size} bytes, too few for a header; copy it again"
        )
    with file.open("rb") as stream:
        (header_size,) = struct.unpack("<Q", stream.read(8))
        if header_size > MAX_HEADER_BYTES:
            raise InputError(
                f"the weight file {file} is no safetensors file: it announces a header of {header_size} bytes"
            )
        if header_size > size - 8:
            raise InputError(
                f"the weight file {file} is truncated: its header needs {8 + header_size} bytes and the file has {size}"
            )
        raw = stream.read(header_size)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        headers = {name: _safetensors_entry(file, name, entry, 8 + header_size) for name, entry in entries.items()}
        ends = {name: int(entry["data_offsets"][1]) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the weight file {file} has a damaged header ({error}); copy it again") from error
    if ends:
        last = max(ends, key=lambda name: ends[name])
        expected = 8 + header_size + ends[last]
        if size < expected:
            raise InputError(
                f"the weight file {file} is truncated: tensor {last!r} {list(headers[last].shape)} ends at byte {expected} "
                f"and the file has {size}; copy it again"
            )
    return headers


def _safetensors_entry(file: Path, name: str, entry: dict[str, Any], first: int) -> TensorHeader:
    dtype, shape = entry["dtype"], tuple(int(side) for side in entry["shape"])
    start, end = entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise InputError(f"the weight file {file} stores tensor {name!r} as {dtype}; known: {', '.join(DTYPE_BYTES)}")
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise InputError(
            f"the weight file {file} has a damaged header: tensor {name!r} of shape {list(shape)} and type {dtype} "
            f"is given {end - start} bytes"
        )
    return TensorHeader(file, name, dtype, shape, first + start)


# --- .bin (a zip archive around a pickle) -----------------------------------------------------------------------------


def _read_pickle_headers(file: Path) -> dict[str, TensorHeader]:
    if not zipfile.is_zipfile(file):
        return _read_legacy_pickle_headers(file)
    try:
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(members) != 1:
                raise InputError(
                    f"the weight file {file} is a zip archive but not one that torch writes; it holds no data.pkl"
                )
            check_pickle_file(file, KNOWN_NAMES)
            with archive.open(members[0]) as stream:
                state = _HeaderUnpickler(stream).load()
            prefix = members[0].removesuffix("data.pkl")
            offsets = _member_offsets(file, archive, prefix)
            sizes = {member.filename.removeprefix(f"{prefix}data/"): member.file_size for member in archive.infolist()}
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(_cannot_read_pickle(file, error)) from error
    if not isinstance(state, dict) or not all(isinstance(value, _Stub) for value in state.values()):
        raise InputError(f"the weight file {file} does not hold a table of tensors; it is not a model's weight file")
    headers = {
        name: TensorHeader(file, name, stub.storage.dtype, stub.shape, _data_offset(stub, offsets))
        for name, stub in state.items()
    }
    for name, header in headers.items():
        stored = sizes.get(state[name].storage.key, 0)
        if min(header.shape, default=0) < 0 or header.num_bytes > stored:
            raise InputError(
                f"the weight file {file} announces {header.num_bytes} bytes for tensor {name!r} {list(header.shape)} and "
                f"stores {stored}; copy it again"
            )
    return headers


def _member_offsets(file: Path, archive: zipfile.ZipFile, prefix: str) -> dict[str, int]:
    """Storage key -> byte offset of its data in the file; compressed members have none."""
    order = f"{prefix}byteorder"
    if order in archive.namelist() and archive.read(order) != sys.byteorder.encode():
        return {}
    offsets = {}
    with file.open("rb") as stream:
        for member in archive.infolist():
            if member.filename.startswith(f"{prefix}data/") and member.compress_type == zipfile.ZIP_STORED:
                # The local header of a member repeats its name, and may have another extra field than the directory.
                stream.seek(member.header_offset + 26)
                offsets[member.filename.removeprefix(f"{prefix}data/")] = (
                    member.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))
                )
    return offsets


def _data_offset(stub: _Stub, offsets: dict[str, int]) -> int | None:
    dense, expected = True, 1
    for side, step in zip(reversed(stub.shape), reversed(stub.strides), strict=True):
        dense &= side == 1 or step == expected
        expected *= side
    if not dense or stub.storage.key not in offsets:
        return None
    return offsets[stub.storage.key] + stub.offset * DTYPE_BYTES[stub.storage.dtype]


def _read_legacy_pickle_headers(file: Path) -> dict[str, TensorHeader]:
    """Read a file of torch before 1.6 whole, since its sizes are distributed over the file."""
    headers = {}
    for name, tensor in load_pickled_tensors(file).items():
        storage = tensor.type().rsplit(".", 1)[-1].replace("Tensor", "Storage")
        headers[name] = TensorHeader(file, name, TORCH_STORAGES[storage], tuple(tensor.shape))
    return headers


class _StubStorage(NamedTuple):
    dtype: str
    key: str


@dataclass(frozen=True)
class _Stub:
    storage: _StubStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_stub(
    storage: _StubStorage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: object
) -> _Stub:
    return _Stub(storage, offset, tuple(shape), tuple(strides))


class _Table(dict):  # type: ignore[type-arg]
    """In place of the OrderedDict of a state dict, which has attributes."""


# The names that a pickled table of tensors may refer to.
KNOWN_NAMES = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    *(("torch", name) for name in TORCH_STORAGES),
}  # fmt: skip


class _HeaderUnpickler(pickle.Unpickler):
    """An unpickler that builds stubs in place of tensors, and knows only the names that a saved state dict needs."""

    KNOWN: ClassVar[dict[tuple[str, str], Callable[..., object]]] = {
        ("collections", "OrderedDict"): _Table,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_stub,
        ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
    }

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in TORCH_STORAGES:
            return TORCH_STORAGES[name]
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of tensors needs")

    def persistent_load(self, pid: tuple[object, ...]) -> _StubStorage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, str):
            raise pickle.UnpicklingError(f"it refers to {kind!r}, which no table of tensors needs")
        return _StubStorage(dtype, str(key))


def _cannot_read_pickle(file: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0].split(". ")[0].rstrip(".") if str(error) else type(error).__name__
    return (
        f"the weight file {file} cannot be read as a table of tensors ({reason}); it is damaged or something else: "
        "copy it again"
    )
