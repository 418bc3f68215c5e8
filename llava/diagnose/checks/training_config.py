"""Checks of `llava doctor RUN.yaml`: faults of a training run that has not been started.

In: a configuration file and the model, tower, projector and data that it names. Out: a `DoctorReport`. The file is parsed as
`llava train` parses it; the model's folder, the projector and the first samples are examined as they will be used.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llava.conversation import Conversation, conv_templates
from llava.data.check import collect
from llava.data.reader import SampleReader
from llava.data.samples import Samples, open_samples
from llava.data.validate import SampleChecker
from llava.diagnose.checks.checkpoint import CHEAP
from llava.diagnose.checks.checkpoint_files import ExaminedCheckpoint, open_checkpoint
from llava.diagnose.checks.checkpoint_text import judge_template
from llava.diagnose.checks.checkpoint_vision import judge_projector, stored_projector
from llava.diagnose.checks.dataset import by_cause
from llava.diagnose.checks.findings import (
    CheckSkipped,
    DoctorCheck,
    DoctorFinding,
    DoctorReport,
    Fix,
    found,
    reported,
    run_checks,
)
from llava.errors import InputError
from llava.files import read_json
from llava.images.layout import ImagePolicy, image_mode, max_tiles_of
from llava.model.checkpoints.hub import HubOptions, looks_like_repository, resolve_vision_tower
from llava.model.checkpoints.weight_files import read_headers
from llava.model.config import ImageSettings

if TYPE_CHECKING:
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

FORMS = "set data_path to a .json, .jsonl or .parquet file of samples, or to a mixture"
# Samples of each file that are read with their images.
SAMPLES = 200
# Settings in a projector's config.json that the run has to share, by the run's argument.
SETTINGS = {
    "mm_vision_tower": "vision_tower",
    "mm_vision_select_layer": "mm_vision_select_layer",
    "mm_vision_select_feature": "mm_vision_select_feature",
    "mm_use_im_start_end": "mm_use_im_start_end",
    "image_aspect_ratio": "image_aspect_ratio",
}


class ExaminedRun:
    """A training run under examination, with results of checks that later ones need."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.model: ModelArguments
        self.data: DataArguments
        self.training: TrainingArguments
        self.fp16 = False
        self.tower: CLIPVisionTower | None = None

    @cached_property
    def base(self) -> ExaminedCheckpoint:
        return open_checkpoint(str(self.model.model_name_or_path))

    @cached_property
    def template(self) -> str:
        """The name of the run's template."""
        from llava.train.model_setup import name_template

        return name_template(self.model.version, self.base.extras["tokenizer"], self.base.values)

    @property
    def conv(self) -> Conversation:
        return conv_templates[self.template]

    @property
    def starts_with_projector(self) -> bool:
        """Whether the run starts from a trained projector."""
        return bool(self.model.pretrain_mm_mlp_adapter) or bool(stored_projector(self.base.tensors))


def examine_training(path: str | Path) -> DoctorReport:
    run = ExaminedRun(Path(path))
    checks = (
        DoctorCheck("arguments", _check_arguments),
        DoctorCheck("model", _check_base, needs=("arguments",)),
        DoctorCheck("frozen parts", _check_frozen, needs=("model",)),
        DoctorCheck("tower", _check_tower, needs=("model",)),
        DoctorCheck("projector file", _check_adapter, needs=("tower",)),
        DoctorCheck("template", _check_template, needs=("model",)),
        DoctorCheck("precision", _check_precision, needs=("model",)),
        DoctorCheck("data", _check_data, needs=("tower", "template")),
    )
    return run_checks(run, checks, DoctorReport(str(path), "training run"))


