"""`with trace(model) as t:` watches whatever the model does in the block, and changes nothing of it.

In: a model, perhaps its tokenizer. Out: a `Trace`: observations by point, and how long each stage took. The watching is
done by hooks of torch and by wrappers around three methods of this one model, put there at the beginning of the block and
taken away at its end: a model that is not traced pays nothing. What hooks see is in hooks_vision.py and hooks_sequence.py;
the points around the model (prompt, ids, text; samples, labels, optimizer) are added by generation.py and training.py.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from llava.diagnose.tracer.hooks_sequence import see_generate, see_logits, see_splice, watch_language_model
from llava.diagnose.tracer.hooks_vision import see_image_features, see_pixels, see_tower, watch_projector
from llava.diagnose.tracer.record import POINTS, Observation, Stage
from llava.errors import InputError
from llava.images.layout import ImageLayout


class Trace:
    """What was seen. `trace["splice"]` is a point's observation, the last one where it was passed several times."""

    def __init__(self, model: Any, tokenizer: Any = None, *, break_at: str | None = None) -> None:
        if break_at is not None and break_at not in POINTS:
            raise InputError(f"there is no point {break_at!r} to break at; known: {', '.join(POINTS)}")
        self.model = model
        self.tokenizer = tokenizer
        self.break_at = break_at
        self.observations: dict[str, Observation] = {}
        self.stages: list[Stage] = []
        self.feature_lengths: list[int] = []
        self.images: list[Any] = []
        self.layouts: list[ImageLayout] = []
        self.began = time.perf_counter()

    def __getitem__(self, point: str) -> Observation:
        return self.observations[point]

    def __contains__(self, point: str) -> bool:
        return point in self.observations

    def __iter__(self) -> Iterator[Observation]:
        """In the order in which data flows."""
        return (self.observations[point] for point in POINTS if point in self.observations)

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(point, sentence) of every check that does not hold."""
        return [(seen.point, row.text) for seen in self for row in seen.failed]

    def note(self, seen: Observation, **values: Any) -> Observation:
        """Keep an observation; where it is the point to break at, open the debugger with `values` at hand."""
        self.observations[seen.point] = seen
        if seen.point == self.break_at:
            _debug(self, seen, values)
        return seen

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            self.end_stage(name, start)

    def clock(self) -> float:
        """Seconds since the beginning, once the GPU has done what it was given."""
        device = getattr(self.model, "device", None)
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - self.began

    def end_stage(self, name: str, start: float) -> None:
        self.stages.append(Stage(name, start, self.clock() - start, memory_in_use(self.model)))

    def as_json(self) -> dict[str, Any]:
        return {
            "points": [seen.as_json() for seen in self],
            "stages": [vars(stage) for stage in self.stages],
            "failed": [{"point": point, "text": text} for point, text in self.failed],
        }


@contextmanager
def trace(model: Any, tokenizer: Any = None, *, break_at: str | None = None) -> Iterator[Trace]:
    """Watch a LLaVA model within the block. With `break_at` the debugger opens at that point."""
    if not hasattr(model, "get_vision_tower"):
        raise InputError(f"a {type(model).__name__} is not a model of this package; load it with llava.load")
    record = Trace(model, tokenizer, break_at=break_at)
    with watching(record):
        yield record


@contextmanager
def watching(record: Trace) -> Iterator[None]:
    """The hooks of a trace, for as long as the block lasts."""
    model = record.model
    inner, tower = model.get_model(), model.get_vision_tower()
    with ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        if tower is not None:
            hook(tower.register_forward_pre_hook(see_pixels(record)))
            for module in (tower, inner.mm_projector):
                _time(record, module, "vision tower" if module is tower else "projector", hook)
            see_tower(record, tower, hook)  # later, so that its work is not timed
            watch_projector(record, inner.mm_projector, hook)
            wrap(stack, model, "image_features", see_image_features(record))
            wrap(stack, model, "_splice_batch", see_splice(record))
        watch_language_model(record, inner, hook)
        head = model.get_output_embeddings()
        if head is not None:
            hook(head.register_forward_hook(see_logits(record)))
        wrap(
            stack,
            model,
            "generate",
            see_generate(record),
            before=lambda: record.observations.pop("first_tokens", None),
        )
        yield


def memory_in_use(model: Any) -> int | None:
    """Bytes: of tensors on a GPU, else the largest that this process has been so far."""
    device = getattr(model, "device", None)
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# How it is put there and taken away


def _time(record: Trace, module: nn.Module, name: str, hook: Callable[[Any], None]) -> None:
    started: list[float] = []
    hook(module.register_forward_pre_hook(lambda *_: started.append(record.clock())))
    hook(module.register_forward_hook(lambda *_: record.end_stage(name, started.pop())))


def wrap(
    stack: ExitStack,
    owner: Any,
    name: str,
    see: Callable[..., None],
    *,
    before: Callable[[], object] | None = None,
    timed: tuple[Trace, str] | None = None,
) -> None:
    """Until the stack is closed, the function `owner.name` shows `see` what it gave and what it was given."""
    plain = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        with timed[0].stage(timed[1]) if timed is not None else nullcontext():
            result = plain(*args, **kwargs)
        see(result, *args, **kwargs)
        return result

    setattr(owner, name, watched)
    if isinstance(owner, nn.Module):  # its class has the method; the watched one was put over it
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, plain)


def _debug(record: Trace, seen: Observation, values: dict[str, Any]) -> None:
    """pdb, at a point: `seen` is the observation, and what the function had is there by name."""
    import pdb

    names = {**values, "seen": seen, "trace": record, "model": record.model}
    print(f"\nstopped at {seen.point}: {seen.title}, {seen.where}\nhere are {', '.join(names)}; c goes on, q ends")
    in_main = threading.current_thread() is threading.main_thread()
    stop = pdb.Pdb(nosigint=not in_main).set_trace
    # The debugger stops in the code that calls it: a line whose names are those of the point.
    exec(compile("stop()\nseen\n", f"<{seen.point}>", "exec"), {**names, "stop": stop})
