"""What a trace consists of: the points at which it looks, and what it saw there.

In: nothing. Out: `POINTS`, in the order in which data flows, and the values `Observation`, `Stage` and the figures of a
tensor. Looking is hooks.py's work for the model, generation.py's and training.py's for what happens around it; showing is
text.py's and html.py's. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """A place in the flow: what is looked at there, in which function, and what a surprise there would mean."""

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
    "cost": Point("time and memory", "llava/diagnose/tracer/hooks.py:Trace", "one stage that takes nearly everything"),
}


@dataclass(frozen=True)
class Row:
    """A line about a point. `tone`: "" plain, "good" and "bad" for what was checked, "text" for text to be kept as it is.

    `spans` cuts the text into stretches that are marked, or not.
    """

    label: str
    text: str
    tone: str = ""
    spans: tuple[tuple[str, bool], ...] = ()


@dataclass
class Notes:
    """Lines about one thing, some of them checks."""

    rows: list[Row] = field(default_factory=list, init=False)

    def say(self, label: str, text: str, tone: str = "") -> None:
        self.rows.append(Row(label, text, tone))

    def mark(self, label: str, spans: Sequence[tuple[str, bool]]) -> None:
        """Text of which stretches are marked: what is trained, say."""
        text = "".join(f"[{part}]" if marked else part for part, marked in spans)
        self.rows.append(Row(label, text, "text", tuple(spans)))

    def check(self, label: str, holds: bool, text: str) -> None:
        self.rows.append(Row(label, text, "good" if holds else "bad"))

    @property
    def failed(self) -> list[Row]:
        """What was checked and does not hold."""
        return [row for row in self.rows if row.tone == "bad"]


@dataclass
class Observation(Notes):
    """What was seen at a point: lines for people, facts for programs."""

    point: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return POINTS[self.point].title

    @property
    def where(self) -> str:
        return POINTS[self.point].where

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def as_json(self) -> dict[str, Any]:
        return {
            "point": self.point,
            "where": self.where,
            "facts": self.facts,
            "checks": [
                {"holds": row.tone == "good", "text": row.text} for row in self.rows if row.tone in ("good", "bad")
            ],
        }


@dataclass(frozen=True)
class Stage:
    """A stretch of time: seconds from the beginning, and how much memory was in use at its end."""

    name: str
    start: float
    seconds: float
    memory: int | None = None


def figures(tensor: Any) -> dict[str, Any]:
    """Shape, precision, place and range of a tensor; norms are those of its last axis."""
    facts: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
    }
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


def told(facts: dict[str, Any]) -> str:
    """Figures as one line."""
    line = f"{facts['shape']} {facts['dtype']} on {facts['device']}"
    if "mean" in facts:
        line += f", {facts['min']:.3g} to {facts['max']:.3g}, mean {facts['mean']:.3g}, norm {facts['norm']:.3g}"
    if facts.get("nan") or facts.get("inf"):
        line += f", {facts['nan']} NaN, {facts['inf']} infinite"
    return line


def is_finite(facts: dict[str, Any]) -> bool:
    return not facts.get("nan") and not facts.get("inf")


def check_finite(seen: Observation, facts: dict[str, Any]) -> None:
    seen.check("finite", is_finite(facts), "no NaN, no infinity" if is_finite(facts) else "NaN or infinity")
