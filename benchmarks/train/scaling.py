"""Scaling of LLaVA-1.5-7B's training over the GPUs of one machine.

    python -m benchmarks.train.scaling --devices 2,4          tables: results/train.md

The trainer of `llava train` on files: JPEG photographs decoded by loader processes, 832 tokens a sample, bfloat16, random
weights of the published shapes. Each run is a process group of its own: one GPU alone, then several sharded by FSDP2
(compiled layers; weights gathered in each pass, or once and kept until the backward pass) and by DeepSpeed ZeRO-3
(gradient checkpointing, and compiled layers), each beside one GPU with the same settings. The figures are those of the
program's own log lines; one JSON line per run. Efficiency is samples per second and GPU, as a share of the one GPU's.
Without `--devices`, all GPUs are used. `--tiny` runs it in small shapes with processes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.measure import print_figures
from benchmarks.shapes import FULL, TINY, Shapes
from benchmarks.train.sides import Ours

TOKENIZER = ROOT / "tests/golden/tokenizers/llama-mini1k-legacy"
FSDP2 = json.loads((ROOT / "scripts/fsdp2.json").read_text())
SMALL = replace(TINY, text_tokens=256, text={**TINY.text, "vocab_size": 1024})
STEPS_PER_LOG, NUM_LOGS = 3, 3  # the first line holds compiling and warming up
NUM_IMAGES = 64


@dataclass(frozen=True)
class Run:
    name: str
    shard: str  # none, zero3, or fsdp2 and whether weights are resharded between the passes
    compiled: bool
    bfloat16: bool = False  # all weights and states are bfloat16, as on one GPU, which is too small for float32
    beside: str | None = None  # the run on one GPU that it is compared with


RUNS = (
    Run("one", "none", compiled=True, bfloat16=True),
    Run("fsdp2", "fsdp2", compiled=True, beside="one"),
    Run("fsdp2-kept", "fsdp2-kept", compiled=True, beside="one"),
    Run("one-checkpointed", "none", compiled=False, bfloat16=True),
    Run("zero3", "zero3", compiled=False, beside="one-checkpointed"),
    Run("zero3-compiled", "zero3", compiled=True, beside="one"),
    Run("zero3-compiled-bfloat16", "zero3", compiled=True, bfloat16=True, beside="one"),
)


def measure(run: Run, num_devices: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of a run in its own processes; None, and a message, where it failed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *launch,
            str(num_devices),
            "-m",
            "benchmarks.train.scaling",
            "--worker",
            run.name,
            "--folder",
            folder,
        ]
        done = subprocess.run(
            [*command, *passed_on(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=options.timeout,
        )
        result, fault = Path(folder, "figures.json"), Path(folder, "fault.txt")
        if done.returncode or not result.exists():
            print_figures(run=run.name, error=(fault.read_text() if fault.exists() else done.stdout)[-2500:])
            return None
        return json.loads(result.read_text())


def passed_on(options: argparse.Namespace) -> list[str]:
    words = ["--keep", str(options.keep), *(["--tiny"] if options.tiny else [])]
    words += ["--zero", *options.zero] if options.zero else []
    return [*words, "--profiles", str(options.profiles)] if options.profiles else words


# In each process of a run


def work(run: Run, options: argparse.Namespace) -> None:
    from transformers import TrainerCallback

    from llava.train.arguments import TrainingArguments
    from llava.train.llava_trainer import LLaVATrainer
    from llava.train.memory import GIB, estimate
    from llava.train.model_setup import cast_weights
    from llava.train.performance import prepare_layers

    shapes, on_gpu = SMALL if options.tiny else FULL, torch.cuda.is_available()
    folder, keep, sharded = options.folder, options.keep, run.shard.startswith("fsdp2")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        bf16=True,
        trainable_dtype="bfloat16" if run.bfloat16 else "auto",
        per_device_train_batch_size=shapes.batch,
        max_steps=STEPS_PER_LOG * NUM_LOGS,
        logging_steps=STEPS_PER_LOG,
        learning_rate=1e-5,
        model_max_length=shapes.text_tokens + shapes.image_tokens,
        gradient_checkpointing=not run.compiled,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        compile_layers=run.compiled,
        keep_activations=keep if run.compiled else None,
        dataloader_num_workers=8 if on_gpu else 0,
        fsdp="full_shard" if sharded else "",
        fsdp_config={**FSDP2, "reshard_after_forward": run.shard == "fsdp2"} if sharded else None,
        deepspeed=zero3(options.zero) if run.shard == "zero3" else None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
    )
    model = Ours(shapes, device).model
    model.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    cast_weights(model, arguments)
    prepare_layers(model, arguments, backend="inductor" if on_gpu else "eager")
    needed = estimate(model, arguments).peak / GIB
    lines: list[dict[str, float]] = []
    profiler = torch.profiler.profile() if options.profiles and rank == 0 else None

    class Watch(TrainerCallback):
        """Keeps the log lines, and looks into the last step, whose line does not count."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if profiler is not None and state.global_step == state.max_steps - 1:
                profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if profiler is not None and state.global_step == state.max_steps:
                profiler.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "tokens_per_second" in logs:
                lines.append(dict(logs))

    data = data_module(shapes, model, folder / f"data-{rank}", num_samples=shapes.batch * 64)
    trainer = LLaVATrainer(model=model, args=arguments, callbacks=[Watch()], **data)
    trainer.train()
    if rank == 0:
        counted = lines[1:-1] if profiler is not None else lines[1:]
        names = ("tokens_per_second", "images_per_second", "mfu", "data_wait", "memory_gib")
        figures = {name: statistics.median(line[name] for line in counted) for name in names if name in counted[0]}
        figures |= {"estimated_gib": needed, "devices": int(os.environ["WORLD_SIZE"])}
        (folder / "figures.json").write_text(json.dumps(figures))
    if profiler is not None:
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
        (options.profiles / f"profile-{run.name}.txt").write_text(table)
        profiler.export_chrome_trace(str(options.profiles / f"trace-{run.name}.json.gz"))


