"""`llava bench`: measure the speed of a model on this machine, and compare it to the memory bandwidth.

In: a model folder. Out: time to first token, and tokens per second at several batch sizes, each with the limit that memory
bandwidth sets: a step reads all weights once, and the keys and values of each sequence. The comparison with other software
is benchmarks/engine/gpu.py and benchmarks/engine/cpu.py.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from llava.cli.model_flags import add_loading_flags, add_path_flag, find_model
from llava.cli.program import ArgumentParser, add_number
from llava.cli.startup import prepare
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError

if TYPE_CHECKING:
    import torch

    from llava.engine.engine import Engine
    from llava.engine.request import Request

EXAMPLES = """\
examples:
  llava bench                                  the small model in the package
  llava bench -m ./llava-v1.5-7b --sequences 1,8,64,256
  llava bench -m ./llava-v1.5-7b --weights int8
  llava bench --json > figures.json
"""
NUM_TEXT = 58  # tokens of a question
SHORT = 8  # new tokens of the run whose time is subtracted, which leaves the time of decoding alone


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava bench",
        description="Measure how fast a model answers on this machine, and compare it to what the memory allows.",
        epilog=EXAMPLES,
    )
    add_path_flag(parser)
    add_loading_flags(parser)
    parser.add_argument("--weights", metavar="KIND", help="hold the weights as int8, fp8 or int4")
    parser.add_argument("--sequences", default="1,8,64", metavar="N,...", help="batch sizes (default: 1,8,64)")
    add_number(parser, "--new-tokens", 128, "N", "of each answer")
    add_number(parser, "--runs", 3, "N", "of which the median counts")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(_run_prepared, argv)


def _run_prepared(args: Namespace) -> None:
    prepare()
    run(args)


def run(args: Namespace) -> None:
    sequences = read_numbers(args.sequences)
    for name, value in (("--new-tokens", args.new_tokens), ("--runs", args.runs)):
        if value < 1:
            raise InputError(f"{name} is {value}; give 1 or more")
    from llava.engine.config import EngineConfig

    config = EngineConfig(weights=args.weights, max_running=max(sequences), prefix_cache=False, feature_cache_bytes=0)
    path = find_model(args.model_path, args.mmproj)

    from llava.cli.terminal import quiet_libraries
    from llava.engine.engine import Engine
    from llava.model.builder import load

    quiet_libraries()
    loaded = load(path, base=args.model_base, device=args.device, dtype=args.dtype)
    with Engine.from_loaded(loaded, config) as engine:
        report = measure(engine, sequences, args.new_tokens, args.runs)
    print(json.dumps(asdict(report)) if args.json else as_table(report), flush=True)


def read_numbers(text: str) -> list[int]:
    """Parse numbers from 1, separated by commas."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"--sequences is {text!r}; give numbers from 1, separated by commas, such as 1,8,64")
    return numbers


@dataclass(frozen=True)
class Rate:
    """New tokens per second of a batch, and the limit that memory bandwidth sets."""

    num_sequences: int
    tokens_per_s: float
    limit_tokens_per_s: float


@dataclass(frozen=True)
class BenchReport:
    device: str
    weights: str
    weight_bytes: int
    bandwidth_bytes_per_s: float
    num_prompt_tokens: int
    first_token_s: float
    rates: list[Rate]


def measure(engine: Engine, sequences: Sequence[int], new_tokens: int, runs: int) -> BenchReport:
    draw = RandomRequests(engine)
    result = engine.generate(draw(1))  # compiles kernels and captures graphs
    num_prompt = result.usage.num_prompt_tokens
    decoder = engine._worker.runner.decoder
    bandwidth = memory_bandwidth(decoder.device)

    def limit(num: int) -> float:
        context = num_prompt + SHORT + new_tokens // 2
        return num * bandwidth / (decoder.weight_bytes + num * context * decoder.bytes_per_token)

    first = statistics.median(seconds(engine, [draw(1)]) for _ in range(max(runs, 3)))
    rates = [Rate(num, decode_rate(engine, draw, num, new_tokens, runs), limit(num)) for num in sequences]
    return BenchReport(
        device=device_name(decoder.device),
        weights=engine.config.weights or str(decoder.dtype).removeprefix("torch."),
        weight_bytes=decoder.weight_bytes,
        bandwidth_bytes_per_s=bandwidth,
        num_prompt_tokens=num_prompt,
        first_token_s=first,
        rates=rates,
    )


class RandomRequests:
    """Make requests that no cache holds: random tokens, and an image of random pixels where the model has a tower."""

    def __init__(self, engine: Engine) -> None:
        import numpy as np

        tower = getattr(engine.model, "get_vision_tower", lambda: None)()
        self._side = None if tower is None else tower.tile_size
        self._num_words = len(engine.tokenizer)
        self._draw = np.random.default_rng(0)

    def __call__(self, new_tokens: int) -> Request:
        import numpy as np
        from PIL import Image

        from llava.engine.request import Request, SamplingParams

        words = self._draw.integers(3, self._num_words, NUM_TEXT).tolist()
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        if self._side is None:
            return Request(words, sampling=params)
        pixels = self._draw.integers(0, 256, (self._side, self._side, 3), dtype=np.uint8)
        return Request([*words[:4], IMAGE_TOKEN_INDEX, *words[4:]], [Image.fromarray(pixels)], params)


def decode_rate(engine: Engine, draw: Callable[[int], Request], num: int, new_tokens: int, runs: int) -> float:
    """Return new tokens per second, from the difference of long and short answers."""
    long, short = (
        statistics.median(seconds(engine, [draw(new) for _ in range(num)]) for _ in range(runs))
        for new in (SHORT + new_tokens, SHORT)
    )
    return num * new_tokens / max(long - short, 1e-9)


def seconds(engine: Engine, requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    engine.generate(requests)
    return time.perf_counter() - started


def memory_bandwidth(device: torch.device) -> float:
    """Measure bytes per second: of a large copy on a GPU (read and written), of a large sum on a CPU (read)."""
    import torch

    buffer = torch.ones(2**28 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(buffer) if device.type == "cuda" else None
    times = []
    for _ in range(8):
        started = time.perf_counter()
        if target is None:
            buffer.sum()
        else:
            target.copy_(buffer)
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return buffer.nbytes * (1 if target is None else 2) / min(times)


def device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def as_table(report: BenchReport) -> str:
    lines = [
        f"{report.device}: {report.weight_bytes / 1e6:,.0f} MB of {report.weights} weights to read for each step, "
        f"{report.bandwidth_bytes_per_s / 1e9:,.1f} GB/s measured",
        f"first token of {report.num_prompt_tokens} prompt tokens: {1e3 * report.first_token_s:,.1f} ms",
        "",
        "sequences   tokens/s   limit of the memory",
    ]
    for rate in report.rates:
        speed, limit = rate.tokens_per_s, rate.limit_tokens_per_s
        lines.append(f"{rate.num_sequences:>9}  {speed:>9,.1f}   {limit:,.1f} ({speed / limit:.0%})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
