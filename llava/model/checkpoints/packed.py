"""Weights stored quantized and read as the numbers they stand for: AWQ, GPTQ, compressed-tensors, torchao, blocks of fp8.

In: the stored tensors of a folder and its `quantization_config`. Out: a header for each weight, under the name that it has
in an unquantized checkpoint, which reads and combines the stored parts. So a model is loaded, converted and examined like
any other; it takes the memory of unquantized weights. The result is that of the library which wrote the files, number for
number, in the dtype of the scales. Methods that a library must read are left to quantized.py.

    O outputs, I inputs, G groups of inputs that share a scale
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import InputError
from llava.model.checkpoints.weight_files import DTYPE_BYTES, TensorHeader, Tensors, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, "Tensor"]

# Methods that a library reads through transformers -> the package.
LIBRARIES = {
    "bitsandbytes": "bitsandbytes", "hqq": "hqq", "quanto": "optimum", "eetq": "eetq", "aqlm": "aqlm",
    "vptq": "vptq",
}  # fmt: skip

# What a module's packed weight is stored as, by method; the first one is the weight itself.
PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": (
        "weight_packed",
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
    "fp8": ("weight", "weight_scale_inv", "weight_scale"),
    "torchao": ("_weight_qdata", "_weight_scale", "_weight_zero_point", r"_weight_\w+"),
}
# Other programs that store weights in fp8 with scales.
ALSO_FP8 = ("fbgemm_fp8", "modelopt")
# Scales of quantized activations and caches, which stay in the dtype of the model here.
ACTIVATION_SCALE = re.compile(r"\.(?:(?:input|output|activation|[kqv])_(?:scale|zero_point|global_scale)(?:_inv)?)$")
# In which order AWQ packs eight columns into an integer.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")


@dataclass(frozen=True)
class PackedHeader(TensorHeader):
    """A weight of several stored tensors; dtype and shape are those of the numbers that it is read as."""

    parts: Mapping[str, TensorHeader] = field(default_factory=dict, compare=False, repr=False)
    unpack: Callable[[Parts], Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def stored(self) -> tuple[TensorHeader, ...]:
        return tuple(self.parts.values())

    def read_from(self, tensors: Tensors) -> Tensor:
        """Unpack the weight; its parts may be in other files than the open one."""
        assert self.unpack is not None
        try:
            return self.unpack({part: read_tensor(header) for part, header in self.parts.items()})
        except (RuntimeError, IndexError) as error:
            raise InputError(
                f"{self.file}: the quantized weight {self.name!r} cannot be read, since its parts do not fit together ({error})"
            ) from error


@dataclass(frozen=True)
class Packing:
    """How a folder's weights were quantized: `description` for people, and the headers of all its tensors, unpacked."""

    description: str
    headers: Mapping[str, TensorHeader] = field(repr=False)
    activation_scales: Mapping[str, TensorHeader] = field(repr=False, default_factory=dict)


def quantization_method(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method", "bitsandbytes")).lower()
    return "fp8" if method in ALSO_FP8 else method


def missing_reader(settings: Mapping[str, Any]) -> str | None:
    """Why weights of a method cannot be read on this machine; None where they can."""
    method = quantization_method(settings)
    if method in PARTS:
        return None
    if method not in LIBRARIES:
        known = ", ".join([*PARTS, *LIBRARIES])
        return f"the method {method!r} is not known; known: {known}"
    if importlib.util.find_spec(LIBRARIES[method]) is None:
        return f"the package {LIBRARIES[method]} is not installed, which reads them (pip install {LIBRARIES[method]})"
    return None


def find_packed(stored: Mapping[str, TensorHeader], settings: Mapping[str, Any], file: Path) -> Packing | None:
    """Find the packed weights among stored tensors; None for a method that a library reads.

    Args:
        stored: The tensors of a folder.
        settings: Its `quantization_config`.
        file: The config.json, for errors.

    Raises:
        InputError: The method has a form that is not known, or tensors are missing.
    """
    method = quantization_method(settings)
    if method not in PARTS:
        return None
    first, *others = PARTS[method]
    pattern = re.compile(rf"(.+)\.({'|'.join((first, *others))})")
    modules: dict[str, dict[str, TensorHeader]] = {}
    plain: dict[str, TensorHeader] = {}
    scales: dict[str, TensorHeader] = {}
    for name, header in stored.items():
        match = pattern.fullmatch(name)
        if ACTIVATION_SCALE.search(name):
            scales[name] = header
        elif match is None:
            plain[name] = header
        else:
            modules.setdefault(match[1], {})[match[2]] = header
    make = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "fp8": _blocks, "torchao": _affine}[method](
        settings, file
    )
    unpacked: dict[str, TensorHeader] = {}
    for module, parts in modules.items():
        if set(parts) == {"weight"}:
            plain[f"{module}.weight"] = parts["weight"]
        else:
            unpacked[f"{module}.weight"] = make(f"{module}.weight", parts)
    if not unpacked:
        raise InputError(f"{file} says that the weights are stored quantized by {method}, and no tensor is")
    description = method if not scales else f"{method}, with quantized activations, which are not quantized here"
    return Packing(description, {**plain, **unpacked}, scales)


