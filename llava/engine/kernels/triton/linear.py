"""Linear layers of few tokens, where reading the weight takes the time.

- One row of x: `gemv`. Each program sums the products of a few rows of the weight (out, in).
- 2 to 64 rows: `skinny`. Tensor cores multiply with the weight as the left operand, so that 16 columns are enough. Where
  there are too few programs, several share an output tile, and the last to finish adds up the partial sums (split-K).
- More rows: PyTorch's product, after `expand` has dequantized the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.engine.kernels.quantized import GROUP, QuantizedWeight
from llava.engine.kernels.triton.launch import INTERPRETED, MULTIPROCESSORS, let_next_start, prefetch, wait_for_previous

MAX_ROWS = 64
HALF_GROUP = GROUP // 2


@dataclass(frozen=True)
class LinearTile:
    """How linear kernels cut their work: rows of the weight, elements along them, warps, and pipeline depth."""

    rows: int
    width: int
    warps: int = 4
    depth: int = 1  # pipeline stages
    ahead: int = 8  # lines of 128 bytes of each row that are prefetched before the previous kernel has ended
    programs: int = 1  # skinny: programs for each multiprocessor, which decides how many share an output tile


# The fastest of those that were tried in whole decoding steps of a 7B model on an H200.
GEMV_TILES = {
    "plain": LinearTile(2, 4096, ahead=0),
    "int8": LinearTile(8, 512, warps=2, depth=6),
    "fp8": LinearTile(8, 512, warps=2, depth=4),
    "int4": LinearTile(8, 512, warps=2, depth=3, ahead=4),
}
LONG_GEMV_TILES = {
    "plain": LinearTile(4, 1024, warps=2, ahead=0),
    "int8": LinearTile(8, 1024, depth=3),
    "fp8": LinearTile(8, 1024, depth=3),
    "int4": LinearTile(4, 2048, depth=2, ahead=4),
}
SKINNY_TILES = {
    "plain": LinearTile(64, 128, depth=6, ahead=1),
    "int8": LinearTile(32, 256, depth=4, ahead=4, programs=5),
    "fp8": LinearTile(64, 128, depth=6, ahead=0, programs=3),
    "int4": LinearTile(128, HALF_GROUP, depth=4, ahead=0, programs=6),
}
# At 64 rows a step took 9.1 ms with the tile of int8 and 6.1 ms with that of fp8, on weights of the same size.
WIDE_SKINNY_TILES = SKINNY_TILES | {"int8": SKINNY_TILES["fp8"]}


def kind_of(weight: Tensor | QuantizedWeight) -> str:
    return weight.kind if isinstance(weight, QuantizedWeight) else "plain"


def gemv(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    overlap: bool,
    gated: bool = False,
    tile: LinearTile | None = None,
) -> Tensor:
    """Return x (1, in) times the transposed weight (out, in); with `gated`, silu of its first half times its second."""
    kind = kind_of(weight)
    data, scales = _parts(weight)
    num_out, width = data.shape
    tile = tile or gemv_tile(kind, width, gated)
    if gated:
        num_out //= 2
    out = torch.empty(1, num_out, dtype=x.dtype, device=x.device)
    kernel = _gemv_int4 if kind == "int4" else _gemv
    kernel[(triton.cdiv(num_out, tile.rows),)](
        x, data, scales, bias, out, num_out, width,
        KIND=kind, ROWS=tile.rows, WIDTH=tile.width, STAGES=tile.depth, AHEAD=tile.ahead, GATED=gated,
        PORTABLE=INTERPRETED, OVERLAP=overlap, num_warps=tile.warps, launch_pdl=overlap,
    )  # fmt: skip
    return out


def gemv_tile(kind: str, width: int, gated: bool) -> LinearTile:
    """Return the fastest tile measured: rows of 4096 elements in one or two steps, longer ones in small steps."""
    tile = LONG_GEMV_TILES[kind] if width > 8192 else GEMV_TILES[kind]
    return replace(tile, rows=tile.rows // 2) if gated else tile


def skinny(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    counters: Tensor,
    *,
    overlap: bool,
    tile: LinearTile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return x (T, in), T from 2 to 64, times the transposed weight (out, in).

    `counters` must be zeros, and are zeros again when the kernel ends.
    """
    kind = kind_of(weight)
    data, scales = _parts(weight)
    num_rows, (num_out, width) = len(x), data.shape
    columns = max(16, triton.next_power_of_2(num_rows))
    tile = tile or (SKINNY_TILES if columns <= 32 else WIDE_SKINNY_TILES)[kind]
    num_tiles = triton.cdiv(num_out, tile.rows)
    splits = splits or pick_splits(tile, num_tiles, triton.cdiv(width, tile.width))
    out = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    shape = (num_tiles, splits, tile.rows, columns) if splits > 1 else (1,)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    kernel = _skinny_int4 if kind == "int4" else _skinny
    kernel[(num_tiles, splits)](
        x, data, scales, bias, out, partial, counters, num_rows, num_out, width, splits,
        KIND=kind, ROWS=tile.rows, WIDTH=tile.width, COLUMNS=columns, SHARED=splits > 1, STAGES=tile.depth,
        AHEAD=tile.ahead, EVEN=width % tile.width == 0, OVERLAP=overlap, num_warps=tile.warps, launch_pdl=overlap,
    )  # fmt: skip
    return out


