"""Trace a training step on one sample: `trace_sample`.

In: a data file, the number of a sample, a model, training flags. Out: a trace with all points of training: the sample, its
prompt, ids and labels, the batch, the model's activations, the loss of each token, gradients and learning rates. Trainer,
dataset, collator and optimizer are those that `llava train` builds; no weight is changed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Span
from llava.data.formats import media_sources
from llava.data.media_files import image_label
from llava.diagnose.tracer.generation import Pixels, record_cost, record_layouts, record_pixels, record_prompt
from llava.diagnose.tracer.hooks import install_hooks, wrap
from llava.diagnose.tracer.record import Observation, Trace, tensor_stats
from llava.errors import InputError
from llava.images.image_processor import ImageProcessor
from llava.images.layout import plan
from llava.model.protocols import LlavaModel
from llava.text import labels as labels_module
from llava.text.tokenization import Tokenizer
from llava.train import data as data_module
from llava.train.arguments import parse_train_args
from llava.train.data import LazySupervisedDataset
from llava.train.llava_trainer import LLaVATrainer
from llava.train.run import build_trainer

PARTS = {
    "vision_tower": "vision tower",
    "mm_projector": "projector",
    "image_newline": "newline",
    "faster_token": "newline",
}
HARDEST = 5


def trace_sample(
    data_file: str,
    index: int,
    *,
    model_path: str,
    image_folder: str | None = None,
    flags: Sequence[str] = (),
    break_at: str | None = None,
) -> Trace:
    """Run one training step on one sample without changing a weight, and trace it.

    `flags` are flags of `llava train`, perhaps after a configuration file; they override the defaults set here. `break_at` is
    the point at which to open pdb.

    Raises:
        InputError: If there is no such sample, or the run has no vision tower.
    """
    with tempfile.TemporaryDirectory() as scratch:
        argv = run_arguments(data_file, model_path, image_folder, flags, output_dir=scratch)
        # stdout is for the trace.
        with contextlib.redirect_stdout(sys.stderr):
            trainer = build_trainer(*parse_train_args(argv))
        if not hasattr(trainer.model, "get_vision_tower"):
            raise InputError("the run has no vision tower, so there is nothing to trace; name one with --vision_tower")
        dataset = trainer.train_dataset
        if not 0 <= index < len(dataset):
            raise InputError(f"--index {index} is not in {data_file!r}, whose samples are 0 to {len(dataset) - 1}")
        record = Trace(trainer.model, trainer.processing_class, break_at=break_at)
        _step(record, trainer, index)
    record_cost(record)
    return record


def run_arguments(
    data_file: str, model_path: str, image_folder: str | None, flags: Sequence[str], *, output_dir: str
) -> list[str]:
    """Build the command line of a run of one sample: the model's own settings, then `flags`."""
    from llava.data.reader import read_model
    from llava.train.legacy_flags import parse_flags

    has_file = bool(flags) and not flags[0].startswith("-")
    own = [*flags[1:]] if has_file else [*flags]
    given = {flag.name for flag in parse_flags(own)}
    values: dict[str, object] = {"data_path": data_file, "output_dir": output_dir}
    values |= {"report_to": "none", "disable_tqdm": True}
    if image_folder is not None:
        values["image_folder"] = image_folder
    if not has_file:
        reader = read_model(model_path)
        values |= {"model_name_or_path": model_path, "version": reader.conv_mode}
        values["model_max_length"] = reader.max_length
    usual = [word for name, value in values.items() if name not in given for word in (f"--{name}", str(value))]
    return [*flags[:1], *usual, *own] if has_file else [*usual, *own]


def _step(record: Trace, trainer: LLaVATrainer, index: int) -> None:
    model, args = trainer.model, trainer.args
    record.add(_run_observation(trainer), trainer=trainer)
    _record_sample(record, trainer.train_dataset, index)
    with install_hooks(record), _hook_data(record, trainer):
        with record.stage("sample"):
            item = trainer.train_dataset[index]
        _record_labels(record, item)
        with record.stage("collator"):
            batch = trainer.data_collator([item])
        _record_batch(record, batch)
        model.train()
        args.fused_loss = False  # the loss of each token needs the logits
        inputs = trainer._prepare_inputs(batch)
        with record.stage("forward"), trainer.compute_loss_context_manager():
            loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        _record_loss(record, loss, outputs.logits)
        record.observations.pop("first_tokens", None)  # a training step generates none
        model.zero_grad(set_to_none=True)
        with record.stage("backward"):
            if torch.isfinite(loss):
                loss.backward()
        optimizer = trainer.create_optimizer()
        _record_gradients(record, model)
        _record_optimizer(record, optimizer, model)
        model.zero_grad(set_to_none=True)


