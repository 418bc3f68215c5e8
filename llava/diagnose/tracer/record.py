"""The record types of a trace: points, observations, stages, and the `Trace` that holds them.

In: nothing. Out: `POINTS`, in the order in which data flows, `Trace`, and the types that it consists of. Observations of
the model are made by hooks.py, those of the code around it by generation.py and training.py; they are printed by text.py
and html.py. Importing this file does not import torch.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from llava.images.layout import ImageLayout
    from llava.model.protocols import LlavaModel
    from llava.text.tokenization import Tokenizer

# JSON content of an observation: numbers, strings, and lists and dicts of them.
Facts = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A place in the data flow: its title, the function that it is in, and what to suspect if its values are unexpected."""

    title: str
    where: str
    suspect: str


POINTS: dict[str, Point] = {
    "arguments": Point("arguments and model", "llava/model/builder.py:load", "the wrong folder, device or precision"),
    "sample": Point(
        "the sample", "llava/train/data.py:LazySupervisedDataset", "fields, speakers, <image> missing from the text"
    ),
    "template": Point(
        "conversation template",
        "llava/conversation.py:Conversation.spans",
        "another template than in training: --conv-mode",
    ),
    "image": Point(
        "image and layout", "llava/images/layout.py:plan", "image_aspect_ratio or pinpoints of another model"
    ),
    "pixels": Point(
        "pixels", "llava/mm_utils.py:process_images", "shape or range: image_aspect_ratio, the preprocessor"
    ),
    "prompt": Point(
        "prompt", "llava/conversation.py:Conversation.get_prompt", "no <image>, or roles of another template"
    ),
    "input_ids": Point(
        "token ids", "llava/text/tokenization.py:tokenizer_image_token", "no -200: the prompt has no <image>"
    ),
    "labels": Point(
        "labels", "llava/text/labels.py:preprocess", "questions trained, or answers not: template or turn order"
    ),
    "batch": Point(
        "batch", "llava/train/data.py:DataCollatorForSupervisedDataset", "padding that is trained, cut answers"
    ),
    "limit": Point("room for new tokens", "llava/engine/request.py:PromptSize.room", "a prompt that fills the context"),
    "tower": Point(
        "vision tower",
        "llava/model/multimodal_encoder/clip_encoder.py:CLIPVisionTower.forward_feature",
        "another layer than in training, NaN, half precision",
    ),
    "projector": Point(
        "projector", "llava/model/llava_arch.py:encode_images", "weights of another tower or model, or never trained"
    ),
    "image_features": Point(
        "features of each image", "llava/model/merge.py:merge_tiles", "another number than the layout says"
    ),
    "splice": Point(
        "text and images in one sequence",
        "llava/model/llava_arch.py:prepare_inputs_labels_for_multimodal",
        "length, mask, positions or labels that do not match",
    ),
    "layers": Point(
        "language model, layer by layer",
        "llava/model/llava_arch.py:LlavaMetaForCausalLM.forward",
        "NaN, or norms that explode",
    ),
    "first_tokens": Point(
        "first new tokens", "llava/model/llava_arch.py:generate", "flat or certain from the start: weights or template"
    ),
    "text": Point(
        "text", "llava/text/detokenizer.py:IncrementalDetokenizer", "special tokens left over, an end that never comes"
    ),
    "loss": Point(
        "loss by token", "llava/train/llava_trainer.py:LLaVATrainer.compute_loss", "NaN: no trained token, or overflow"
    ),
    "gradients": Point(
        "gradients", "llava/train/llava_trainer.py:LLaVATrainer.training_step", "parts that should learn and get none"
    ),
    "optimizer": Point(
        "learning rates",
        "llava/train/llava_trainer.py:LLaVATrainer.create_optimizer",
        "the projector without its own rate",
    ),
    "cost": Point("time and memory", "llava/diagnose/tracer/record.py:Trace", "one stage that takes nearly everything"),
}


