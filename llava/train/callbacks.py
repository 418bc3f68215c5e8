"""What a person at the terminal meets: one readable line per log, a progress bar, and a stop that loses nothing.

In: the trainer's events. Out: lines on stderr; a checkpoint and an orderly end after SIGTERM or SIGINT. The figures in
the lines are counted in metrics.py.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


# What a line says of a figure, in this order; figures without an entry (total_flos, ...) are for trackers only.
_COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "eval_loss": lambda value: f"validation loss {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad {value:.3g}",
    "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
    "images_per_second": lambda value: f"{value:,.1f} img/s",
    "mfu": lambda value: f"MFU {_percent(value)}",
    "memory_gib": lambda value: f"memory {value:.1f} GiB",
    "padding": lambda value: f"padding {_percent(value)}",
    "trained_tokens": lambda value: f"trained {_percent(value)}",
    "data_wait": lambda value: f"waiting for data {_percent(value)}",
    "train_loss": lambda value: f"mean loss {value:.4f}",
    "train_runtime": lambda value: f"took {_duration(value)}",
}


def log_line(logs: Mapping[str, Any], step: int, max_steps: int, eta: float | None = None) -> str:
    """One line for one dictionary of figures."""
    parts = [say(logs[name]) for name, say in _COLUMNS.items() if isinstance(logs.get(name), (int, float))]
    if eta is not None and "loss" in logs:
        parts.append(f"ETA {_duration(eta)}")
    return f"step {step:,}/{max_steps:,}  " + "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class ConsoleCallback(TrainerCallback):
    """Lines on stderr, and under them a bar with the time left where stderr is a terminal."""

    def __init__(self, *, bar: bool) -> None:
        self.wants_bar = bar and sys.stderr.isatty()
        self.bar: Any = None
        self.began = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = (time.perf_counter(), state.global_step)
        if state.is_world_process_zero and self.wants_bar:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        since, first = self.began
        done = state.global_step - first
        eta = (time.perf_counter() - since) / done * (state.max_steps - state.global_step) if done else None
        self.write(log_line(logs, state.global_step, state.max_steps, eta))

    def write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Stopped(Exception):
    """A signal ended the run after a checkpoint was written; `status` is the exit status that shells expect."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.status = 128 + signal_number
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} after step {step}, saved as checkpoint-{step}; the same command goes on from there"
        )


class StopCallback(TrainerCallback):
    """After SIGTERM or SIGINT: finish the step, save, and end. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        number = self._agreed(args)
        if number and not control.should_training_stop:
            self.signal_number = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def _agreed(self, args: Any) -> int:
        """The signal that any rank got; ranks that stopped at different steps would wait for each other for ever."""
        if args.world_size == 1:
            return self.signal_number
        number = torch.tensor(self.signal_number, device=args.device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals while the block runs, and leave them as they were afterwards."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: Any) -> None:
            self.signal_number = number
            for each, handler in before.items():
                signal.signal(each, handler)
            logger.warning("got %s: saving after this step; once more ends at once", signal.Signals(number).name)

        try:
            for number in before:
                signal.signal(number, note)
        except ValueError:  # signals are the main thread's; a run in another is stopped by whoever started it
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
