"""A small convolutional network that learns the photographs first and then teaches the small CLIP.

In: photographs. Out: FILE with its weights. A transformer learns little from 36,000 small images alone; a convolutional net
learns them in under a minute, and its opinion of every varied and mixed view is a far better target than the bare label.
The net is thrown away after the CLIP stage.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import augment
import torch
import torch.nn.functional as F
from photos import KINDS, Photos, load_photos
from torch import Tensor, nn


def conv(inner: int, outer: int, *, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.GELU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Teacher(nn.Module):
    """images (B, 3, 32, 32) in 0..1 -> logits (B, K)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            conv(3, w), conv(w, 2 * w, pool=True), Residual(2 * w), conv(2 * w, 4 * w, pool=True),
            Residual(4 * w), conv(4 * w, 8 * w, pool=True), Residual(8 * w), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(8 * w, len(KINDS))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images * 4 - 2)) * 0.25


def train_teacher(photos: Photos, *, steps: int, batch: int, device: torch.device, width: int = 64) -> Teacher:
    """One cycle of AdamW on varied views with soft labels; the last fifth without mixing."""
    net = Teacher(width).to(device, memory_format=torch.channels_last)
    pixels = augment.to_float(torch.from_numpy(photos.pixels).to(device))
    labels = F.one_hot(torch.from_numpy(photos.labels).to(device), len(KINDS)).float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        index = torch.randint(len(pixels), (batch,), device=device)
        views, soft = augment.vary_photos(pixels[index]), labels[index]
        if step < 0.8 * steps:
            views, soft = augment.mix(views, soft, share=0.4)
        with torch.autocast(device.type, torch.bfloat16):
            logits = net(views.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), soft, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(json.dumps({"stage": "teacher", "step": step, "loss": round(loss.item(), 4)}), flush=True)
    return net.eval()


@torch.no_grad()
def accuracy(net: Teacher, photos: Photos, device: torch.device) -> float:
    right = 0
    for start in range(0, len(photos), 500):
        images = augment.to_float(torch.from_numpy(photos.pixels[start : start + 500]).to(device))
        right += (net(images).argmax(1).cpu().numpy() == photos.labels[start : start + 500]).sum().item()
    return right / len(photos)


def load_teacher(path: Path, device: torch.device) -> Teacher:
    state = torch.load(path, map_location=device, weights_only=True)
    net = Teacher(state["body.0.0.weight"].shape[0])
    net.load_state_dict(state)
    return net.to(device, memory_format=torch.channels_last).eval()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder with the CIFAR-10 photographs, any layout")
    parser.add_argument("--out", type=Path, required=True, help="file for the weights")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--photos", type=int, help="use only this many photographs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    started, device = time.time(), torch.device(args.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    photos = load_photos(args.cifar, "train", limit=args.photos)
    net = train_teacher(photos, steps=args.steps, batch=args.batch, device=device, width=args.width)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")  # whoever waits for the file finds it complete
    torch.save(net.state_dict(), part)
    part.rename(args.out)
    test = accuracy(net, load_photos(args.cifar, "test", limit=args.photos), device)
    report = {
        "stage": "teacher",
        "test_accuracy": test,
        "steps": args.steps,
        "seconds": round(time.time() - started, 1),
    }
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