@contextmanager
def _hook_data(record: Trace, trainer: LLaVATrainer) -> Iterator[None]:
    def on_ids(result: tuple[list[int], list[int]], spans: Sequence[Span], tokenizer: Tokenizer, **_: object) -> None:
        record_prompt(record, spans, result[0], tokenizer)

    def on_pixels(pixels: Pixels, images: Sequence[Image.Image], image_processor: ImageProcessor, config: Any) -> None:
        record_pixels(record, pixels, config.image_aspect_ratio, image_processor)
        record.images += images
        policy = record.model.image_policy()
        is_padded = policy.cuts_tiles and config.image_aspect_ratio == "pad"  # one of several images of a sample
        record.layouts += [
            replace(plan(image.size, policy, num_tiles=1 if is_padded else None), is_padded=is_padded)
            for image in images
        ]
        record_layouts(record, record.layouts, policy)

    with ExitStack() as stack:
        wrap(stack, labels_module, "encode_spans", on_ids, timed=(record, "tokens"))
        wrap(stack, data_module, "process_images", on_pixels, timed=(record, "pixels"))
        yield


def _run_observation(trainer: LLaVATrainer) -> Observation:
    model, args = trainer.model, trainer.args
    obs = Observation("arguments")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in model.parameters())
    by_part: dict[str, int] = {}
    for name, number in trained.items():
        by_part[part_of(name)] = by_part.get(part_of(name), 0) + number
    obs.facts = {
        "model_class": type(model).__name__,
        "parameters": total,
        "trained": sum(trained.values()),
        "trained_by_part": by_part,
        "compute_dtype": str(args.compute_dtype).removeprefix("torch."),
        "device": str(args.device),
        "model_max_length": trainer.processing_class.model_max_length,
        "learning_rate": args.learning_rate,
        "mm_projector_lr": args.mm_projector_lr,
    }
    obs.add("model", f"{type(model).__name__}, {total:,} parameters on {args.device}")
    parts = ", ".join(f"{part} {number:,}" for part, number in by_part.items())
    obs.add("trained", f"{sum(trained.values()):,}: {parts}")
    obs.add("precision", f"computed in {obs['compute_dtype']}; longest sequence {obs['model_max_length']} tokens")
    obs.check("trained", bool(trained), "something is trained" if trained else "every part is frozen")
    return obs


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to."""
    return next((part for key, part in PARTS.items() if key in name), "language model")


def _record_sample(record: Trace, dataset: LazySupervisedDataset, index: int) -> None:
    samples = dataset.list_data_dict
    part, row = samples.locate(index)
    sample = part.file[row]
    sources = media_sources(sample)
    num_placeholders = sum(str(turn.get("value", "")).count(DEFAULT_IMAGE_TOKEN) for turn in sample["conversations"])
    obs = Observation("sample")
    obs.facts = {
        "index": index,
        "id": samples.id(index),
        "fields": sorted(sample),
        "images": [image_label(source) for source in sources],
        "turns": [[turn["from"], turn["value"]] for turn in sample["conversations"]],
        "placeholders": num_placeholders,
    }
    obs.add("which", f"{samples.describe(index)} of {len(samples):,}; fields {', '.join(sorted(sample))}")
    for source in sources:
        obs.add("image", image_label(source))
    for turn in sample["conversations"]:
        obs.add(turn["from"], turn["value"], "text")
    obs.check("<image>", num_placeholders == len(sources), f"{num_placeholders} in the text, for {len(sources)} images")
    record.add(obs, sample=sample)


def _record_labels(record: Trace, item: dict[str, torch.Tensor]) -> None:
    tokenizer = record.tokenizer
    assert tokenizer is not None
    ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
    obs = Observation("labels", facts={"input_ids": ids, "labels": labels})
    trained = sum(label != IGNORE_INDEX for label in labels)
    obs.facts["trained"] = trained
    obs.add_spans("trained text", trained_spans(ids, labels, tokenizer))
    obs.add("count", f"{trained} of {len(ids)} tokens are trained")
    obs.check("something", trained > 0, "there is something to learn" if trained else "every label is -100")
    agree = all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    obs.check("labels", agree, "a label is its token, or -100" if agree else "labels are not those of their tokens")
    images = all(label == IGNORE_INDEX for token, label in zip(ids, labels, strict=True) if token == IMAGE_TOKEN_INDEX)
    obs.check("images", images, "-100 at every image" if images else "an image token is trained")
    record.add(obs, item=item)


def trained_spans(ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Split the text of tokens into (part, is trained)."""
    spans = []
    pairs = zip(ids, labels, strict=True)
    for (is_image, trained), run in itertools.groupby(
        pairs, key=lambda p: (p[0] == IMAGE_TOKEN_INDEX, p[1] != IGNORE_INDEX)
    ):
        tokens = [token for token, _ in run]
        spans.append((DEFAULT_IMAGE_TOKEN * len(tokens) if is_image else tokenizer.decode(tokens), trained))
    return spans


