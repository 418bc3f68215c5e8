"""Say what a run left: a model card, the curve of its loss, and the last lines on the terminal.

In: a trainer after its run, and the arguments. Out: `README.md` and `loss.svg` in the output folder, and lines with the
folder, the losses and commands that use the result. The log of the run, `train.log`, is written while it runs.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from llava.assets import embedded_model_path
from llava.data.media_files import locate_image
from llava.errors import InputError
from llava.model.checkpoints.catalog import EMBEDDED, repository_of
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.callbacks import PROGRESS, format_duration
from llava.train.data import LazySupervisedDataset
from llava.train.llava_trainer import LLaVATrainer
from llava.train.run_folder.loss_plot import draw, read_curve
from llava.train.run_folder.record import RunRecord
from llava.train.run_folder.save import saves_projector_only
from llava.train.run_folder.settings import Setting, settings_line

logger = logging.getLogger(__name__)

PRIVATE = ("hub_token",)
LOG_FILE, CURVE_FILE, CARD_FILE = "train.log", "loss.svg", "README.md"


@dataclass(frozen=True)
class RunSummary:
    """What a finished run is told about.

    Attributes:
        kind: What the folder holds: a LoRA adapter, a projector, a whole model.
        base: The model that the run started from, as it was given.
        losses: Last loss, mean loss and held-out loss, those that there are.
        question: Words of a `llava chat` that asks the result: an image of the data and its first question.
    """

    folder: str
    kind: str
    base: str
    steps: int
    epochs: float
    num_samples: int
    seconds: float
    losses: Mapping[str, float]
    question: Sequence[str]
    settings: Sequence[Setting] = ()

    def commands(self) -> list[str]:
        """Three commands that use the result, as one types them where the run was started."""
        merge = ["merge", "--model-path", self.folder, "--save-model-path", f"{self.folder.rstrip('/')}-merged"]
        third = merge if self.kind == "LoRA adapter" else ["doctor", self.folder]
        return [
            shlex.join(["llava", *words])
            for words in (["chat", "-m", self.folder, *self.question], ["serve", self.folder], third)
        ]

    def lines(self) -> list[str]:
        over = "" if self.kind == "model" else f" over {self.base}"
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        return [
            f"{self.folder}: {self.kind}{over}, {self.steps:,} steps on {self.num_samples:,} samples "
            f"({self.epochs:.3g} epochs) in {format_duration(self.seconds)}",
            *([losses] if losses else []),
            *([settings_line(self.settings)] if self.settings else []),
            f"written beside it: {CARD_FILE}, {LOG_FILE}" + (f", {CURVE_FILE}" if "loss" in self.losses else ""),
            "to use it:",
            *(f"  {command}" for command in self.commands()),
        ]


def summarize(trainer: LLaVATrainer, model: ModelArguments, data: DataArguments) -> RunSummary:
    """Collect what a finished run is told about."""
    args, history = trainer.args, trainer.state.log_history
    last = {name: value for entry in history for name, value in entry.items()}
    names = {"loss": "loss", "train_loss": "mean loss", "eval_loss": "held-out loss"}
    kind = "LoRA adapter" if args.lora_enable else "projector" if saves_projector_only(args) else "model"
    dataset = getattr(trainer.train_dataset, "samples", trainer.train_dataset)  # may be packed
    return RunSummary(
        folder=str(args.output_dir),
        kind=kind,
        base=str(model.model_name_or_path),
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0),
        num_samples=len(dataset),
        seconds=float(last.get("train_runtime", 0)),
        losses={shown: float(last[name]) for name, shown in names.items() if name in last},
        question=_question(dataset, data.image_folder) if isinstance(dataset, LazySupervisedDataset) else (),
        settings=cast("Sequence[Setting]", trainer.settings),
    )


def _question(dataset: LazySupervisedDataset, image_folder: str | None) -> list[str]:
    """An image file of the first samples and the question about it; only the question where images are in the data."""
    question: list[str] = []
    for index in range(min(len(dataset), 100)):
        try:
            sample = dataset.list_data_dict[index]
            part, _ = dataset.list_data_dict.locate(index)
            source = sample.get("image")
            image = locate_image(source, part.image_folder or image_folder) if isinstance(source, str) else None
        except InputError:  # a bad sample, which --on_bad_sample skip passed over
            continue
        turns = sample.get("conversations") or []
        if not turns:
            continue
        question = [" ".join(str(turns[0].get("value", "")).replace("<image>", " ").split())]
        if isinstance(image, str) and Path(image).is_file():
            return [image, *question]
    return question


def write_summary(trainer: LLaVATrainer, summary: RunSummary, record: RunRecord) -> None:
    """Write the model card and the curve."""
    folder = Path(trainer.args.output_dir)
    if "loss" in summary.losses:
        curve = replace(read_curve(folder), name=folder.name)
        (folder / CURVE_FILE).write_text(draw([curve]), encoding="utf-8")
    (folder / CARD_FILE).write_text(_card(summary, record), encoding="utf-8")


def _card(summary: RunSummary, record: RunRecord) -> str:
    """The card of the result: its base, its data, its settings and its losses."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    library = "peft" if summary.kind == "LoRA adapter" else "transformers"
    name = Path(summary.folder).resolve().name
    curve = [f"![loss of each logged step]({CURVE_FILE})", ""] if "loss" in summary.losses else []
    return "\n".join(
        [
            "---",
            *([f"base_model: {summary.base}"] if not Path(summary.base).exists() else []),
            f"library_name: {library}",
            "pipeline_tag: image-text-to-text",
            "tags: [llava]",
            "---",
            "",
            f"# {name}",
            "",
            f"A {summary.kind} trained from `{summary.base}` for {summary.steps:,} steps on {summary.num_samples:,} samples of "
            f"`{record.settings.get('data_path')}` ({summary.epochs:.3g} epochs, {format_duration(summary.seconds)}).",
            "",
            "| loss | |",
            "| --- | --- |",
            *(f"| {name} | {value:.4f} |" for name, value in summary.losses.items()),
            "",
            *curve,
            "## Use",
            "",
            "```bash",
            *summary.commands(),
            "```",
            "",
            "## Settings",
            "",
            "| setting | value | from |",
            "| --- | --- | --- |",
            *(f"| {each.name} | `{each.value}` | {each.origin} |" for each in _listed(summary.settings)),
            "",
            f"Trained with {versions}. The whole record is in `run.json`, the figures of each step in `trainer_state.json`.",
            "",
        ]
    )


