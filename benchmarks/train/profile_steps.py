"""Profile single steps of a run of `llava train`.

    python -m benchmarks.train.profile_steps --at 45 --steps 3 --out steps -- --model_name_or_path ... --data_path ...

In: the flags of a run, which ends after the profiled steps and saves nothing. Out: the milliseconds of every step before
those; and for each profiled step how many operations the host started, how many kernels the GPU ran, and how long it was
busy. `--out DIR` gets the operations by time (operations.txt) and a trace for chrome://tracing or ui.perfetto.dev
(trace.json.gz). The profiler slows the host down, so that times are of other steps. Under torchrun the first process
reports.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from llava.train.arguments import parse_train_args
from llava.train.distributed import barrier_and_destroy_process_group
from llava.train.run import build_trainer
from llava.utils import is_first_process

ROWS = 60  # of operations.txt


class StepProfiler(TrainerCallback):
    """Records when steps begin, and profiles some."""

    def __init__(self, at: int, steps: int) -> None:
        self.at, self.steps = at, steps
        self.began: list[float] = []
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step <= self.at:
            self.began.append(time.perf_counter())
        if state.global_step == self.at and is_first_process():
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at + self.steps:
            if is_first_process():
                self.profiler.stop()
            control.should_training_stop = True

    def milliseconds(self) -> list[float]:
        """Return the time of each step before the profiled ones, its wait for data included."""
        return [round(1000 * (end - begin), 1) for begin, end in pairwise(self.began)]

    def figures(self) -> dict[str, float]:
        """Return the averages of the profiled steps."""
        events = [event for event in self.profiler.events() or [] if not event.is_user_annotation]
        on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
        busy = covered((event.time_range.start, event.time_range.end) for event in on_gpu)
        return {
            "host_operations": round(sum(event.device_type == DeviceType.CPU for event in events) / self.steps),
            "kernels": round(len(on_gpu) / self.steps),
            "gpu_busy_ms": round(busy / 1000 / self.steps, 2),
        }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of time spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=int, default=45, help="steps before the first profiled one (default: 45)")
    parser.add_argument("--steps", type=int, default=3, help="how many are profiled (default: 3)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write operations and trace there")
    parser.add_argument("flags", nargs="+", metavar="-- FLAGS", help="the flags of llava train")
    options = parser.parse_args(argv)
    if options.at < 1 or options.steps < 1:
        parser.error("--at and --steps count steps, from 1")
    trainer = build_trainer(*parse_train_args([*options.flags, "--save_strategy", "no"]))
    profiler = StepProfiler(options.at, options.steps)
    trainer.add_callback(profiler)
    trainer.train()
    barrier_and_destroy_process_group()
    if not is_first_process():
        return
    if trainer.state.global_step < options.at + options.steps:
        raise SystemExit(
            f"the run ended after {trainer.state.global_step} steps; take a smaller --at or more --max_steps"
        )
    print(json.dumps({"milliseconds": profiler.milliseconds()}))
    print(json.dumps(profiler.figures()))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        averages, clocks = profiler.profiler.key_averages(), ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        orders = [f"self_{clock}_time_total" for clock in clocks]
        tables = [averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=90) for order in orders]
        (options.out / "operations.txt").write_text("\n".join(tables), encoding="utf-8")
        profiler.profiler.export_chrome_trace(str(options.out / "trace.json.gz"))


if __name__ == "__main__":
    main()
