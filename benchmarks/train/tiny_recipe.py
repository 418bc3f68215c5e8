"""Training speed of the embedded model's recipe, padded and packed.

    python -m benchmarks.train.tiny_recipe --cifar DIR --fonts DIR

In: what the recipe needs (recipes/tiny/README.md). Out: a table. Data of the recipe's second stage are drawn, and `llava train`
continues from the embedded model with the stage's own flags, in one process for each way: padded batches of 256 samples,
packed sequences, and packed sequences with compiled layers. Figures are medians of the trainer's log lines without the
first ones, during which the loader is ahead. The last row is the loader without a model. On a CPU the recipe's CPU flags
are used, with fewer steps and without compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from benchmarks import ROOT

sys.path.insert(0, str(ROOT / "recipes" / "tiny"))

from build import train_command
from dataset import parse_counts
from presets import PRESETS

from benchmarks import ROOT
from llava.assets import embedded_model_path

PADDED = ("--packing", "False", "--gradient_accumulation_steps", "1", "--group_by_modality_length", "True")


@dataclass(frozen=True)
class Scale:
    """How much is done on a GPU, or on a CPU."""

    preset: str
    samples: int
    steps: int
    skipped: int  # steps at the beginning that do not count
    steps_per_line: int
    batch: int  # samples of a padded batch, as many as packed sequences hold


GPU = Scale("full", samples=26_000, steps=100, skipped=40, steps_per_line=10, batch=256)
CPU = Scale("cpu", samples=200, steps=3, skipped=1, steps_per_line=1, batch=35)


def ways(scale: Scale, *, on_gpu: bool) -> dict[str, tuple[str, ...]]:
    """Flags of each way to train, after those of the recipe."""
    padded = (*PADDED, "--per_device_train_batch_size", str(scale.batch))
    plain = {"padded": padded, "packed": ("--compile_layers", "False")}
    return {**plain, "packed, compiled": ("--compile_layers", "True")} if on_gpu else plain


def draw_data(folder: Path, num_samples: int, options: argparse.Namespace) -> None:
    """The second stage's kinds of samples in their shares, but fewer."""
    full = parse_counts(PRESETS["full"].dataset[PRESETS["full"].dataset.index("--finetune") + 1])
    counts = ",".join(f"{kind}={number * num_samples // sum(full.values())}" for kind, number in full.items())
    words = ["--out", folder, "--pretrain", "", "--finetune", counts, "--cifar", options.cifar]
    words += ["--fonts", options.fonts] if options.fonts else []
    program = ROOT / "recipes" / "tiny" / "dataset.py"
    run([sys.executable, str(program), *map(str, words), "--workers", str(options.workers)])


def run(command: Sequence[str]) -> float:
    """Seconds that a program took; its output only where it failed."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{(done.stdout + done.stderr)[-3000:]}")
    return time.perf_counter() - began


def measure(flags: Sequence[str], scale: Scale, data: Path, out: Path) -> dict[str, float]:
    """Medians of a run's log lines, and the seconds of the whole run."""
    preset, model = PRESETS[scale.preset], embedded_model_path()
    command = train_command(
        preset,
        ["--model_name_or_path", model, "--version", "v1", "--data_path", data / "finetune.json"],
        [
            "--unfreeze_mm_vision_tower", "True", "--output_dir", out, *preset.stage2, "--max_steps", scale.steps,
            "--logging_steps", scale.steps_per_line, *flags,
        ],
        Path(model) / "vision_tower",
        data,
    )  # fmt: skip
    seconds = run(command)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "images_per_second" in line and line["step"] > scale.skipped]
    names = ("images_per_second", "tokens_per_second", "padding", "data_wait", "memory_gib")
    return {name: statistics.median(line[name] for line in lines) for name in names} | {"seconds": seconds}


def loader_rate(data: Path, scale: Scale, workers: int) -> float:
    """Samples a second that loader processes make ready as packed batches, without a model."""
    from torch.utils.data import DataLoader

    from llava.conversation import conv_templates
    from llava.images.image_processor import ClipImageProcessor
    from llava.images.layout import ImagePolicy
    from llava.text.tokenization import load_tokenizer
    from llava.train.data import LazySupervisedDataset
    from llava.train.packing import PackedCollator, PackedDataset, measured_lengths

    model = Path(embedded_model_path())
    tokenizer = load_tokenizer(model, model_max_length=1024)
    tokenizer.pad_token = tokenizer.unk_token
    settings = SimpleNamespace(
        image_folder=str(data / "images"),
        image_processor=ClipImageProcessor.from_pretrained(model / "vision_tower"),
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
        pixel_dtype=torch.bfloat16,
    )
    samples = LazySupervisedDataset(str(data / "finetune.json"), tokenizer, settings, conv=conv_templates["v1"])
    policy = ImagePolicy("pad", tile_size=112, patch_size=14)
    lengths = measured_lengths(samples, policy, data / "lengths", num_workers=workers)
    packed = PackedDataset(samples, lengths, 1024, policy, seed=0)
    rows = scale.batch * len(packed) // len(samples)
    loader = DataLoader(packed, rows, num_workers=workers, collate_fn=PackedCollator(tokenizer))  # type: ignore[arg-type]
    counts, times = [], []
    for batch in loader:
        counts.append(len(batch["input_ids"]))
        times.append(time.perf_counter())
    # Processes start one after another and end one after another: the middle counts.
    first, last = len(times) // 4, len(times) * 3 // 4
    return sum(counts[first + 1 : last + 1]) / (times[last] - times[first])


def table(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    on_gpu = torch.cuda.is_available()
    scale = GPU if on_gpu else CPU
    machine = torch.cuda.get_device_name() if on_gpu else "no GPU"
    draw_data(folder / "data", scale.samples, options)
    rows = json.loads((folder / "data" / "finetune.json").read_text())
    per_image = len(rows) / sum("image" in row for row in rows)
    yield "# Training the embedded model"
    yield ""
    yield (
        f"`python -m benchmarks.train.tiny_recipe` on a machine with {os.cpu_count()} CPU cores and {machine}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}. The recipe's "
        f"second stage, {scale.steps} steps of about {scale.batch} samples; medians of the steps after {scale.skipped}."
    )
    yield ""
    yield "| | samples/s | tokens/s | padding | waiting for data | peak memory, GiB | whole run, s |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for number, (name, flags) in enumerate(ways(scale, on_gpu=on_gpu).items()):
        found: dict[str, Any] = measure(flags, scale, folder / "data", folder / f"run-{number}")
        yield (
            f"| {name} | {found['images_per_second'] * per_image:,.0f} | {found['tokens_per_second']:,.0f} "
            f"| {found['padding']:.1%} | {found['data_wait']:.1%} | {found['memory_gib']:.1f} | {found['seconds']:.0f} |"
        )
    workers = 14 if on_gpu else 0
    yield f"| the loader alone, {workers or 'no'} processes | {loader_rate(folder / 'data', scale, workers):,.0f} | | | | | |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 in any of its usual layouts")
    parser.add_argument("--fonts", type=Path, help="typefaces from recipes/tiny/fonts.py")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw the data")
    parser.add_argument("--output", type=Path, help="where the table goes, besides the terminal")
    options = parser.parse_args(argv)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in table(options, Path(folder)):
            print(line, flush=True)
            lines.append(line)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
