"""Train the small CLIP and save its vision tower as a transformers checkpoint.

In: arrays (arrays.py), photographs, the teacher's weights, the tokenizer. Out: FOLDER/config.json, model.safetensors,
preprocessor_config.json (the averaged weights) and FOLDER/report.json. The model is in clip_model.py.
The learning rate follows the share of the time or steps that is used up, so that --max-minutes ends a run properly.
It may start before the arrays and the teacher are there: it compiles meanwhile, and waits for them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import augment
import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from arrays import BOS, EOS, LENGTH, encode
from arrays import KINDS as DRAWN_KINDS
from clip_model import MEAN, STD, ClipSize, SmallClip, run_tower
from optim import build_optimizer, learning_rate
from photos import KINDS, Photos, load_photos
from talk import with_article
from teacher import Teacher, load_teacher
from torch import Tensor, nn

KIND_CAPTIONS = ("A photograph of {}.", "A photo of {}.", "The photograph shows {}.")
WEIGHTS = {"contrast": 0.5, "photo": 1.0, "kind": 0.5, "caption": 1.0}


@dataclass(frozen=True)
class Drawn:
    """Images and captions on the device."""

    pixels: Tensor
    captions: Tensor
    kinds: Tensor
    truths: list[str]


def load_drawn(folder: Path, device: torch.device) -> Drawn:
    pixels = torch.from_numpy(np.load(folder / "pixels.npy", mmap_mode="c")).to(device)
    captions = torch.from_numpy(np.load(folder / "captions.npy").astype(np.int32)).to(device)
    kinds = torch.from_numpy(np.load(folder / "kinds.npy")).to(device)
    return Drawn(pixels, captions, kinds, json.loads((folder / "truths.json").read_text()))


class Trainer:
    """Everything one step needs, on the device."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer / "tokenizer.model"))
        photos = load_photos(args.cifar, "train", limit=args.photos)
        self.photo_pixels = torch.from_numpy(photos.pixels).to(device)
        self.photo_labels = F.one_hot(torch.from_numpy(photos.labels).to(device), len(KINDS)).float()
        self.test_photos = load_photos(args.cifar, "test", limit=args.photos)
        self.kind_ids = self.encode_kinds()
        size = ClipSize(layers=args.layers, width=args.width, mlp=4 * args.width, heads=max(1, args.width // 64))
        self.model = SmallClip(size, self.pieces.vocab_size(), LENGTH, len(KINDS)).to(device)
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = build_optimizer(self.model, args.lr)
        self.loss_fn: Callable[..., dict[str, Tensor]] = self.model
        if args.compile:
            self.loss_fn = torch.compile(self.model)

    def warm_up(self) -> None:
        """A step on noise, in the shapes of the real ones, which compiles the model."""
        args, device, side = self.args, self.device, ClipSize.side
        pixels = torch.rand(args.photo_batch + args.drawn_batch, 3, side, side, device=device)
        ids = torch.randint(3, self.pieces.vocab_size(), (args.drawn_batch, LENGTH), device=device)
        soft = torch.full((args.photo_batch, len(KINDS)), 1 / len(KINDS), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            losses = self.loss_fn(pixels, ids, self.kind_ids[0], soft)
        sum(losses.values()).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def load(self) -> None:
        """Wait for the data and the teacher, and take them to the device."""
        args = self.args
        for file in (args.arrays / "truths.json", args.held / "truths.json", args.teacher):
            while not file.exists():
                time.sleep(0.2)
        self.drawn = load_drawn(args.arrays, self.device)
        self.held = load_drawn(args.held, torch.device("cpu"))
        self.teacher: Teacher = load_teacher(args.teacher, self.device)

    def encode_kinds(self) -> Tensor:
        """(templates, K, L): captions of the kinds of photographs."""
        rows = [[encode(self.pieces, t.format(with_article(kind))) for kind in KINDS] for t in KIND_CAPTIONS]
        ids = torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(self.device)
        return ids[:, :, : int((ids != 0).sum(-1).max())]

    @torch.no_grad()
    def photo_batch(self) -> tuple[Tensor, Tensor]:
        """Varied, mixed and enlarged photographs, and what the teacher and the labels say about them."""
        index = torch.randint(len(self.photo_pixels), (self.args.photo_batch,), device=self.device)
        views = augment.vary_photos(augment.to_float(self.photo_pixels[index]))
        views, labels = augment.mix(views, self.photo_labels[index], share=self.args.mix)
        with torch.autocast(self.device.type, torch.bfloat16):
            opinion = self.teacher(views.contiguous(memory_format=torch.channels_last)).float().softmax(-1)
        soft = 0.8 * opinion + 0.2 * labels
        side = self.drawn.pixels.shape[1]
        return augment.normalise(augment.enlarge(views, side)), soft

    @torch.no_grad()
    def drawn_batch(self) -> tuple[Tensor, Tensor]:
        count = self.args.drawn_batch
        index = torch.randint(len(self.drawn.pixels), (count,), device=self.device)
        slot = torch.randint(2, (count,), device=self.device)
        views = augment.vary_drawn(self.drawn.pixels[index])
        return augment.normalise(views), self.drawn.captions[index, slot].long()

    def step(self, progress: float) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * learning_rate(progress)
        photos, soft = self.photo_batch()
        drawn, ids = self.drawn_batch()
        kinds = self.kind_ids[int(torch.randint(len(self.kind_ids), ()))]
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = self.loss_fn(torch.cat([photos, drawn]).contiguous(), ids, kinds, soft.contiguous())
        loss = sum(WEIGHTS[name] * value for name, value in losses.items())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return losses

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """The averaged weights follow the trained ones, quickly at first."""
        decay = min(self.args.average, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)


def train(trainer: Trainer) -> int:
    """Run to the last step or minute; returns the number of steps done."""
    args = trainer.args
    started, shown_at, steps = time.time(), 0.0, 0
    for step in range(args.steps):
        elapsed = (time.time() - started) / 60
        progress = max(step / args.steps, elapsed / args.max_minutes)
        if progress >= 1:
            break
        losses = trainer.step(progress)
        trainer.follow(step)
        steps = step + 1
        if step in (0, 10, 50) or elapsed - shown_at > args.report_minutes:
            shown_at = elapsed
            row = {"stage": "clip", "step": step, "progress": round(progress, 3), "minutes": round(elapsed, 2)}
            row |= {name: round(value.item(), 4) for name, value in losses.items()}
            row["pictures_per_second"] = round(
                steps * (args.photo_batch + args.drawn_batch) / max(1e-9, time.time() - started)
            )
            if step > 50:
                row |= evaluate(trainer, quick=True)
            print(json.dumps(row), flush=True)
    return steps


@torch.no_grad()
def evaluate(trainer: Trainer, *, quick: bool = False) -> dict[str, float]:
    """Photographs by their captions; on held-out drawings: reading, caption loss, finding the right caption in 256."""
    model, device = trainer.average, trainer.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        held = trainer.held
        report = photo_accuracy(trainer, model, trainer.test_photos)
        count = 256 if quick else 1024
        order = torch.randperm(len(held.kinds), generator=torch.Generator().manual_seed(0))
        texts = [i for i in order.tolist() if held.kinds[i] == DRAWN_KINDS.index("text")][:count]
        report |= {"read_exact": reading(trainer, model, held, texts)}
        scenes = [i for i in order.tolist() if held.kinds[i] == DRAWN_KINDS.index("scene")][:256]
        report |= captioning(trainer, model, held, scenes)
    return {name: round(value, 4) for name, value in report.items()}


def photo_accuracy(trainer: Trainer, model: SmallClip, photos: Photos) -> dict[str, float]:
    kinds = torch.stack([model.embed_text(model.encode_text(ids), ids) for ids in trainer.kind_ids]).mean(0)
    by_text = by_head = 0
    for start in range(0, len(photos), 500):
        pixels = augment.to_float(torch.from_numpy(photos.pixels[start : start + 500]).to(trainer.device))
        patches, pooled = run_tower(
            model.tower, augment.normalise(augment.enlarge(pixels, trainer.drawn.pixels.shape[1]))
        )
        labels = torch.from_numpy(photos.labels[start : start + 500]).to(trainer.device)
        by_text += int(((model.embed_image(pooled) @ kinds.T).argmax(1) == labels).sum())
        by_head += int((model.kind_head(model.patch_norm(patches).mean(1)).argmax(1) == labels).sum())
    return {"photo_by_caption": by_text / len(photos), "photo_by_patches": by_head / len(photos)}


def reading(trainer: Trainer, model: SmallClip, held: Drawn, rows: list[int]) -> float:
    """Exact texts in the captions the captioner writes."""
    start = [BOS, *trainer.pieces.encode('It says "')]
    right = 0
    for first in range(0, len(rows), 256):
        part = rows[first : first + 256]
        pixels = augment.normalise(augment.to_float(held.pixels[part].to(trainer.device)))
        begun = torch.tensor([start] * len(part), device=trainer.device)
        ids = model.write_captions(pixels, begun, 9)[:, len(start) :].tolist()
        said = [trainer.pieces.decode([i for i in row if i not in (0, EOS)]).split('"')[0].strip() for row in ids]
        right += sum(text == held.truths[i] for text, i in zip(said, part, strict=True))
    return right / max(1, len(rows))


def captioning(trainer: Trainer, model: SmallClip, held: Drawn, rows: list[int]) -> dict[str, float]:
    pixels = augment.normalise(augment.to_float(held.pixels[rows].to(trainer.device)))
    ids = held.captions[rows, 0].long().to(trainer.device)
    patches, pooled = run_tower(model.tower, pixels)
    hidden = model.encode_text(ids)
    logits = model.caption_logits(hidden[:, :-1], patches)
    right = (logits.argmax(-1) == ids[:, 1:]) | (ids[:, 1:] == 0)
    similarity = model.embed_image(pooled) @ model.embed_text(hidden, ids).T
    own = torch.arange(len(rows), device=trainer.device)
    return {
        "caption_exact": right.all(1).float().mean().item(),
        "retrieval": (similarity.argmax(1) == own).float().mean().item(),
    }


def save_tower(model: SmallClip, folder: Path) -> None:
    """The tower alone, with the image arithmetic users' software expects beside it."""
    model.tower.float().save_pretrained(folder)
    side = model.tower.config.image_size
    processor = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=Path, required=True, help="training pictures and captions (arrays.py)")
    parser.add_argument("--held", type=Path, required=True, help="the same, held out")
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tower")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--max-minutes", type=float, default=4.0)
    parser.add_argument("--report-minutes", type=float, default=0.5)
    parser.add_argument("--photo-batch", type=int, default=512)
    parser.add_argument("--drawn-batch", type=int, default=512)
    parser.add_argument("--photos", type=int, help="use only this many photographs")
    parser.add_argument("--mix", type=float, default=0.6, help="share of photographs mixed with another")
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    started = time.time()
    trainer = Trainer(args, torch.device(args.device))
    try:
        trainer.warm_up()
    except Exception as error:  # a machine without a C compiler cannot compile; the run must still go on
        if not args.compile:
            raise
        print(
            json.dumps({"stage": "clip", "compile_failed": f"{type(error).__name__}: {str(error)[:300]}"}), flush=True
        )
        trainer.loss_fn = trainer.model
    print(json.dumps({"stage": "clip", "ready_seconds": round(time.time() - started, 1)}), flush=True)
    trainer.load()
    print(json.dumps({"stage": "clip", "loaded_seconds": round(time.time() - started, 1)}), flush=True)
    steps = train(trainer)
    save_tower(trainer.average, args.out)
    images = steps * (args.photo_batch + args.drawn_batch)
    seconds = time.time() - started
    report = {"stage": "clip", "steps": steps, "images": images, "seconds": round(seconds, 1)} | evaluate(trainer)
    (args.out / "report.json").write_text(json.dumps(report) + "\n")
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
