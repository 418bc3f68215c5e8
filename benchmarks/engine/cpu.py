"""The engine beside `model.generate` on a CPU, with the embedded model.

    python -m benchmarks.engine.cpu          table: results/engine_cpu.md

Both answer requests of 58 words and a new image in the same process, in turns in every round; medians of the rounds count.
Decode rate = 128 x sequences / (time for 136 new tokens - time for 8); "whole" is 136 new tokens with image and prompt. The
limit is the memory bandwidth over what a step reads: the weights, and every sequence's keys and values. `--tiny` runs one
short round as a check. Run it on a quiet machine: threads that wait for each other on a busy core measure other programs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers

from llava.assets import embedded_model_path
from llava.cli.bench import SHORT, RandomRequests, memory_bandwidth
from llava.engine.config import EngineConfig
from llava.engine.engine import Engine
from llava.engine.request import Request
from llava.model.builder import load

FORMS = {  # name: (dtype, weights of the engine)
    "float32": ("fp32", None),
    "int8 weights": ("fp32", "int8"),
    "bfloat16": ("bf16", None),
}


def stock(loaded: Any, requests: Sequence[Request]) -> None:
    """`model.generate` for a batch, from images and ids to tokens."""
    prompts: Any = [request.prompt for request in requests]  # lists of ids
    inputs = [loaded.processor("<image>", request.images) for request in requests]
    new = requests[0].sampling.max_new_tokens
    loaded.model.generate(
        torch.tensor(prompts),
        images=torch.cat([item.images for item in inputs]).to(loaded.model.dtype),
        image_sizes=[size for item in inputs for size in item.image_sizes],
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
    )


def measure(name: str, sequences: Sequence[int], rounds: int, new: int, clock: Callable[[], float]) -> list[str]:
    dtype, weights = FORMS[name]
    plain, ours = (load(embedded_model_path(), device="cpu", dtype=dtype) for _ in range(2))
    config = EngineConfig(weights=weights, prefix_cache=False, feature_cache_bytes=0)
    lines = []
    with Engine.from_loaded(ours, config) as engine:
        draw = RandomRequests(engine)
        decoder = engine._worker.runner.decoder
        for num in sequences:
            ways: dict[str, Callable[[list[Request]], Any]] = {"stock": partial(stock, plain), "ours": engine.generate}
            times: dict[tuple[str, int], list[float]] = {}
            for number in range(rounds + 1):  # the first is a warm-up
                for length in (SHORT, SHORT + new):
                    for way, take in ways.items():
                        requests = [draw(length) for _ in range(num)]
                        started = clock()
                        take(requests)
                        if number:
                            times.setdefault((way, length), []).append(clock() - started)
            middle = {key: statistics.median(values) for key, values in times.items()}
            rate = {way: num * new / (middle[way, SHORT + new] - middle[way, SHORT]) for way in ways}
            whole = {way: middle[way, SHORT + new] for way in ways}
            bandwidth = memory_bandwidth(torch.device("cpu"))
            context = engine.generate(draw(1)).usage.num_prompt_tokens + SHORT + new // 2
            limit = num * bandwidth / (decoder.weight_bytes + num * context * decoder.bytes_per_token)
            lines.append(
                f"| {name} | {num} | {rate['stock']:,.0f} | {rate['ours']:,.0f} | {rate['ours'] / rate['stock']:.2f} | "
                f"{limit:,.0f} | {whole['stock']:.2f} | {whole['ours']:.2f} | {whole['stock'] / whole['ours']:.2f} |"
            )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", default=",".join(FORMS), help=f"separated by commas: {', '.join(FORMS)}")
    parser.add_argument("--tiny", action="store_true", help="one short round")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time instead of wall time")
    args = parser.parse_args(argv)
    print("# The engine on a CPU\n")
    how = " --cpu-time" if args.cpu_time else ""
    print(
        f"`python -m benchmarks.engine.cpu{how}`: {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; load of the machine before: "
        f"{os.getloadavg()[0]:.1f}.\n"
    )
    titles = ["dtype", "sequences", "generate, tok/s", "engine, tok/s", "ratio", "limit, tok/s"]
    titles += ["whole: generate, s", "engine, s", "ratio"]
    print(f"| {' | '.join(titles)} |\n|---{'|---:' * (len(titles) - 1)}|")
    sequences, rounds, new = ((1, 2), 1, 8) if args.tiny else ((1, 8), args.rounds, 128)
    clock = time.process_time if args.cpu_time else time.perf_counter
    for name in args.forms.split(","):
        for line in measure(name, sequences, rounds, new, clock):
            print(line, flush=True)


if __name__ == "__main__":
    main()