def _record_batch(record: Trace, batch: dict[str, torch.Tensor]) -> None:
    obs = Observation("batch")
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            obs.facts[name] = tensor_stats(value)
            obs.add_stats(name, obs.facts[name])
        else:
            obs.facts[name] = [list(entry.shape) if isinstance(entry, torch.Tensor) else list(entry) for entry in value]
            obs.add(name, f"a list of {len(value)}: {obs.facts[name]}")
    mask, labels = batch["attention_mask"], batch["labels"]
    alike = batch["input_ids"].shape == labels.shape == mask.shape
    obs.check("shapes", alike, f"ids, labels and mask are {list(labels.shape)}")
    hidden = bool((labels[~mask.bool()] == IGNORE_INDEX).all())
    obs.check("padding", hidden, "labels at padding are -100" if hidden else "padding is trained")
    record.add(obs, batch=batch)


def _record_loss(record: Trace, loss: torch.Tensor, logits: torch.Tensor) -> None:
    """Record the loss of each trained token, and check that their mean is the loss."""
    row = record["splice"]["rows"][0]
    labels = torch.tensor(row["labels"])
    logits = logits[0, : len(labels)].detach().float().cpu()
    each = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="none")
    places = (labels[1:] != IGNORE_INDEX).nonzero().flatten().tolist()
    values = [float(each[place]) for place in places]
    assert record.tokenizer is not None
    tokens = [record.tokenizer.convert_ids_to_tokens(int(labels[place + 1])) for place in places]
    obs = Observation("loss")
    obs.facts = {
        "loss": loss.item(),
        "tokens": [
            {"position": place + 1, "id": int(labels[place + 1]), "text": text, "loss": value}
            for place, text, value in zip(places, tokens, values, strict=True)
        ],
        "logits": tensor_stats(logits),
    }
    obs.add("loss", f"{loss.item():.4f} over {len(values)} tokens")
    obs.add("by token", "  ".join(f"{text} {value:.3g}" for text, value in zip(tokens, values, strict=True)), "text")
    hardest = sorted(zip(values, tokens, strict=True), reverse=True)[:HARDEST]
    obs.add("hardest", "  ".join(f"{text} {value:.3g}" for value, text in hardest), "text")
    finite = math.isfinite(loss.item())
    obs.check("finite", finite, "the loss is a number" if finite else "the loss is NaN or infinite")
    mean = sum(values) / len(values) if values else float("nan")
    # In half precision the loss itself is rounded.
    agrees = abs(mean - loss.item()) <= 1e-2 * max(1.0, abs(mean))
    obs.check("mean", agrees, f"the mean over the tokens is {mean:.4f}")
    record.add(obs, loss=loss, logits=logits)


def _record_gradients(record: Trace, model: LlavaModel) -> None:
    obs = Observation("gradients")
    parts: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        entry = parts.setdefault(part_of(name), {"parameters": 0, "trained": 0, "with_gradient": 0, "squares": 0.0})
        entry["parameters"] += parameter.numel()
        if parameter.requires_grad:
            entry["trained"] += parameter.numel()
            if parameter.grad is not None:
                entry["with_gradient"] += parameter.numel()
                entry["squares"] += float(parameter.grad.float().pow(2).sum())
    for part, entry in parts.items():
        norm = math.sqrt(entry.pop("squares")) if math.isfinite(entry["squares"]) else float("nan")
        obs.facts[part] = {**{key: int(value) for key, value in entry.items()}, "norm": norm}
        if not entry["trained"]:
            obs.add(part, f"frozen, {int(entry['parameters']):,} parameters")
            continue
        obs.add(part, f"norm {norm:.4g} over {int(entry['trained']):,} trained parameters")
        learns = math.isfinite(norm) and norm > 0
        obs.check(part, learns, "it learns" if learns else "it is to be trained and gets no gradient, or no finite one")
    record.add(obs, model=model)


def _record_optimizer(record: Trace, optimizer: torch.optim.Optimizer, model: LlavaModel) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    obs = Observation("optimizer", facts={"class": type(optimizer).__name__, "groups": []})
    for number, group in enumerate(optimizer.param_groups):
        norm = math.sqrt(sum(float(p.grad.float().pow(2).sum()) for p in group["params"] if p.grad is not None))
        parts = sorted({part_of(names[id(parameter)]) for parameter in group["params"]})
        size = sum(parameter.numel() for parameter in group["params"])
        entry = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        obs.facts["groups"].append(entry | {"parameters": size, "parts": parts, "gradient": norm})
        if size:
            obs.add(
                f"group {number + 1}",
                f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}, {size:,} parameters of "
                f"{', '.join(parts)}; gradient {norm:.4g}",
            )
    record.add(obs, optimizer=optimizer)
