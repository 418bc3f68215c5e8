"""Clocks, rates of the device, memory readings and output that several benchmarks share."""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

# Time


def median_seconds(work: Callable[[], Any], runs: int, *, warm: int = 1, device: torch.device | None = None) -> float:
    """Return the median of `runs` calls after `warm` others; a CUDA device is waited for before and after each."""
    times = []
    for _ in range(warm + runs):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm:])


def synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()


def graph_seconds(work: Callable[[], Any], runs: int = 10) -> float:
    """Record `work` as a CUDA graph, and return the median time of its replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            work()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


# What a GPU can do


def gpu_bandwidth() -> float:
    """Return the bytes per second, read and written, of an operator that negates 4 GB."""
    source = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_seconds(lambda: torch.neg(source, out=target))


def gpu_matmul_rate() -> float:
    """Return the operations per second of a product of two bfloat16 squares of 8192."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / graph_seconds(lambda: left @ right)


# Memory


def free_memory() -> None:
    """Collect garbage and empty the CUDA allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def process_memory(pid: int, field: str) -> int:
    """Return a field of /proc/PID/status in bytes, such as VmRSS (resident), RssAnon (anonymous) or VmHWM (peak)."""
    found = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


# Output


def print_figures(**figures: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table whose first column is left-aligned and whose others are right-aligned."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there too")


def publish(text: str, output: Path | None) -> None:
    """Print a table, and write it to a file if one was asked for."""
    print(text, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text.rstrip() + "\n", encoding="utf-8")
