"""Matrix products of the engine's compiled CPU kernels beside PyTorch's, in GFLOP/s.

    python -m benchmarks.engine.cpu_matmul          table: results/engine_cpu.md

Shapes are those of the embedded model's layers and of a 7B's. The best quarter of many runs counts, since other programs
can only make a run slower.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from llava.engine.kernels.cpu.build import load
from llava.engine.kernels.cpu.native import NativeKernels
from llava.engine.kernels.quantized import quantize

SHAPES = ((320, 2048), (4096, 4096))  # inputs, outputs
ROWS = (1, 8, 64)
NUM_TRIES = 41


def seconds(product: Callable[[], object]) -> float:
    product()
    taken = []
    for _ in range(NUM_TRIES):
        began = time.perf_counter()
        product()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[NUM_TRIES // 4]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    functions = load()
    if functions is None:
        raise SystemExit("the compiled kernels need a C++ compiler, and this machine has none")
    kernels = NativeKernels(functions)
    columns = ("dtype", "inputs", "outputs", "rows", "ours", "with int8 weights", "PyTorch")
    print(f"| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|")
    for dtype in (torch.float32, torch.bfloat16):
        for width, outputs in SHAPES:
            weight = (torch.randn(outputs, width) * 0.02).to(dtype)
            packed, small = kernels.pack(weight), kernels.pack(quantize(weight, "int8"))
            for rows in ROWS:
                x = torch.randn(rows, width).to(dtype)
                ways = [
                    partial(kernels.linear, x, packed),
                    partial(kernels.linear, x, small),
                    partial(F.linear, x, weight),
                ]
                rates = [2 * rows * width * outputs / seconds(way) / 1e9 for way in ways]
                name = str(dtype).removeprefix("torch.")
                cells = " | ".join(f"{rate:.1f}" for rate in rates)
                print(f"| {name} | {width:,} | {outputs:,} | {rows} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