def pick_splits(tile: LinearTile, num_tiles: int, num_steps: int) -> int:
    """Return how many programs share an output tile: enough to fill the GPU, each with at least four steps."""
    wanted = round(tile.programs * MULTIPROCESSORS / num_tiles)
    return max(1, min(wanted, num_steps // 4, 16))


def expand(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight to (out, in), in one pass."""
    rows, width = weight.data.shape
    out = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    tile = 2048
    grid = (rows, triton.cdiv(width, tile))
    _expand[grid](weight.data, weight.scales, out, width, KIND=weight.kind, WIDTH=tile, num_warps=4)
    return out


def _parts(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    return (weight.data, weight.scales) if isinstance(weight, QuantizedWeight) else (weight, None)


# Four bytes of a register become four floats: each byte is put into the mantissa of 2^23, and 2^23 is subtracted. Triton's
# own conversion takes about twice as many instructions, which would make it slower than the memory.
_INT8_TO_FLOAT = tl.constexpr("""{
.reg .b32 w, a, b, c, d;
xor.b32 w, $4, 0x80808080;
prmt.b32 a, w, 0x4B000000, 0x7440;
prmt.b32 b, w, 0x4B000000, 0x7441;
prmt.b32 c, w, 0x4B000000, 0x7442;
prmt.b32 d, w, 0x4B000000, 0x7443;
add.f32 $0, a, 0fCB000080;
add.f32 $1, b, 0fCB000080;
add.f32 $2, c, 0fCB000080;
add.f32 $3, d, 0fCB000080;
}""")
_FP8_TO_FLOAT = tl.constexpr("""{
.reg .b16 l, h, a, b, c, d;
.reg .b32 u, v;
mov.b32 {l, h}, $4;
cvt.rn.f16x2.e4m3x2 u, l;
cvt.rn.f16x2.e4m3x2 v, h;
mov.b32 {a, b}, u;
mov.b32 {c, d}, v;
cvt.f32.f16 $0, a;
cvt.f32.f16 $1, b;
cvt.f32.f16 $2, c;
cvt.f32.f16 $3, d;
}""")
_INT4_TO_FLOATS = tl.constexpr("""{
.reg .b32 l, h, a, b, c, d;
and.b32 l, $8, 0x0F0F0F0F;
shr.u32 h, $8, 4;
and.b32 h, h, 0x0F0F0F0F;
prmt.b32 a, l, 0x4B000000, 0x7440;
prmt.b32 b, l, 0x4B000000, 0x7441;
prmt.b32 c, l, 0x4B000000, 0x7442;
prmt.b32 d, l, 0x4B000000, 0x7443;
add.f32 $0, a, 0fCB000008;
add.f32 $1, b, 0fCB000008;
add.f32 $2, c, 0fCB000008;
add.f32 $3, d, 0fCB000008;
prmt.b32 a, h, 0x4B000000, 0x7440;
prmt.b32 b, h, 0x4B000000, 0x7441;
prmt.b32 c, h, 0x4B000000, 0x7442;
prmt.b32 d, h, 0x4B000000, 0x7443;
add.f32 $4, a, 0fCB000008;
add.f32 $5, b, 0fCB000008;
add.f32 $6, c, 0fCB000008;
add.f32 $7, d, 0fCB000008;
}""")


@triton.jit
def _as_float(tile, KIND: tl.constexpr, PORTABLE: tl.constexpr):
    if PORTABLE or KIND == "plain":
        return tile.to(tl.float32)
    if KIND == "int8":
        return tl.inline_asm_elementwise(
            _INT8_TO_FLOAT, "=f,=f,=f,=f,r", [tile], dtype=tl.float32, is_pure=True, pack=4
        )
    return tl.inline_asm_elementwise(_FP8_TO_FLOAT, "=f,=f,=f,=f,r", [tile], dtype=tl.float32, is_pure=True, pack=4)


@triton.jit
def _halves(tile, PORTABLE: tl.constexpr):
    """Return the low and the high four bits of each byte, as floats less 8."""
    if PORTABLE:
        return (tile & 15).to(tl.float32) - 8, (tile >> 4).to(tl.float32) - 8
    return tl.inline_asm_elementwise(
        _INT4_TO_FLOATS,
        "=f,=f,=f,=f,=f,=f,=f,=f,r",
        [tile],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _prefetch_rows(rows, first, end, LINES: tl.constexpr):
    """Prefetch LINES lines of each row (a column of pointers) from `first`, and none beyond `end`."""
    SIZE: tl.constexpr = 128 * 8 // rows.dtype.element_ty.primitive_bitwidth
    prefetch(rows + tl.minimum(first + tl.arange(0, LINES) * SIZE, end - 1)[None, :])


@triton.jit
def _gemv(
    x, weight, scales, bias, out, num_out, width,
    KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    GATED: tl.constexpr, PORTABLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """With GATED, the weight has 2 num_out rows: gates, and what they are multiplied with."""
    let_next_start(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = weight + tl.minimum(rows, num_out - 1).to(tl.int64)[:, None] * width
    up_start = start + num_out.to(tl.int64) * width
    columns = tl.arange(0, WIDTH)[None, :]
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    up_sums = tl.zeros((ROWS, WIDTH), tl.float32)
    if STAGES == 1:  # no pipeline, so that the first tile can come while the kernel before still runs
        tile = tl.load(start + columns, mask=columns < width, other=0.0, eviction_policy="evict_first")
        if GATED:
            up_tile = tl.load(up_start + columns, mask=columns < width, other=0.0, eviction_policy="evict_first")
        if AHEAD > 0 and OVERLAP:
            _prefetch_rows(start, WIDTH, width, AHEAD)
        wait_for_previous(OVERLAP)
        factors = tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)
        sums = _as_float(tile, KIND, PORTABLE) * factors
        if GATED:
            up_sums = _as_float(up_tile, KIND, PORTABLE) * factors
        begin = WIDTH
    else:
        if AHEAD > 0 and OVERLAP:
            _prefetch_rows(start, 0, width, AHEAD)
            if GATED:
                _prefetch_rows(up_start, 0, width, AHEAD)
        wait_for_previous(OVERLAP)
        begin = 0
    for k in tl.range(begin, width, WIDTH, num_stages=STAGES):
        inside = k + columns < width
        tile = tl.load(start + k + columns, mask=inside, other=0.0, eviction_policy="evict_first")
        factors = tl.load(x + k + columns, mask=inside, other=0.0).to(tl.float32)
        sums += _as_float(tile, KIND, PORTABLE) * factors
        if GATED:
            up_tile = tl.load(up_start + k + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            up_sums += _as_float(up_tile, KIND, PORTABLE) * factors
    total = tl.sum(sums, axis=1)
    if KIND != "plain":
        total *= tl.load(scales + rows, mask=rows < num_out, other=0.0)
    if GATED:
        up = tl.sum(up_sums, axis=1)
        if KIND != "plain":
            up *= tl.load(scales + num_out + rows, mask=rows < num_out, other=0.0)
        total *= tl.sigmoid(total) * up
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < num_out, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=rows < num_out)


@triton.jit
def _gemv_int4(
    x, weight, scales, bias, out, num_out, width,
    KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    GATED: tl.constexpr, PORTABLE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    tl.static_assert(not GATED)
    num_groups = width // 64
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(rows, num_out - 1).to(tl.int64)[:, None]
    if AHEAD > 0 and OVERLAP:
        _prefetch_rows(weight + row * width, 0, width, AHEAD)
    columns = tl.arange(0, WIDTH)[None, :]
    low = columns // 64 * 128 + columns % 64  # the feature in the low half of each byte
    groups = tl.arange(0, WIDTH // 64)[None, :]
    sums = tl.zeros((ROWS, WIDTH // 64), tl.float32)
    wait_for_previous(OVERLAP)
    for k in tl.range(0, width, WIDTH, num_stages=STAGES):
        inside = k + columns < width
        tile = tl.load(weight + row * width + k + columns, mask=inside, other=0, eviction_policy="evict_first")
        low_factors = tl.load(x + 2 * k + low, mask=inside, other=0.0).to(tl.float32)
        high_factors = tl.load(x + 2 * k + 64 + low, mask=inside, other=0.0).to(tl.float32)
        group = k // 64 + groups
        scale = tl.load(scales + row * num_groups + group, mask=group < num_groups, other=0.0).to(tl.float32)
        lows, highs = _halves(tile, PORTABLE)
        products = lows * low_factors + highs * high_factors
        sums += tl.sum(tl.reshape(products, (ROWS, WIDTH // 64, 64)), axis=2) * scale
    total = tl.sum(sums, axis=1)
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < num_out, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=rows < num_out)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _skinny(
    x, weight, scales, bias, out, partial, counters, num_rows, num_out, width, splits,
    KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SHARED: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, COLUMNS)
    columns = tl.arange(0, WIDTH)
    start = weight + tl.minimum(rows, num_out - 1).to(tl.int64)[:, None] * width
    tiles = start + columns[None, :]
    factors = x + tokens[None, :] * width + columns[:, None]
    steps = tl.cdiv(tl.cdiv(width, WIDTH), splits)
    first = tl.program_id(1) * steps * WIDTH
    last = tl.minimum(first + steps * WIDTH, width)
    if AHEAD > 0 and OVERLAP:
        _prefetch_rows(start, first, width, AHEAD)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait_for_previous(OVERLAP)
    for k in tl.range(first, last, WIDTH, num_stages=STAGES):
        if EVEN:
            tile = tl.load(tiles + k, eviction_policy="evict_first")
            factor = tl.load(factors + k, mask=tokens[None, :] < num_rows, other=0.0)
        else:
            tile = tl.load(tiles + k, mask=(k + columns < width)[None, :], other=0.0, eviction_policy="evict_first")
            inside = (tokens[None, :] < num_rows) & (k + columns < width)[:, None]
            factor = tl.load(factors + k, mask=inside, other=0.0)
        sums = tl.dot(tile.to(x.dtype.element_ty), factor, sums, input_precision="ieee")
    if KIND != "plain":
        sums *= tl.load(scales + rows, mask=rows < num_out, other=0.0)[:, None]
    _finish(sums, bias, out, partial, counters, rows, tokens, num_rows, num_out, splits, ROWS, COLUMNS, SHARED)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _skinny_int4(
    x, weight, scales, bias, out, partial, counters, num_rows, num_out, width, splits,
    KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SHARED: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A step is one group of 128 features, in 64 bytes; its sum is multiplied by the group's scale."""
    let_next_start(OVERLAP)
    tl.static_assert(WIDTH == 64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(rows, num_out - 1).to(tl.int64)
    tokens = tl.arange(0, COLUMNS)
    columns = tl.arange(0, 64)
    num_groups = width // 64
    tiles = weight + row[:, None] * width + columns[None, :]
    factors = x + tokens[None, :] * (2 * width) + columns[:, None]
    steps = tl.cdiv(num_groups, splits)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, num_groups)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    dtype = x.dtype.element_ty
    wait_for_previous(OVERLAP)
    for group in tl.range(first, last, num_stages=STAGES):
        tile = tl.load(tiles + group * 64, eviction_policy="evict_first")
        low = tl.load(factors + group * 128, mask=tokens[None, :] < num_rows, other=0.0)
        high = tl.load(factors + group * 128 + 64, mask=tokens[None, :] < num_rows, other=0.0)
        scale = tl.load(scales + row * num_groups + group).to(tl.float32)
        lows = ((tile & 15).to(tl.int8) - 8).to(dtype)
        highs = ((tile >> 4).to(tl.int8) - 8).to(dtype)
        part = tl.dot(lows, low, input_precision="ieee")
        part = tl.dot(highs, high, part, input_precision="ieee")
        sums += part * scale[:, None]
    _finish(sums, bias, out, partial, counters, rows, tokens, num_rows, num_out, splits, ROWS, COLUMNS, SHARED)


@triton.jit
def _finish(
    sums, bias, out, partial, counters, rows, tokens, num_rows, num_out, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Add up what the programs of a tile found, in their order, and write it: done by whichever comes last."""
    is_last = True
    if SHARED:
        tile = tl.program_id(0)
        places = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        parts = partial + tile.to(tl.int64) * splits * (ROWS * COLUMNS) + places
        tl.store(parts + tl.program_id(1) * (ROWS * COLUMNS), sums)
        tl.debug_barrier()  # all threads have stored before one of them says so
        is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1
        if is_last:
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for split in range(splits):
                sums += tl.load(parts + split * (ROWS * COLUMNS), cache_modifier=".cg")
            tl.store(counters + tile, 0)
    if is_last:
        if bias is not None:
            sums += tl.load(bias + rows, mask=rows < num_out, other=0.0).to(tl.float32)[:, None]
        inside = (rows[:, None] < num_out) & (tokens[None, :] < num_rows)
        tl.store(out + tokens[None, :] * num_out + rows[:, None], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _expand(weight, scales, out, width, KIND: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    tile = tl.load(weight + row * width + columns, mask=inside)
    if KIND == "int4":
        scale = tl.load(scales + row * (width // 64) + columns // 64, mask=inside, other=0.0).to(tl.float32)
        low = out + row * width * 2 + columns // 64 * 128 + columns % 64
        tl.store(low, (((tile & 15).to(tl.float32) - 8) * scale).to(out.dtype.element_ty), mask=inside)
        tl.store(low + 64, (((tile >> 4).to(tl.float32) - 8) * scale).to(out.dtype.element_ty), mask=inside)
    else:
        scale = tl.load(scales + row)
        tl.store(out + row * width + columns, (tile.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside)