def _header(
    name: str,
    parts: Mapping[str, TensorHeader],
    shape: tuple[int, ...],
    unpack: Callable[[Parts], Tensor],
) -> PackedHeader:
    dtype = next(
        header.dtype for part, header in parts.items() if part in ("scales", "weight_scale", "weight_scale_inv")
    )
    file = next(iter(parts.values())).file
    return PackedHeader(file, name, dtype, shape, parts=parts, unpack=unpack)


def _require(name: str, parts: Mapping[str, TensorHeader], needed: tuple[str, ...]) -> None:
    missing = next((part for part in needed if part not in parts), None)
    if missing is not None:
        file = next(iter(parts.values())).file
        raise InputError(f"{file}: the quantized weight {name!r} lacks its {missing}; the checkpoint is not complete")


def _unpacked_bits(packed: Tensor, bits: int) -> Tensor:
    """Take the integers of `bits` bits out of each number of 32: (..., N) -> (..., N, 32 / bits), the lowest bits first.

    By bytes, which takes a quarter of the time and of the memory; the result is int8, or int16 for 8 bits.
    """
    import torch

    if sys.byteorder != "little":
        raise InputError("packed weights are read on machines whose numbers begin with their lowest byte")
    parts = packed.contiguous().view(torch.uint8).unsqueeze(-1)  # (..., 4 N, 1)
    if bits == 8:
        numbers = parts.to(torch.int16)
    else:
        numbers = ((parts >> torch.arange(0, 8, bits, dtype=torch.uint8)) & (2**bits - 1)).view(torch.int8)
    return numbers.reshape(*packed.shape, 32 // bits)


def _bits(settings: Mapping[str, Any], file: Path, known: tuple[int, ...]) -> int:
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits not in known:
        raise InputError(
            f"{file} says that weights are quantized to {bits!r} bits; known: {', '.join(map(str, known))}, so load the "
            "checkpoint that they were quantized from"
        )
    return int(bits)


# --- AWQ and GPTQ -----------------------------------------------------------------------------------------------------


def _awq(settings: Mapping[str, Any], file: Path) -> Callable[[str, Mapping[str, TensorHeader]], PackedHeader]:
    _bits(settings, file, (4,))
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise InputError(f"{file} has weights of AWQ's version {version!r}; known: gemm")

    def header(name: str, parts: Mapping[str, TensorHeader]) -> PackedHeader:
        _require(name, parts, ("qweight", "qzeros", "scales"))
        rows, columns = parts["qweight"].shape
        return _header(name, parts, (columns * 8, rows), _read_awq)

    return header


def _read_awq(parts: Parts) -> Tensor:
    """qweight (I, O / 8), qzeros (G, O / 8), scales (G, O) -> (O, I)."""
    scales = parts["scales"]
    order = list(AWQ_ORDER)
    numbers = _unpacked_bits(parts["qweight"], 4)[..., order].flatten(1)  # (I, O)
    zeros = _unpacked_bits(parts["qzeros"], 4)[..., order].flatten(1)
    grouped = numbers.reshape(scales.shape[0], -1, scales.shape[1])  # (G, I / G, O)
    result = (grouped - zeros.unsqueeze(1)).to(scales.dtype) * scales.unsqueeze(1)
    return result.flatten(0, 1).t().contiguous()


def _gptq(settings: Mapping[str, Any], file: Path) -> Callable[[str, Mapping[str, TensorHeader]], PackedHeader]:
    bits = _bits(settings, file, (2, 4, 8))
    form = str(settings.get("checkpoint_format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2"):
        raise InputError(f"{file} has weights of GPTQ's checkpoint_format {form!r}; known: gptq, gptq_v2")
    read = partial(
        _read_gptq, bits=bits, offset=1 if form == "gptq" else 0
    )  # the first form stores zero points less one

    def header(name: str, parts: Mapping[str, TensorHeader]) -> PackedHeader:
        _require(name, parts, ("qweight", "qzeros", "scales"))
        rows, columns = parts["qweight"].shape
        return _header(name, parts, (columns, rows * 32 // bits), read)

    return header


def _read_gptq(parts: Parts, *, bits: int, offset: int) -> Tensor:
    """qweight (I * bits / 32, O), qzeros (G, O * bits / 32), scales (G, O), g_idx (I) -> (O, I)."""
    import torch

    scales = parts["scales"]
    numbers = _unpacked_bits(parts["qweight"].t(), bits).flatten(1)  # (O, I)
    zeros = ((_unpacked_bits(parts["qzeros"], bits).flatten(1) + offset) & (2**bits - 1)).t()  # (O, G)
    num_inputs, groups = numbers.shape[1], parts.get("g_idx")
    if groups is None:
        groups = torch.arange(num_inputs) // (num_inputs // scales.shape[0])
    groups = groups.long()
    return (numbers - zeros[:, groups]).to(scales.dtype) * scales.t()[:, groups]


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def _compressed(settings: Mapping[str, Any], file: Path) -> Callable[[str, Mapping[str, TensorHeader]], PackedHeader]:
    groups = settings.get("config_groups")
    schemes = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    for form in (settings.get("format"), *(scheme.get("format") for scheme in schemes)):
        if form is not None and form not in FORMATS:
            raise InputError(
                f"{file} has weights in the format {form!r} of compressed-tensors; known: {', '.join(FORMATS)}, so load the "
                "checkpoint that they were quantized from"
            )
    sparsity, transform = settings.get("sparsity_config") or {}, settings.get("transform_config") or {}
    if sparsity.get("format", "dense") != "dense" or transform.get("config_groups"):
        raise InputError(
            f"{file} has sparse or rotated weights of compressed-tensors, which are not read; load the checkpoint that they "
            "were quantized from"
        )
    weights = [scheme.get("weights") or {} for scheme in schemes]

    def header(name: str, parts: Mapping[str, TensorHeader]) -> PackedHeader:
        if "weight_packed" not in parts:
            _require(name, parts, ("weight", "weight_scale"))
            first, bits, shape = parts["weight"], None, parts["weight"].shape
            if DTYPE_BYTES[first.dtype] != 1:
                raise InputError(f"{file}: the quantized weight {name!r} is stored as {first.dtype}, not in 8 bits")
        else:
            _require(name, parts, ("weight_packed", "weight_scale", "weight_shape"))
            first, shape = parts["weight_packed"], tuple(int(side) for side in read_tensor(parts["weight_shape"]))
            declared = {scheme.get("num_bits") for scheme in weights}
            bits = next((n for n in (2, 4, 8) if n in declared and _fits(first.shape, shape, n)), None)
            if bits is None:
                raise InputError(
                    f"{file} has no scheme of 2, 4 or 8 bits for the quantized weight {name!r} of shape {list(shape)}, "
                    f"which is stored in {list(first.shape)} integers"
                )
        sides = _scale_sides(shape, parts["weight_scale"].shape, weights)
        if sides is None:
            raise InputError(
                f"{file} has no scheme for the scales {list(parts['weight_scale'].shape)} of the quantized weight {name!r} of "
                f"shape {list(shape)}"
            )
        return _header(name, parts, shape, partial(_read_compressed, bits=bits, shape=shape, sides=sides))

    return header


def _fits(stored: tuple[int, ...], shape: tuple[int, ...], bits: int) -> bool:
    return len(shape) == 2 and stored == (shape[0], math.ceil(shape[1] * bits / 32))


def _scale_sides(
    shape: tuple[int, ...], scales: tuple[int, ...], weights: list[Mapping[str, Any]]
) -> tuple[int, int] | None:
    """How many rows and columns of a weight share a scale; None if no scheme has scales of this shape."""
    if math.prod(scales) == 1:
        return shape[0], shape[1]
    if math.prod(scales) == shape[0] and scales[0] == shape[0]:
        return 1, shape[1]
    for scheme in weights:
        block, group = scheme.get("block_structure"), scheme.get("group_size")
        sides = tuple(block) if isinstance(block, list) and len(block) == 2 else (1, group)
        if all(type(side) is int and side > 0 for side in sides) and scales == tuple(
            math.ceil(size / side) for size, side in zip(shape, sides, strict=True)
        ):
            return sides[0], sides[1]
    return None


def _read_compressed(parts: Parts, *, bits: int | None, shape: tuple[int, ...], sides: tuple[int, int]) -> Tensor:
    """weight (O, I) in 8 bits, or weight_packed (O, I * bits / 32) -> (numbers - zeros) * scales, in the scales' dtype."""
    zeros, groups = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    if bits is None:
        numbers = parts["weight"]
    else:
        half = 2 ** (bits - 1)  # numbers are stored from 0 on
        numbers = _unpacked_bits(parts["weight_packed"], bits).flatten(1)[:, : shape[1]] - half
        if zeros is not None and zeros.dtype.itemsize == 4:  # packed along the outputs: (O * bits / 32, G)
            zeros = _unpacked_bits(zeros.t(), bits).flatten(1)[:, : shape[0]].t() - half
    scale = parts["weight_scale"]

    def spread(values: Tensor) -> Tensor:
        """Repeat values, one for each set of rows and columns that share them, to (O, I)."""
        values = values.reshape(math.ceil(shape[0] / sides[0]), math.ceil(shape[1] / sides[1]))
        rows = values.repeat_interleave(sides[0], dim=0).narrow(0, 0, shape[0])
        if groups is not None and groups.numel() == shape[1] and int(groups.min()) >= 0:
            return rows[:, groups.long()]  # columns were sorted before they were grouped
        return rows.repeat_interleave(sides[1], dim=1).narrow(1, 0, shape[1])

    result = numbers.to(scale.dtype)
    if zeros is not None:
        result = result - spread(zeros.to(scale.dtype))
    return result * spread(scale)


# --- torchao ----------------------------------------------------------------------------------------------------------


def _affine(settings: Mapping[str, Any], file: Path) -> Callable[[str, Mapping[str, TensorHeader]], PackedHeader]:
    def header(name: str, parts: Mapping[str, TensorHeader]) -> PackedHeader:
        _require(name, parts, ("_weight_qdata", "_weight_scale"))
        numbers, scale = parts["_weight_qdata"], parts["_weight_scale"]
        other = set(parts) - set(PARTS["torchao"])
        if numbers.dtype not in ("I8", "F8_E4M3", "F8_E5M2") or other or len(numbers.shape) != 2:
            raise InputError(
                f"{file} has the weight {name!r} in a form of torchao that is not read ({numbers.dtype} and {len(parts) - 1} "
                "more tensors); known: 8 bits with scales, so load the checkpoint that it was quantized from"
            )
        renamed = {
            part.replace("_weight_", "weight_").replace("weight_qdata", "weight"): h for part, h in parts.items()
        }
        spread = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1, 1)[:2]
        if any(side % count for side, count in zip(numbers.shape, spread, strict=True)):
            raise InputError(
                f"{file} has scales {list(scale.shape)} for the quantized weight {name!r} of shape {list(numbers.shape)}"
            )
        sides = (numbers.shape[0] // spread[0], numbers.shape[1] // spread[1])
        read = partial(_read_compressed, bits=None, shape=numbers.shape, sides=sides)
        return _header(name, renamed, numbers.shape, read)

    return header


# --- blocks of fp8 ----------------------------------------------------------------------------------------------------


def _blocks(settings: Mapping[str, Any], file: Path) -> Callable[[str, Mapping[str, TensorHeader]], PackedHeader]:
    sides = settings.get("weight_block_size") or [128, 128]
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise InputError(f"{file} has weight_block_size {sides!r}; it must be two integers")

    def header(name: str, parts: Mapping[str, TensorHeader]) -> PackedHeader:
        _require(name, parts, ("weight",))
        shape = parts["weight"].shape
        if not parts["weight"].dtype.startswith("F8"):
            raise InputError(f"{file}: the quantized weight {name!r} is stored as {parts['weight'].dtype}, not in fp8")
        if "weight_scale" in parts:
            whole = _scale_sides(shape, parts["weight_scale"].shape, [])
            if whole is None:
                scales = list(parts["weight_scale"].shape)
                raise InputError(f"{file} has scales {scales} for the quantized weight {name!r} of shape {list(shape)}")
            return _header(name, parts, shape, partial(_read_compressed, bits=None, shape=shape, sides=whole))
        _require(name, parts, ("weight_scale_inv",))
        return _header(name, parts, parts["weight"].shape, partial(_read_blocks, sides=tuple(sides)))

    return header


def _read_blocks(parts: Parts, *, sides: tuple[int, int]) -> Tensor:
    """weight (O, I), weight_scale_inv (O / side, I / side) -> (O, I)."""
    weight, scale = parts["weight"], parts["weight_scale_inv"]
    if scale.numel() > 1:
        for dim in (0, 1):
            scale = scale.repeat_interleave(sides[dim], dim=dim).narrow(dim, 0, weight.shape[dim])
    return weight.to(scale.dtype) * scale