def _check_arguments(run: ExaminedRun) -> None:
    from llava.train.arguments import parse_train_args
    from llava.train.run import check_arguments

    with reported("run-arguments", "change the setting; llava train --help explains each", file=str(run.file)):
        try:
            parsed = parse_train_args([str(run.file)])
        except InputError as error:
            if "--fp16 needs a GPU" not in str(error):
                raise
            parsed = parse_train_args([str(run.file), "--fp16", "False"])
            run.fp16 = True  # judged for a machine with a GPU
        run.model, run.data, run.training = parsed
        run.fp16 = run.fp16 or run.training.fp16
        check_arguments(*parsed)


def _check_base(run: ExaminedRun) -> Iterator[DoctorFinding]:
    """Run the cheap checks of a checkpoint on the model's folder."""
    name = str(run.model.model_name_or_path)
    if not Path(name).is_dir():
        if looks_like_repository(name):
            raise CheckSkipped(f"{name} is a hub repository")
        remedy = "set model_name_or_path to the model to start from"
        yield found("run-base", f"there is no model folder {name!r}", remedy, path=name)
        return
    yield from run_checks(run.base, CHEAP, DoctorReport(name, "checkpoint")).findings


def _check_frozen(run: ExaminedRun) -> Iterator[DoctorFinding]:
    model, training = run.model, run.training
    multimodal = bool(model.vision_tower) or run.base.settings.vision.tower is not None
    numbers = {
        "tune_mm_mlp_adapter": model.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": training.freeze_mm_mlp_adapter,
        "freeze_backbone": model.freeze_backbone,
        "learning_rate": training.learning_rate,
        "mm_projector_lr": training.mm_projector_lr,
    }
    projector_rate = training.learning_rate if training.mm_projector_lr is None else training.mm_projector_lr
    all_frozen = model.tune_mm_mlp_adapter and (training.freeze_mm_mlp_adapter or projector_rate == 0)
    if (all_frozen and not model.unfreeze_mm_vision_tower) or (training.learning_rate == 0 and not projector_rate):
        yield found(
            "run-frozen",
            "nothing is trained: "
            + (
                "tune_mm_mlp_adapter trains the projector alone, and the projector is frozen"
                if all_frozen and training.freeze_mm_mlp_adapter
                else "the learning rate is 0"
            ),
            "take freeze_mm_mlp_adapter out, and give a learning rate above 0",
            **numbers,
        )
    elif multimodal and not run.starts_with_projector and (training.freeze_mm_mlp_adapter or projector_rate == 0):
        yield found(
            "run-projector-frozen",
            f"the run begins with a new projector, of random numbers, and does not train it "
            f"({'freeze_mm_mlp_adapter' if training.freeze_mm_mlp_adapter else 'mm_projector_lr 0'})",
            "train it (take freeze_mm_mlp_adapter out), or begin with a pretrained one (pretrain_mm_mlp_adapter)",
            **numbers,
        )


def _check_tower(run: ExaminedRun) -> Iterator[DoctorFinding]:
    """Check the tower that the run names, or the base's own, and the image settings for it."""
    from llava.model.multimodal_encoder.builder import build_vision_tower

    if not run.model.vision_tower:
        run.tower = run.base.extras.get("tower")
        return
    name = run.model.vision_tower
    base = run.base.folder if run.base.settings.vision.tower == name else None
    try:
        folder = resolve_vision_tower(name, checkpoint_folder=base, hub=HubOptions(local_files_only=True))
        run.tower = build_vision_tower(dataclasses.replace(run.model, vision_tower=folder), delay_load=True)
    except InputError as error:
        if looks_like_repository(name):
            raise CheckSkipped(f"the tower {name} is a hub repository and not on this disk") from error
        yield found("tower-missing", str(error), "set vision_tower to the tower's folder", vision_tower=name)
        return
    states = run.tower.num_layers + 1
    if not -states <= run.model.mm_vision_select_layer < states:
        yield found(
            "select-layer",
            f"mm_vision_select_layer is {run.model.mm_vision_select_layer}, but the tower has {states} hidden states",
            "set it to -2, as LLaVA-1.5 has it",
            hidden_states=states,
        )
    mode, pinpoints = run.data.image_aspect_ratio, run.data.image_grid_pinpoints
    with reported(
        "image-mode", "set image_aspect_ratio to square, pad, anyres or anyres_max_<N>", image_aspect_ratio=mode
    ):
        image_mode(mode)
    size = run.tower.tile_size
    remedy = f"give image_grid_pinpoints in multiples of {size}"
    with reported("pinpoints", remedy, tile_size=size, image_grid_pinpoints=pinpoints):
        _policy(run)
    own = run.base.settings.image
    is_equal = (image_mode(mode), max_tiles_of(mode)) == (own.mode, own.max_tiles)
    if stored_projector(run.base.tensors) and not run.model.pretrain_mm_mlp_adapter and not is_equal:
        yield found(
            "image-mode",
            f"the run prepares images by {mode!r}, and the model that it goes on from was trained with {own.aspect_ratio!r}",
            f"set image_aspect_ratio to {own.aspect_ratio}",
            fix=_set_in_yaml("image_aspect_ratio", own.aspect_ratio),
            run=mode,
            model=own.aspect_ratio,
        )


