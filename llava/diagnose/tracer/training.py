"""One training sample, taken through a whole step of a run and watched: `trace_sample`.

In: a data file, the number of a sample, a model, training flags. Out: the trace with all points of training: the sample,
its prompt, ids and labels, the batch, the model's inside, the loss of each token, gradients and learning rates. Trainer,
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
from typing import Any

import torch
from torch.nn import functional as F

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.formats import image_sources
from llava.data.image_files import image_label
from llava.diagnose.tracer.generation import note_cost, note_ids, note_layouts, note_pixels, note_prompt
from llava.diagnose.tracer.hooks import Trace, watching, wrap
from llava.diagnose.tracer.record import Observation, figures, told
from llava.errors import InputError
from llava.images.layout import plan
from llava.text import labels as labels_module
from llava.train import data as data_module
from llava.train.arguments import parse_train_args
from llava.train.run import build_trainer

PARTS = {"vision_tower": "vision tower", "mm_projector": "projector", "image_newline": "newline"}
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
    """`flags` are those of `llava train`, or begin with its configuration file; they win over what is set here."""
    with tempfile.TemporaryDirectory() as scratch:
        argv = run_arguments(data_file, model_path, image_folder, flags, output_dir=scratch)
        # What training prints belongs to no trace.
        with contextlib.redirect_stdout(sys.stderr):
            trainer = build_trainer(*parse_train_args(argv))
        if not hasattr(trainer.model, "get_vision_tower"):
            raise InputError("the run has no vision tower, so there is nothing to trace; name one with --vision_tower")
        dataset = trainer.train_dataset
        if not 0 <= index < len(dataset):
            raise InputError(f"--index {index} is not in {data_file!r}, whose samples are 0 to {len(dataset) - 1}")
        record = Trace(trainer.model, trainer.processing_class, break_at=break_at)
        _step(record, trainer, index)
    note_cost(record)
    return record


def run_arguments(
    data_file: str, model_path: str, image_folder: str | None, flags: Sequence[str], *, output_dir: str
) -> list[str]:
    """The command line of a run of one sample: what the model itself says, then what was asked for."""
    from llava.data.reader import read_model
    from llava.train.legacy_flags import parse_flags

    has_file = bool(flags) and not flags[0].startswith("-")
    own = [*flags[1:]] if has_file else [*flags]
    given = {flag.name for flag in parse_flags(own)}
    values: dict[str, Any] = {
        "data_path": data_file,
        "output_dir": output_dir,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if image_folder is not None:
        values["image_folder"] = image_folder
    if not has_file:
        reader = read_model(model_path)
        values |= {
            "model_name_or_path": model_path,
            "version": reader.conv.version,
            "model_max_length": reader.max_length,
        }
    usual = [word for name, value in values.items() if name not in given for word in (f"--{name}", str(value))]
    return [*flags[:1], *usual, *own] if has_file else [*usual, *own]


def _step(record: Trace, trainer: Any, index: int) -> None:
    model, args = trainer.model, trainer.args
    record.note(_seen_run(trainer), trainer=trainer)
    _note_sample(record, trainer.train_dataset, index)
    with watching(record), _watching_data(record, trainer):
        with record.stage("sample"):
            item = trainer.train_dataset[index]
        _note_labels(record, item)
        with record.stage("collator"):
            batch = trainer.data_collator([item])
        _note_batch(record, batch)
        model.train()
        args.fused_loss = False  # the loss of each token needs the logits
        inputs = trainer._prepare_inputs(batch)
        with record.stage("forward"), trainer.compute_loss_context_manager():
            loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        _note_loss(record, loss, outputs.logits)
        record.observations.pop("first_tokens", None)  # of training there are none
        model.zero_grad(set_to_none=True)
        with record.stage("backward"):
            if torch.isfinite(loss):
                loss.backward()
        optimizer = trainer.create_optimizer()
        _note_gradients(record, model)
        _note_optimizer(record, optimizer, model)
        model.zero_grad(set_to_none=True)


@contextmanager
def _watching_data(record: Trace, trainer: Any) -> Iterator[None]:
    def see_ids(result: Any, spans: Any, tokenizer: Any, **_: Any) -> None:
        note_prompt(record, spans)
        note_ids(record, result[0], tokenizer)

    def see_pixels(pixels: Any, images: Any, image_processor: Any, config: Any) -> None:
        note_pixels(record, pixels, config.image_aspect_ratio, image_processor)
        record.images += images
        policy = record.model.image_policy()
        record.layouts += [plan(image.size, policy) for image in images]
        note_layouts(record, record.layouts, policy)

    with ExitStack() as stack:
        wrap(stack, labels_module, "encode_spans", see_ids, timed=(record, "tokens"))
        wrap(stack, data_module, "process_images", see_pixels, timed=(record, "pixels"))
        yield


def _seen_run(trainer: Any) -> Observation:
    model, args = trainer.model, trainer.args
    seen = Observation("arguments")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in model.parameters())
    by_part: dict[str, int] = {}
    for name, number in trained.items():
        by_part[part_of(name)] = by_part.get(part_of(name), 0) + number
    seen.facts = {
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
    seen.say("model", f"{type(model).__name__}, {total:,} parameters on {args.device}")
    seen.say(
        "trained", f"{sum(trained.values()):,}: " + ", ".join(f"{part} {number:,}" for part, number in by_part.items())
    )
    seen.say("precision", f"computed in {seen['compute_dtype']}; longest sequence {seen['model_max_length']} tokens")
    seen.check("trained", bool(trained), "something is trained" if trained else "every part is frozen")
    return seen


def part_of(name: str) -> str:
    """Which part of a model a parameter belongs to."""
    return next((part for key, part in PARTS.items() if key in name), "language model")


def _note_sample(record: Trace, dataset: Any, index: int) -> None:
    samples = dataset.list_data_dict
    part, row = samples.locate(index)
    sample = part.file[row]
    sources = image_sources(sample)
    marks = sum(str(turn.get("value", "")).count(DEFAULT_IMAGE_TOKEN) for turn in sample["conversations"])
    seen = Observation("sample")
    seen.facts = {
        "index": index,
        "id": samples.id(index),
        "fields": sorted(sample),
        "images": [image_label(source) for source in sources],
        "turns": [[turn["from"], turn["value"]] for turn in sample["conversations"]],
        "marks": marks,
    }
    seen.say("which", f"{samples.describe(index)} of {len(samples):,}; fields {', '.join(sorted(sample))}")
    for source in sources:
        seen.say("image", image_label(source))
    for turn in sample["conversations"]:
        seen.say(turn["from"], turn["value"], "text")
    seen.check("<image>", marks == len(sources), f"{marks} in the text, for {len(sources)} images")
    record.note(seen, sample=sample)


def _note_labels(record: Trace, item: dict[str, Any]) -> None:
    ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
    seen = Observation("labels", facts={"input_ids": ids, "labels": labels})
    trained = sum(label != IGNORE_INDEX for label in labels)
    seen.facts["trained"] = trained
    seen.mark("trained text", marked_text(ids, labels, record.tokenizer))
    seen.say("count", f"{trained} of {len(ids)} tokens are trained")
    seen.check("something", trained > 0, "there is something to learn" if trained else "every label is -100")
    agree = all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    seen.check("labels", agree, "a label is its token, or -100" if agree else "labels are not those of their tokens")
    images = all(label == IGNORE_INDEX for token, label in zip(ids, labels, strict=True) if token == IMAGE_TOKEN_INDEX)
    seen.check("images", images, "-100 at every image" if images else "an image's mark is trained")
    record.note(seen, item=item)


def marked_text(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of tokens, in stretches that are trained and that are not."""
    spans = []
    pairs = zip(ids, labels, strict=True)
    for (is_image, trained), run in itertools.groupby(
        pairs, key=lambda p: (p[0] == IMAGE_TOKEN_INDEX, p[1] != IGNORE_INDEX)
    ):
        tokens = [token for token, _ in run]
        spans.append((DEFAULT_IMAGE_TOKEN * len(tokens) if is_image else tokenizer.decode(tokens), trained))
    return spans


