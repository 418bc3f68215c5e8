"""Report progress on the terminal, and stop a run at a signal without losing steps.

In: the trainer's events. Out: a line on stderr per log and a progress bar; after SIGTERM, SIGINT or SIGHUP a checkpoint and
an orderly end. The figures in the lines come from metrics.py.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.errors import InputError
from llava.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

# The lines of a run, for its log file; on the terminal they are printed beside the bar.
PROGRESS = logging.getLogger("llava.train.progress")
PROGRESS.propagate = False
PROGRESS.setLevel(logging.INFO)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


# How a line prints each figure, in this order; figures without an entry (total_flos, ...) go to trackers only.
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
    "train_runtime": lambda value: f"took {format_duration(value)}",
}


def log_line(logs: Mapping[str, object], step: int, max_steps: int, eta: float | None = None) -> str:
    """Format one dictionary of figures as one line."""
    parts = [text(value) for name, text in _COLUMNS.items() if isinstance(value := logs.get(name), (int, float))]
    if eta is not None and "loss" in logs:
        parts.append(f"ETA {format_duration(eta)}")
    return f"step {step:,}/{max_steps:,}  " + "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Format as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class ConsoleCallback(TrainerCallback):
    """Print lines on stderr, and below them a progress bar if stderr is a terminal."""

    def __init__(self, *, bar: bool) -> None:
        self.wants_bar = bar and sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.began = (0.0, 0)

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.began = (time.perf_counter(), state.global_step)
        if state.is_world_process_zero and self.wants_bar:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: dict[str, float] | None = None, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        since, first = self.began
        done = state.global_step - first
        eta = (time.perf_counter() - since) / done * (state.max_steps - state.global_step) if done else None
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)
        self.write(log_line(logs, state.global_step, state.max_steps, eta))

    def write(self, line: str) -> None:
        PROGRESS.info(line)
        try:
            if self.bar is not None:
                self.bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)
        except OSError:  # the terminal is gone, and the run goes on: train.log has its lines
            self.bar = None

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Stopped(Exception):
    """A signal ended the run after a checkpoint was written; `status` is the exit status that shells expect."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.status = 128 + signal_number
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} after step {step}, saved as checkpoint-{step}; the same command resumes from it"
        )


class StopCallback(TrainerCallback):
    """After SIGTERM, SIGINT or SIGHUP (the terminal is gone): finish the step, save, and end.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step > state.max_steps:
            raise InputError(
                f"the checkpoint is at step {state.global_step:,}, and this run ends at step {state.max_steps:,}; raise "
                "--num_train_epochs or --max_steps, or give another --output_dir"
            )

    def on_step_end(
        self, args: TrainingArguments, state: object, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        number = self._agreed(args)
        if number and not control.should_training_stop:
            self.signal_number = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def _agreed(self, args: TrainingArguments) -> int:
        """The signal that any rank got: ranks that stopped at different steps would wait for each other without end."""
        if args.world_size == 1:
            return self.signal_number
        number = torch.tensor(self.signal_number, device=args.device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals during the block, and restore their handlers afterwards.

        A SIGHUP that is ignored, as under nohup, stays so.
        """
        handled = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            handled.append(signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in handled}

        def handle(number: int, frame: object) -> None:
            self.signal_number = number
            for each, handler in before.items():
                signal.signal(each, handler)
            logger.warning("got %s: saving after this step; once more ends at once", signal.Signals(number).name)

        try:
            for number in before:
                signal.signal(number, handle)
        except ValueError:  # only the main thread gets signals; a run in another thread is stopped by its starter
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
