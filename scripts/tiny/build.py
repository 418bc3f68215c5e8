"""Make the embedded model llava-v1.5-tiny from nothing: run every stage in order, each in its own process.

In: typefaces (fonts.py), CIFAR-10. Out: WORK/llava-v1.5-tiny, WORK/log.jsonl (one line of JSON per measurement).
A stage whose result is there already is skipped, so that a broken run goes on where it stopped. Data are made on the CPU
while the GPU trains: the "side" stages run beside the ones that follow, until a stage needs them.

    python scripts/tiny/build.py --preset full --work /dev/shm/tiny --fonts .tinydata/fonts --cifar DIR    # one GPU
    python scripts/tiny/build.py --preset smoke --work /tmp/tiny --cifar DIR                       # CPU: shows that all runs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from presets import PRESETS, Preset

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


@dataclass(frozen=True)
class Stage:
    """A command, the file that shows it is done, and the stages whose results it needs."""

    name: str
    command: list[str]
    result: Path
    needs: tuple[str, ...] = ()
    side: bool = False  # may run beside others


@dataclass
class Running:
    """Side stages under way."""

    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)


def plan_stages(preset: Preset, work: Path, fonts: Path | None, cifar: Path, workers: int) -> list[Stage]:
    """All stages in the order in which they start."""
    tokenizer, arrays, held, data = work / "tokenizer", work / "arrays", work / "held", work / "data"
    tower, language, teacher = work / "tower", work / "language", work / "teacher.pt"
    stage1, stage2, stage3 = work / "stage1", work / "stage2", work / "stage3"
    second, final = work / "second", work / "llava-v1.5-tiny"
    typefaces = ["--fonts", str(fonts)] if fonts else []
    photos = ["--photos", str(preset.photos)] if preset.photos else []
    cores = ["--workers", str(workers)]

    def script(name: str, *options: object) -> list[str]:
        return [sys.executable, str(HERE / f"{name}.py"), *map(str, options)]

    common = ("--tokenizer", tokenizer)
    return [
        Stage("tokenizer", script("language", *common, "--out", language, "--tokenizer-only", *typefaces),
            tokenizer / "tokenizer.model"),
        Stage("held", script("arrays", *common, "--out", held, "--held", *preset.held, *typefaces, *cores),
            held / "truths.json", ("tokenizer",)),
        Stage("arrays", script("arrays", *common, "--out", arrays, *preset.arrays, *typefaces, *cores),
            arrays / "truths.json", ("tokenizer",), side=True),
        Stage("teacher", script("teacher", "--cifar", cifar, "--out", teacher, *photos, *preset.teacher), teacher),
        Stage("language", script("language", *common, "--out", language, *typefaces, *cores, *preset.language),
            language / "report.json", ("tokenizer",)),
        Stage("dataset", script("dataset", "--out", data, "--cifar", cifar, *photos, *typefaces, *cores,
            *preset.dataset), data / "finetune.json", ("arrays",), side=True),
        Stage("clip", script("clip", *common, "--arrays", arrays, "--held", held, "--cifar", cifar, "--teacher",
            teacher, "--out", tower, *photos, *preset.clip), tower / "report.json", ("arrays", "held", "teacher")),
        Stage("dataset2", script("dataset", "--out", second, "--cifar", cifar, "--pretrain", "", "--finetune", "",
            *photos, *typefaces, *cores, *preset.second), second / "second.json", ("dataset",), side=True),
        Stage("stage1", stage1_command(preset, language, tower, data, stage1), stage1 / "mm_projector.bin",
            ("language", "clip", "dataset")),
        Stage("stage2", stage2_command(preset, language, tower, data, stage1, stage2), stage2 / "config.json", ("stage1",)),
        Stage("stage3", stage3_command(preset, tower, second, stage2, stage3), stage3 / "config.json", ("stage2", "dataset2")),
        Stage("pack", script("pack", "--trained", stage3, "--tower", tower, *common, "--out", final),
            final / "vision_tower" / "config.json", ("stage3",)),
    ]  # fmt: skip


def stage1_command(preset: Preset, language: Path, tower: Path, data: Path, out: Path) -> list[str]:
    """Only the projector learns: captions, template "plain"."""
    return train_command(
        preset,
        ["--model_name_or_path", language, "--version", "plain", "--data_path", data / "pretrain.json"],
        ["--tune_mm_mlp_adapter", "True", "--output_dir", out, *preset.stage1],
        tower,
        data,
    )


def stage2_command(preset: Preset, language: Path, tower: Path, data: Path, stage1: Path, out: Path) -> list[str]:
    """Everything learns, the tower at its own rate."""
    return train_command(
        preset,
        ["--model_name_or_path", language, "--version", "v1", "--data_path", data / "finetune.json"],
        [
            "--pretrain_mm_mlp_adapter", stage1 / "mm_projector.bin", "--unfreeze_mm_vision_tower", "True",
            "--group_by_modality_length", "True", "--output_dir", out, *preset.stage2,
        ],
        tower,
        data,
    )  # fmt: skip


def stage3_command(preset: Preset, tower: Path, data: Path, stage2: Path, out: Path) -> list[str]:
    """The whole model goes on from stage 2, with what is hard (second.py)."""
    return train_command(
        preset,
        ["--model_name_or_path", stage2, "--version", "v1", "--data_path", data / "second.json"],
        [
            "--unfreeze_mm_vision_tower", "True", "--group_by_modality_length", "True", "--output_dir", out,
            *preset.stage3,
        ],
        tower,
        data,
    )  # fmt: skip


def train_command(preset: Preset, first: list[object], last: list[object], tower: Path, data: Path) -> list[str]:
    shared = [
        "--image_folder", data / "images", "--vision_tower", tower, "--mm_projector_type", "mlp2x_gelu",
        "--mm_vision_select_layer", "-2", "--image_aspect_ratio", "pad", "--mm_use_im_start_end", "False",
        "--mm_use_im_patch_token", "False",
        "--gradient_accumulation_steps", "1", "--evaluation_strategy", "no", "--save_strategy", "no", "--weight_decay", "0.",
        "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--model_max_length", "1024", "--lazy_preprocess", "True",
        "--report_to", "none", *preset.training,
    ]  # fmt: skip
    return [sys.executable, "-m", "llava.train.train", *map(str, [*first, *shared, *last])]


def run(stages: Sequence[Stage], until: str | None, log: Path) -> int:
    """Start each stage when what it needs is there; returns the exit code of the first that fails."""
    running = Running()
    named = {stage.name: stage for stage in stages}
    try:
        for stage in stages:
            for need in stage.needs:
                if code := finish(named[need], running, log):
                    return code
            if stage.result.exists():
                print(f"[{stage.name}] already done: {stage.result}", flush=True)
            elif stage.side:
                print(f"[{stage.name}] started beside the next stages", flush=True)
                running.processes[stage.name] = start(stage, log)
            else:
                print(f"[{stage.name}] started", flush=True)
                began = time.time()
                running.processes[stage.name] = start(stage, log)
                if code := finish(stage, running, log):
                    return code
                print(f"[{stage.name}] done in {time.time() - began:.0f} s", flush=True)
            if stage.name == until:
                break
        for name in list(running.processes):
            if code := finish(named[name], running, log):
                return code
    finally:
        for process in running.processes.values():
            process.terminate()
    return 0


def start(stage: Stage, log: Path) -> subprocess.Popen[str]:
    """The stage's output goes to our own; lines of JSON also to the log (in `finish`, from the stage's file)."""
    stage.result.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(HERE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    output = (log.parent / f"{stage.name}.log").open("w")
    command = ["nice", *stage.command] if stage.side else stage.command
    return subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, text=True, cwd=REPOSITORY
    )


def finish(stage: Stage, running: Running, log: Path) -> int:
    """Wait for a stage, showing its measurements as they come; its exit code, 1 where the result is missing."""
    process = running.processes.pop(stage.name, None)
    output = log.parent / f"{stage.name}.log"
    shown = 0
    while process is not None:
        ended = process.poll() is not None
        lines = output.read_text(errors="replace").splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n") or ended]
        for line in complete[shown:]:
            if line.startswith("{"):
                print(line, end="", flush=True)
                with log.open("a") as file:
                    file.write(line)
        shown = len(complete)
        if ended:
            break
        time.sleep(0.5)
    if process is None or process.returncode == 0:
        if stage.result.exists():
            return 0
        print(f"[{stage.name}] left no {stage.result}; see {output}", flush=True)
        return 1
    print(
        f"[{stage.name}] failed with exit code {process.returncode}:\n{output.read_text(errors='replace')[-4000:]}",
        flush=True,
    )
    return process.returncode or 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--fonts", type=Path, help="typefaces from fonts.py; without it Pillow's own face (trial only)")
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 in any of its usual layouts")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--until", help="stop after this stage")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    fonts = args.fonts.resolve() if args.fonts else None
    stages = plan_stages(PRESETS[args.preset], args.work.resolve(), fonts, args.cifar.resolve(), args.workers)
    if args.until is not None and args.until not in {stage.name for stage in stages}:
        parser.error(f"unknown stage {args.until!r}; known: {', '.join(stage.name for stage in stages)}")
    if args.dry_run:
        for stage in stages:
            print(f"# {stage.name}{' (beside the next)' if stage.side else ''}\n{' '.join(stage.command)}\n")
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.time()
    code = run(stages, args.until, args.work / "log.jsonl")
    print(json.dumps({"stage": "all", "exit_code": code, "seconds": round(time.time() - started, 1)}), flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