def _listed(settings: Sequence[Setting]) -> list[Setting]:
    """The settings of a card: those that were given or taken from elsewhere, then the defaults that are something."""
    origins = ("given", "checkpoint", "derived", "default")
    listed = [each for each in settings if each.origin != "default" or each.value not in (None, "", False, [], {})]
    return sorted(
        (each for each in listed if each.name not in PRIVATE), key=lambda each: (origins.index(each.origin), each.name)
    )


class _LogFile(logging.FileHandler):
    """A log file; what cannot be written there is said once on the terminal, and the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        logger.warning("cannot write %s: the log of this run is not complete", self.baseFilename)


@contextmanager
def log_to_file(args: TrainingArguments) -> Iterator[None]:
    """Append progress and messages to `train.log` during the block."""
    if not args.should_save:
        yield
        return
    handler = _LogFile(Path(args.output_dir) / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger("llava"), PROGRESS]
    for each in loggers:
        each.addHandler(handler)
    try:
        yield
    finally:
        for each in loggers:
            each.removeHandler(handler)
        handler.close()


def remember_base(trainer: LLaVATrainer, model: ModelArguments) -> None:
    """Name the base of an adapter or a projector so that it is found from any folder: a local one by its absolute path."""
    args, config = trainer.args, trainer.model.config
    if not args.lora_enable and not saves_projector_only(args):
        for name in ("base_model_name_or_path", "base_model_relative_path"):  # of an adapter that the run started from
            if hasattr(config, name):
                delattr(config, name)
        return
    named = str(model.model_name_or_path)
    if named == EMBEDDED:  # a name that PEFT would ask the hub about
        named = str(embedded_model_path())
    if Path(named).exists():  # a folder, or a GGUF file
        # Relative to the output folder, for folders that are moved together.
        config.base_model_relative_path = os.path.relpath(named, args.output_dir)
        named = str(Path(named).absolute())
    else:
        named = repository_of(named) or named  # which other programs find too
    config.base_model_name_or_path = named
    for adapter in getattr(trainer.model, "peft_config", {}).values():
        adapter.base_model_name_or_path = named