@dataclass(frozen=True)
class Row:
    """A printed line of an observation.

    `tone` is "" for plain text, "good" or "bad" for the result of a check, "text" for text whose line breaks are kept.
    `spans` splits the text into (part, is highlighted).
    """

    label: str
    text: str
    tone: str = ""
    spans: tuple[tuple[str, bool], ...] = ()


@dataclass
class Rows:
    """Printed lines about one subject; some of them are checks."""

    rows: list[Row] = field(default_factory=list, init=False)

    def add(self, label: str, text: str, tone: str = "") -> None:
        self.rows.append(Row(label, text, tone))

    def add_stats(self, label: str, facts: Facts) -> None:
        """Add the result of `tensor_stats`."""
        self.add(label, describe_stats(facts))

    def add_spans(self, label: str, spans: Sequence[tuple[str, bool]]) -> None:
        """Add text with highlighted parts, the trained tokens for example."""
        text = "".join(f"[{part}]" if highlighted else part for part, highlighted in spans)
        self.rows.append(Row(label, text, "text", tuple(spans)))

    def check(self, label: str, holds: bool, text: str) -> None:
        self.rows.append(Row(label, text, "good" if holds else "bad"))

    @property
    def failed(self) -> list[Row]:
        """The checks that do not hold."""
        return [row for row in self.rows if row.tone == "bad"]


@dataclass
class Observation(Rows):
    """What was recorded at a point: rows to print, facts as JSON."""

    point: str
    facts: Facts = field(default_factory=dict)

    @property
    def title(self) -> str:
        return POINTS[self.point].title

    @property
    def where(self) -> str:
        return POINTS[self.point].where

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def as_json(self) -> Facts:
        return {
            "point": self.point,
            "where": self.where,
            "facts": self.facts,
            "checks": [
                {"holds": row.tone == "good", "text": row.text} for row in self.rows if row.tone in ("good", "bad")
            ],
        }


@dataclass
class SelfTestItem(Rows):
    """An item of `llava selftest`. `where` are the functions (file:name) that it runs through, in order."""

    title: str
    where: tuple[str, ...]
    skipped: str = ""
    seconds: float = field(default=0.0, init=False)

    @property
    def passed(self) -> bool:
        return not self.failed and any(row.tone == "good" for row in self.rows)

    def as_json(self) -> Facts:
        lines = [(row.tone, {"label": row.label, "text": row.text}) for row in self.rows]
        return {
            "title": self.title,
            "where": list(self.where),
            "state": "skipped" if self.skipped else "passed" if self.passed else "failed",
            "because": self.skipped or None,
            "checks": [{**line, "holds": tone == "good"} for tone, line in lines if tone in ("good", "bad")],
            "notes": [line for tone, line in lines if tone not in ("good", "bad")],
        }


@dataclass(frozen=True)
class Stage:
    """A timed stage: start and duration in seconds since the trace began, and the bytes of memory in use at its end."""

    name: str
    start: float
    seconds: float
    memory: int | None = None