def _note_batch(record: Trace, batch: dict[str, Any]) -> None:
    seen = Observation("batch")
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            seen.facts[name] = figures(value)
            seen.say(name, told(seen.facts[name]))
        else:
            seen.facts[name] = [
                list(entry.shape) if isinstance(entry, torch.Tensor) else list(entry) for entry in value
            ]
            seen.say(name, f"a list of {len(value)}: {seen.facts[name]}")
    mask, labels = batch["attention_mask"], batch["labels"]
    alike = batch["input_ids"].shape == labels.shape == mask.shape
    seen.check("shapes", alike, f"ids, labels and mask are {list(labels.shape)}")
    hidden = bool((labels[~mask.bool()] == IGNORE_INDEX).all())
    seen.check("padding", hidden, "labels at padding are -100" if hidden else "padding is trained")
    record.note(seen, batch=batch)


def _note_loss(record: Trace, loss: torch.Tensor, logits: torch.Tensor) -> None:
    """The loss of each trained token, from the logits before it; their mean has to be the loss."""
    row = record["splice"]["rows"][0]
    labels = torch.tensor(row["labels"])
    logits = logits[0, : len(labels)].detach().float().cpu()
    each = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="none")
    places = (labels[1:] != IGNORE_INDEX).nonzero().flatten().tolist()
    values = [float(each[place]) for place in places]
    tokens = [record.tokenizer.convert_ids_to_tokens(int(labels[place + 1])) for place in places]
    seen = Observation("loss")
    seen.facts = {
        "loss": loss.item(),
        "tokens": [
            {"position": place + 1, "id": int(labels[place + 1]), "text": text, "loss": value}
            for place, text, value in zip(places, tokens, values, strict=True)
        ],
        "logits": figures(logits),
    }
    seen.say("loss", f"{loss.item():.4f} over {len(values)} tokens")
    seen.say("by token", "  ".join(f"{text} {value:.3g}" for text, value in zip(tokens, values, strict=True)), "text")
    hardest = sorted(zip(values, tokens, strict=True), reverse=True)[:HARDEST]
    seen.say("hardest", "  ".join(f"{text} {value:.3g}" for value, text in hardest), "text")
    finite = math.isfinite(loss.item())
    seen.check("finite", finite, "the loss is a number" if finite else "the loss is NaN or infinite")
    mean = sum(values) / len(values) if values else float("nan")
    # Half precision rounds the loss itself.
    agrees = abs(mean - loss.item()) <= 1e-2 * max(1.0, abs(mean))
    seen.check("mean", agrees, f"the mean over the tokens is {mean:.4f}")
    record.note(seen, loss=loss, logits=logits)


def _note_gradients(record: Trace, model: Any) -> None:
    seen = Observation("gradients")
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
        seen.facts[part] = {**{key: int(value) for key, value in entry.items()}, "norm": norm}
        if not entry["trained"]:
            seen.say(part, f"frozen, {int(entry['parameters']):,} parameters")
            continue
        seen.say(part, f"norm {norm:.4g} over {int(entry['trained']):,} trained parameters")
        learns = math.isfinite(norm) and norm > 0
        seen.check(
            part, learns, "it learns" if learns else "it is to be trained and gets no gradient, or no finite one"
        )
    record.note(seen, model=model)


def _note_optimizer(record: Trace, optimizer: Any, model: Any) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = Observation("optimizer", facts={"class": type(optimizer).__name__, "groups": []})
    for number, group in enumerate(optimizer.param_groups):
        norm = math.sqrt(sum(float(p.grad.float().pow(2).sum()) for p in group["params"] if p.grad is not None))
        parts = sorted({part_of(names[id(parameter)]) for parameter in group["params"]})
        size = sum(parameter.numel() for parameter in group["params"])
        entry = {
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "parameters": size,
            "parts": parts,
            "gradient": norm,
        }
        seen.facts["groups"].append(entry)
        if size:
            seen.say(
                f"group {number + 1}",
                f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}, {size:,} parameters of "
                f"{', '.join(parts)}; gradient {norm:.4g}",
            )
    record.note(seen, optimizer=optimizer)