def _policy(run: ExaminedRun) -> ImagePolicy | None:
    from llava.model.multimodal_encoder.builder import policy_of

    if run.tower is None:
        return None
    if not run.model.vision_tower:
        return run.base.extras.get("policy")
    settings = ImageSettings.of(
        run.data.image_aspect_ratio,
        run.model.mm_patch_merge_type or "flat",
        run.data.image_grid_pinpoints,
        run.data.image_crop_resolution,
        run.data.image_split_resolution,
    )
    return policy_of(run.tower, settings)


def _check_adapter(run: ExaminedRun) -> Iterator[DoctorFinding]:
    """Check the projector file's layers against tower and language model, and its config.json against the run."""
    name = run.model.pretrain_mm_mlp_adapter
    if run.tower is None:
        return
    if not name:
        yield from _kept_projector(run)
        return
    file = Path(name)
    with reported("run-adapter", "name the mm_projector.bin of the pretraining run", path=name):
        headers = read_headers(file)
    faults = list(
        judge_projector(
            stored_projector(headers),
            kind=str(run.model.mm_projector_type),
            config_width=run.tower.hidden_size,
            tower_width=run.tower.hidden_size,
            text_width=run.base.values.get("hidden_size") or run.base.values.get("d_model"),
            place=name,
        )
    )
    yield from (dataclasses.replace(fault, fix=None) for fault in faults)
    if faults or not (file.parent / "config.json").is_file():
        return
    pretrained = read_json(file.parent / "config.json")
    arguments = {**vars(run.data), **vars(run.model)}
    other = {
        key: (pretrained[key], arguments[argument])
        for key, argument in SETTINGS.items()
        if key in pretrained
        and pretrained[key] != arguments[argument]
        and not _same_place(pretrained[key], arguments[argument])
    }
    if other:
        pairs = ((SETTINGS[key], *values) for key, values in other.items())
        changes = "; ".join(f"{name} was {theirs!r} and is {ours!r} now" for name, theirs, ours in pairs)
        yield found(
            "run-adapter-settings",
            f"{file.parent / 'config.json'} says what the projector was pretrained with: {changes}",
            "give the run the same settings",
            fix=_set_in_yaml(*itertools.chain(*((SETTINGS[key], theirs) for key, (theirs, _) in other.items()))),
            **{SETTINGS[key]: list(pair) for key, pair in other.items()},
        )


def _kept_projector(run: ExaminedRun) -> Iterator[DoctorFinding]:
    """Check mm_projector_type against a LLaVA that the run starts from: such a model keeps its projector."""
    own = run.base.settings.projector.type
    if run.model.vision_tower and stored_projector(run.base.tensors) and run.model.mm_projector_type != own:
        yield found(
            "projector-type",
            f"mm_projector_type is {run.model.mm_projector_type!r}, and the model that the run goes on from has and keeps a "
            f"projector of type {own!r}",
            f"set mm_projector_type to {own}, or start from the language model alone to train another projector",
            fix=_set_in_yaml("mm_projector_type", own),
            run=run.model.mm_projector_type,
            model=own,
        )