class Trace:
    """Everything that was recorded. `trace["splice"]` is a point's last observation.

    Without a tokenizer, tokens are shown as ids. `break_at` is the point (a key of `POINTS`) at which to open pdb.
    """

    def __init__(self, model: LlavaModel, tokenizer: Tokenizer | None = None, *, break_at: str | None = None) -> None:
        if break_at is not None and break_at not in POINTS:
            raise InputError(f"there is no point {break_at!r} to break at; known: {', '.join(POINTS)}")
        self.model = model
        self.tokenizer = tokenizer
        self.break_at = break_at
        self.observations: dict[str, Observation] = {}
        self.stages: list[Stage] = []
        self.feature_lengths: list[int] = []
        self.images: list[Image.Image] = []
        self.layouts: list[ImageLayout] = []
        self.began = time.perf_counter()

    def __getitem__(self, point: str) -> Observation:
        return self.observations[point]

    def __contains__(self, point: str) -> bool:
        return point in self.observations

    def __iter__(self) -> Iterator[Observation]:
        """Iterate in the order in which data flows."""
        return (self.observations[point] for point in POINTS if point in self.observations)

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(point, text) of every check that does not hold."""
        return [(observation.point, row.text) for observation in self for row in observation.failed]

    def add(self, observation: Observation, **values: object) -> None:
        """Store an observation. At the point to break at, open the debugger with `values` as local names."""
        self.observations[observation.point] = observation
        if observation.point == self.break_at:
            _debug(self, observation, values)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            self.end_stage(name, start)

    def clock(self) -> float:
        """Seconds since the trace began, after waiting for the GPU."""
        device = getattr(self.model, "device", None)
        if device is not None and device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        return time.perf_counter() - self.began

    def end_stage(self, name: str, start: float) -> None:
        self.stages.append(Stage(name, start, self.clock() - start, memory_in_use(self.model)))

    def as_json(self) -> Facts:
        return {
            "points": [observation.as_json() for observation in self],
            "stages": [vars(stage) for stage in self.stages],
            "failed": [{"point": point, "text": text} for point, text in self.failed],
        }


def memory_in_use(model: LlavaModel) -> int | None:
    """Bytes of tensors on the model's GPU; on the CPU, the peak of this process so far."""
    device = getattr(model, "device", None)
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class TraceStopped(InputError):
    """Raised when the user quits the debugger. An engine passes an InputError on as it is, and logs no traceback."""


def _debug(record: Trace, observation: Observation, values: dict[str, object]) -> None:
    """Open pdb with the point's values as local names."""
    import bdb
    import pdb

    names = {**values, "observation": observation, "trace": record, "model": record.model}
    print(
        f"\nstopped at {observation.point}: {observation.title}, {observation.where}\n"
        f"names: {', '.join(names)}; c continues, q quits"
    )
    in_main = threading.current_thread() is threading.main_thread()
    stop = pdb.Pdb(nosigint=not in_main).set_trace
    # pdb stops in the code that calls set_trace: a line whose names are those of the point.
    try:
        exec(compile("stop()\nobservation\n", f"<{observation.point}>", "exec"), {**names, "stop": stop})
    except bdb.BdbQuit:
        raise TraceStopped(f"the trace was left at {observation.point}") from None


def tensor_stats(tensor: Tensor) -> Facts:
    """Shape, dtype, device and range of a tensor. `norm` is the mean norm over its last axis."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    facts: Facts = {"shape": list(tensor.shape), "dtype": dtype, "device": str(tensor.device)}
    if not tensor.numel():
        return facts
    if not tensor.is_floating_point():
        return facts | {"min": int(tensor.min()), "max": int(tensor.max())}
    values = tensor.detach().float()
    finite = values.isfinite()
    nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
    values = values.where(finite, values.new_zeros(()))
    return facts | {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "norm": float(values.norm(dim=-1).mean()) if values.dim() else float(values.abs()),
        "nan": nan,
        "inf": inf,
    }


def describe_stats(facts: Facts) -> str:
    """Format the result of `tensor_stats` as one line."""
    line = f"{facts['shape']} {facts['dtype']} on {facts['device']}"
    if "mean" in facts:
        line += f", {facts['min']:.3g} to {facts['max']:.3g}, mean {facts['mean']:.3g}, norm {facts['norm']:.3g}"
    if facts.get("nan") or facts.get("inf"):
        line += f", {facts['nan']} NaN, {facts['inf']} infinite"
    return line


def is_finite(facts: Facts) -> bool:
    return not facts.get("nan") and not facts.get("inf")


def check_finite(observation: Observation, facts: Facts) -> None:
    finite = is_finite(facts)
    observation.check("finite", finite, "no NaN, no infinity" if finite else "NaN or infinity")
