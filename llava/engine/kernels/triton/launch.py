"""Programmatic dependent launch, which all Triton kernels here use, and Triton's interpreter.

A kernel launched with `launch_pdl` may start while the previous one still runs. It lets its own successor start at once,
may read what never changes (weights), and waits before it reads anything else. The memory bus is then not idle between
kernels. Triton's interpreter, which runs kernels on a CPU for tests, supports neither this nor inline PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: bool = triton.knobs.runtime.interpret
MULTIPROCESSORS = 132  # of an H100 or H200; a smaller GPU gets more programs than it needs


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()


@triton.jit
def prefetch(lines):
    """Prefetch the lines of 128 bytes that these pointers lie in, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )
