"""The projector exercise of the self-test: another mm_projector_type, trained for some steps, saved, loaded and run.

In: a loaded model and its folder. Out: a `SelfTestItem`. The steps are those of a user who trains a language model with
`--mm_projector_type mlp3x_gelu`: in a copy of the model the projector is replaced by a new one of three layers,
LLaVATrainer trains only that on drawn shapes, and the resulting mm_projector.bin is loaded with the model as its base.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llava.diagnose.checks.sample_image import QUESTION
from llava.diagnose.tracer.record import SelfTestItem
from llava.engine.request import SamplingParams
from llava.errors import MissingPackageError, require

if TYPE_CHECKING:
    from PIL import Image

    from llava.model.builder import LoadedModel
    from llava.model.protocols import LlavaModel
    from llava.train.llava_trainer import LLaVATrainer

TYPE = "mlp3x_gelu"
COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
SHAPES = ("circle", "square")
BATCH = 4


def exercise_projector(loaded: LoadedModel, path: str, *, steps: int) -> SelfTestItem:
    """Train, save, load and run another projector; with `steps` 0 the item is skipped."""
    item = SelfTestItem(
        f"another projector: {TYPE}",
        (
            "llava/train/arguments.py:ModelArguments",
            "llava/model/multimodal_projector/builder.py:build_vision_projector",
            "llava/train/llava_trainer.py:LLaVATrainer",
            "llava/train/run_folder/save.py:save_projector",
            "llava/model/builder.py:load",
        ),
    )
    if not steps:
        item.skipped = "--skip-training leaves it out"
        return item
    if loaded.info.needs_base:
        item.skipped = "the folder stands on a base, and a projector's base has to be a whole model"
        return item
    try:
        require("accelerate", extra="train")
    except MissingPackageError as error:
        item.skipped = str(error)
        return item
    with tempfile.TemporaryDirectory() as scratch:
        _run_exercise(item, path, Path(scratch), steps=steps)
    return item


def _run_exercise(item: SelfTestItem, path: str, scratch: Path, *, steps: int) -> None:
    import torch

    from llava.model.builder import load
    from llava.model.config import LEARNED_ENDS
    from llava.model.multimodal_encoder.builder import save_tower
    from llava.session import Session
    from llava.train.run_folder.save import safe_save_model_for_hf_trainer

    # A training run prints; its numbers are in the item instead.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        trainer = _trainer(path, scratch, steps=steps)
        model = trainer.model
        old = _shapes(model)
        _replace_projector(model)
        new = _shapes(model)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])
        before = _loss(model, batch)
        trainer.train()
        after = _loss(model, batch)
        folder = scratch / "run"
        safe_save_model_for_hf_trainer(trainer, str(folder))
        save_tower(model.get_vision_tower(), model.config, folder)
    item.add("files", f"{TYPE} is a value of mm_projector_type, in config.json and as a flag; no code changes")
    item.add("before", ", ".join(f"{name} {shape}" for name, shape in old.items()))
    item.check("exchanged", len(new) == 3, ", ".join(f"{name} {shape}" for name, shape in new.items()))
    number = sum(parameter.numel() for parameter in model.get_model().mm_projector.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ends = (getattr(model.get_model(), name, None) for name in LEARNED_ENDS)
    alone = trained == number + sum(end.numel() for end in ends if end is not None)
    total = sum(parameter.numel() for parameter in model.parameters())
    item.check("trained", alone, f"{trained:,} of {total:,} parameters: the projector alone")
    losses = f"{before:.3f} before and {after:.3f} after {steps} steps"
    item.check("loss", after < before, f"{losses} of {BATCH} drawn shapes")
    files = sorted(file.name for file in folder.iterdir())
    item.check("saved", "mm_projector.bin" in files, f"the run leaves {', '.join(files)}")
    again = load(folder, base=path, device="cpu", dtype="fp32")
    own = dict(model.get_model().mm_projector.named_parameters())
    same = all(
        torch.allclose(tensor, own[name].detach().float().cpu(), atol=1e-6)
        for name, tensor in again.model.get_model().mm_projector.named_parameters()
    )
    same = same and again.model.config.mm_projector_type == TYPE
    item.check("loaded", same, "loaded over its base, number for number")
    answer = Session(again, sampling=SamplingParams(max_new_tokens=16)).answer(QUESTION, _draw("red", "circle"))
    item.check("run", bool(answer.strip()), f"asked {QUESTION!r} about a red circle, it says {answer!r}")


def _trainer(path: str, scratch: Path, *, steps: int) -> LLaVATrainer:
    """Build the trainer of a projector run on drawn shapes, as `llava train` does."""
    from llava.diagnose.tracer.training import run_arguments
    from llava.train.arguments import parse_train_args
    from llava.train.run import build_trainer

    images = scratch / "images"
    images.mkdir()
    records = []
    for colour in COLOURS:
        for shape in SHAPES:
            name = f"{colour}-{shape}.png"
            _draw(colour, shape).save(images / name)
            question = {"from": "human", "value": f"<image>\n{QUESTION}"}
            turns = [question, {"from": "gpt", "value": f"A {colour} {shape}."}]
            records.append({"id": name, "image": name, "conversations": turns})
    (scratch / "samples.json").write_text(json.dumps(records), encoding="utf-8")
    flags = {
        "tune_mm_mlp_adapter": True,
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": steps,
        "save_strategy": "no",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    argv = run_arguments(str(scratch / "samples.json"), path, str(images), words, output_dir=str(scratch / "run"))
    return build_trainer(*parse_train_args(argv))


def _replace_projector(model: LlavaModel) -> None:
    """Replace the projector as a run that starts from a language model does for `--mm_projector_type`."""
    from llava.model.multimodal_projector.builder import build_vision_projector

    old = next(model.get_model().mm_projector.parameters())
    model.config.mm_projector_type = TYPE
    model.get_model().mm_projector = build_vision_projector(model.config).to(device=old.device, dtype=old.dtype)


def _shapes(model: LlavaModel) -> dict[str, list[int]]:
    named = model.get_model().mm_projector.named_parameters()
    return {name: list(tensor.shape) for name, tensor in named if name.endswith("weight")}


def _loss(model: LlavaModel, batch: Mapping[str, object]) -> float:
    import torch

    move = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with torch.inference_mode():
        return float(model(**move).loss)


def _draw(colour: str, shape: str) -> Image.Image:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (224, 224), "white")
    pen = ImageDraw.Draw(image)
    draw = pen.ellipse if shape == "circle" else pen.rectangle
    draw((50, 50, 174, 174), fill=colour)
    return image
