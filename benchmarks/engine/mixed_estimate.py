"""An estimate of the row "mixed" of gpu.py from the rates of its kernels alone, and from the limits of the GPU.

    python -m benchmarks.engine.mixed_estimate          table: results/engine.md
    python -m benchmarks.engine.mixed_estimate --step-tokens 2048

The engine's own scheduler schedules 512 requests as gpu.py draws them, and nothing is computed. The rates were measured on
one H200 (results/kernels.md, and profiles of gpu.py).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava.engine.kv_cache import BlockPool
from llava.engine.prompt import Prompt
from llava.engine.scheduler import Scheduler
from llava.engine.sequence import Sequence as RunningSequence

IMAGE_TOKENS = 576
LAYERS = 32
FLOPS_PER_TOKEN = 13.2e9  # of a 7B's linear layers
WEIGHT_BYTES = 13.2e9
BYTES_PER_TOKEN = 524_288  # keys and values

# Measured: bytes and operations per second, and milliseconds.
ATTENTION = 4.39e12  # 200 sequences of 896 tokens
PRODUCTS = 712e12  # of 4,096 rows, for seconds on end
STEP_ROWS, STEP_MS = (1, 8, 32, 64, 128, 256, 512), (3.15, 3.45, 3.59, 3.84, 4.5, 5.81, 9.5)  # all linear layers
SMALL_MS = 0.6  # norms, activations and sampling of a decoding step
ROW_US = 0.0125 + 0.0151 + 2 * 0.0073  # a layer's store, gate and norms, per prompt token
PROMPT_ATTENTION_MS = 3.3 / 4080  # per prompt token, of 680-token prompts, all layers
IMAGE_MS = 0.85  # the tower, six tiles together
# The limits of the GPU.
BEST_BYTES, BEST_PRODUCTS = 4.5e12, 793e12


@dataclass
class StepSize:
    running: int
    context: int  # of the running, together
    prompt_tokens: int


def steps(num_blocks: int, block_size: int, step_tokens: int) -> Iterator[StepSize]:
    """Yield the steps of the scheduler, each token being known at once."""
    rng = random.Random(0)
    pool = BlockPool(num_blocks, caching=False)
    scheduler = Scheduler(pool, block_size=block_size, max_running=512, max_step_tokens=step_tokens)
    for _ in range(512):
        num_text, num_new = rng.randint(32, 256), rng.randint(16, 512)
        length = 1 + num_text + IMAGE_TOKENS
        scheduler.add(RunningSequence(Prompt([5] * length, ()), max_total=length + num_new))
    while scheduler.has_work:
        step = scheduler.schedule()
        yield StepSize(
            len(step.decode), sum(chunk.stop for chunk in step.decode), sum(chunk.count for chunk in step.prefill)
        )
        for chunk in step.chunks:
            if chunk.samples:
                chunk.sequence.num_pending -= 1
                chunk.sequence.ids.append(5)
            if len(chunk.sequence.ids) >= chunk.sequence.max_total and not chunk.sequence.done:
                scheduler.remove(chunk.sequence)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3493, help="of the pool (default: what the benchmark had)")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--step-tokens", type=int, default=4096, help="prompt tokens in a step")
    args = parser.parse_args(argv)
    done = list(steps(args.blocks, args.block_size, args.step_tokens))
    decoding = [step for step in done if step.running]
    prompts = sum(step.prompt_tokens for step in done)
    read = BYTES_PER_TOKEN * sum(step.context for step in decoding)
    parts = {
        f"keys and values of running answers, {read / 1e12:.1f} TB": (read / ATTENTION, read / BEST_BYTES),
        f"linear layers of {len(decoding)} decoding steps": (
            float(np.interp([step.running for step in decoding], STEP_ROWS, STEP_MS).sum()) / 1e3,
            sum(max(WEIGHT_BYTES / BEST_BYTES, step.running * FLOPS_PER_TOKEN / BEST_PRODUCTS) for step in decoding),
        ),
        f"linear layers of {prompts:,} prompt tokens": (
            prompts * FLOPS_PER_TOKEN / PRODUCTS,
            prompts * FLOPS_PER_TOKEN / BEST_PRODUCTS,
        ),
        "their attention, norms and activations; images": (
            prompts * (LAYERS * ROW_US / 1e6 + PROMPT_ATTENTION_MS / 1e3) + 512 * IMAGE_MS / 1e3,
            0.0,
        ),
        "small kernels of decoding steps": (len(decoding) * SMALL_MS / 1e3, 0.0),
    }
    print(f"{len(done)} steps, {sum(step.running for step in done) / len(done):.0f} running on average\n")
    print("| | s, at the kernels' rates | s, at the GPU's |\n|---|---:|---:|")
    for name, (taken, least) in parts.items():
        print(f"| {name} | {taken:.1f} | {f'{least:.1f}' if least else '-'} |")
    print(
        f"| together | {sum(taken for taken, _ in parts.values()):.1f} | {sum(least for _, least in parts.values()):.1f} |"
    )


if __name__ == "__main__":
    main()