def _same_place(first: object, second: object) -> bool:
    """Whether two paths of a tower name the same folder."""
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    return Path(first).name == Path(second).name and "/" in first + second


def _check_template(run: ExaminedRun) -> Iterator[DoctorFinding]:
    with reported("run-template", "set version to the template that the model speaks", version=run.model.version):
        name, conv = run.template, run.conv
    if name == "plain":
        return
    tokenizer = run.base.extras["tokenizer"]
    for fault in judge_template(tokenizer, conv, name):
        yield dataclasses.replace(fault, remedy="set version to the template that the model speaks", fix=None)
        return
    spoken = run.base.extras.get("template") if stored_projector(run.base.tensors) else None
    if spoken is not None and _frame(conv_templates[spoken]) != _frame(conv):
        yield found(
            "run-template",
            f"version is {name!r}, and the model that the run goes on from speaks {spoken!r}",
            f"set version to {spoken}, unless the model is to learn another one",
            fix=_set_in_yaml("version", spoken),
            version=name,
            model=spoken,
        )


def _frame(conv: Conversation) -> tuple[object, ...]:
    """Return what a template puts around turns; the system text may differ."""
    return conv.sep_style, conv.roles, conv.sep, conv.sep2


def _check_precision(run: ExaminedRun) -> Iterator[DoctorFinding]:
    stored = {header.dtype for header in run.base.tensors.values()}
    if run.fp16 and "BF16" in stored:
        yield found(
            "run-precision",
            "fp16 is on, and the weights are stored in bfloat16: their activations may not fit into float16, which ends at "
            "65504",
            "set bf16 to True and fp16 to False",
            fix=_set_in_yaml("fp16", False, "bf16", True),
            stored=sorted(stored),
        )


def _check_data(run: ExaminedRun) -> Iterator[DoctorFinding]:
    """Check the first samples of every file, as the run will read them."""
    import numpy as np

    if not run.data.data_path:
        yield found("data-unreadable", "the run names no data", FORMS, data_path=None)
        return
    with reported("data-unreadable", FORMS, data_path=run.data.data_path):
        samples = open_samples(run.data.data_path, weights=run.data.data_weights).distinct()
    tokenizer = run.base.extras["tokenizer"]
    tokenizer.model_max_length = int(1e9)  # whether samples fit is judged with their images
    reader = SampleReader(
        tokenizer=tokenizer,
        policy=_policy(run),
        conv=run.conv,
        max_length=run.training.model_max_length,
        use_im_start_end=run.model.mm_use_im_start_end,
    )
    heads = [np.arange(min(SAMPLES, len(part)), dtype=np.int64) for part in samples.parts]
    first = Samples([dataclasses.replace(part, rows=rows) for part, rows in zip(samples.parts, heads, strict=True)])
    yield from by_cause(collect(SampleChecker(first, run.data.image_folder, reader)))


def _set_in_yaml(*pairs: object) -> Fix:
    """Make a fix that sets keys of the configuration file, in their groups."""
    changes = dict(zip(pairs[::2], pairs[1::2], strict=True))

    def fix(file: Path) -> str:
        lines = file.read_text(encoding="utf-8").splitlines()
        for key, value in changes.items():
            place = next((n for n, line in enumerate(lines) if line.strip().startswith(f"{key}:")), None)
            if place is None:
                lines.append(f"{key}: {value}")
            else:
                indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
                lines[place] = f"{indent}{key}: {value}"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"{file.name}: " + ", ".join(f"{key} = {value}" for key, value in changes.items())

    return fix