def zero3(changes: Sequence[str]) -> dict[str, Any]:
    """The settings that come with the package, but for KEY=VALUE of its part on ZeRO."""
    settings = json.loads((ROOT / "scripts/zero3.json").read_text())
    for change in changes:
        key, value = change.split("=")
        settings["zero_optimization"][key] = json.loads(value)
    return settings


def data_module(shapes: Shapes, model: Any, folder: Path, *, num_samples: int) -> dict[str, Any]:
    """Photograph-sized JPEG files, and answers that are longer than the limit, so that each sample is as long as that."""
    import numpy as np
    from PIL import Image

    from llava.conversation import conv_templates
    from llava.text.tokenization import load_tokenizer
    from llava.train.data import make_supervised_data_module

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        small = Image.fromarray(draw.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    rows = []
    for number in range(num_samples):
        words = " ".join(draw.choice(["red", "house", "two", "people", "walk", "under", "the", "trees"], 600))
        turns = [{"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": words}]
        rows.append({"id": str(number), "image": f"{number % NUM_IMAGES}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.model_max_length = shapes.text_tokens + 1  # the image placeholder is one more
    options = SimpleNamespace(
        data_path=str(folder / "data.json"),
        image_folder=str(folder),
        image_processor=model.get_vision_tower().image_processor,
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
    )
    return {**make_supervised_data_module(tokenizer, options, conv_templates["v1"]), "processing_class": tokenizer}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="runs, joined by commas: " + "; ".join(run.name for run in RUNS))
    parser.add_argument("--devices", help="how many GPUs a sharded run takes, several joined by commas (default: all)")
    parser.add_argument("--keep", type=float, default=0.2, help="--keep_activations of the compiled runs")
    parser.add_argument("--zero", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of ZeRO-3 to try")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each run")
    parser.add_argument("--profiles", type=Path, help="write what a step spends its time on into this folder")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    named = {run.name: run for run in RUNS}
    if options.worker:
        try:
            work(named[options.worker], options)
        except Exception:  # the launcher does not show it
            (options.folder / "fault.txt").write_text(traceback.format_exc())
            raise
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 2
    counts = [int(count) for count in options.devices.split(",")] if options.devices else [found]
    print_figures(
        torch=torch.__version__, gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", devices=found
    )
    rates: dict[str, float] = {}
    for run in [named[name] for name in options.only.split(",")] if options.only else RUNS:
        for count in counts if run.beside else [1]:
            figures = measure(run, count, options)
            if figures is None:
                continue
            rates[run.name] = figures["images_per_second"] / figures["devices"]
            if run.beside in rates:
                figures["efficiency"] = rates[run.name] / rates[run.beside]
            print_figures(run=run.name, **figures)


if __name__ == "__main__":
    main()
