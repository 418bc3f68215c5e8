"""The servers under load: many clients at once, killed processes, slow and malformed clients, memory over many requests.

In: nothing but the package and its embedded model (or --model-path). A controller and two workers are started on loopback,
get a bounded number of requests, and are stopped. Out: Markdown tables; the exit status is 1 if an expectation failed.

    python -m benchmarks.serve.load                                   all parts, on a CPU in about half an hour
    python -m benchmarks.serve.load --only concurrent --clients 500   one part
    python -m benchmarks.serve.load --only overhead --device cuda --shapes 7b --out results       the cost of HTTP, with a plot

Tables: results/serve.md and results/serve_overhead.md.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.serve.cluster import Cluster
from benchmarks.serve.concurrency import concurrent, memory, slow_readers
from benchmarks.serve.faults import controller, kill, malformed
from benchmarks.serve.overhead import overhead
from benchmarks.serve.report import PartReport

PARTS: dict[str, Callable[[Cluster, argparse.Namespace], PartReport]] = {
    "concurrent": concurrent,
    "memory": memory,
    "kill": kill,
    "controller": controller,
    "slow-readers": slow_readers,
    "malformed": malformed,
}
OVERHEAD = "overhead"  # needs a server of its own, in this process


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    known = [*PARTS, OVERHEAD]
    parser.add_argument("--only", choices=known, action="append", help="this part; may be given several times")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2, help="kill needs two; overhead has one of its own")
    parser.add_argument("--model-path")
    parser.add_argument("--device", default="auto")
    cost = parser.add_argument_group(OVERHEAD)
    cost.add_argument(
        "--shapes", choices=("tiny", "7b", "13b"), help="random numbers in these shapes, not a checkpoint"
    )
    cost.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    cost.add_argument("--levels", type=numbers, default=[1, 8, 32, 64, 128, 256], help="requests at once (1,8,32,...)")
    cost.add_argument("--image-levels", type=numbers, default=[1, 32], help="the same, with a new image each (1,32)")
    cost.add_argument("--rounds", type=int, default=3, help="of which the median is shown (default: 3)")
    cost.add_argument("--least", type=int, default=6, help="requests of a level that has few at once (default: 6)")
    cost.add_argument(
        "--engine-process", choices=("on", "off"), default="on", help="the server's engine in a process of its own (on)"
    )
    cost.add_argument("--out", type=Path, metavar="FOLDER", help="write table and plot there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "fastapi", "uvicorn"))
    print(f"Python {platform.python_version()}, {packages}, {os.cpu_count()} CPU cores", flush=True)
    names = args.only or [*PARTS, OVERHEAD]
    parts = on_a_cluster([name for name in names if name in PARTS], args)
    if OVERHEAD in names:
        parts.append(overhead(args))
        parts[-1].show()
    return int(any(part.failures for part in parts))


def on_a_cluster(names: Sequence[str], args: argparse.Namespace) -> list[PartReport]:
    """The parts that need a controller and workers as processes."""
    if not names:
        return []
    share = 0.9 / args.workers  # of a GPU that they share
    flags = ["--device", args.device, "--memory-fraction", f"{share:.2f}"]
    flags += ["--model-path", args.model_path] if args.model_path else []
    cluster, parts = Cluster.start(flags, num_workers=args.workers), []
    print(f"a controller and {args.workers} workers", flush=True)
    try:
        for name in names:
            parts.append(PARTS[name](cluster, args))
            parts[-1].show()
    finally:
        cluster.stop()
    return parts


if __name__ == "__main__":
    raise SystemExit(main())
