"""Make the embedded model llava-v1.5-tiny from nothing: run every stage in order, each in its own process.

In: typefaces (fonts.py), CIFAR-10. Out: WORK/llava-v1.5-tiny, WORK/log.jsonl (one line of JSON per measurement,
and one per stage with its time).
A stage whose result is there already is skipped, so that a broken run goes on where it stopped, and so that a long
one can be had in pieces (--until). Stages start as soon as what they need is there: those that make data ("side") on
the CPU beside the others, the others as GPUs are free, and the teacher, the CLIP and the language model beside another. The
CLIP compiles while its data is made. The stages of LLaVA take all GPUs (--gpus), a part of each batch on each.

    python recipes/tiny/build.py --preset full --work /dev/shm/tiny --fonts .tinydata/fonts --cifar DIR --gpus 2
    python recipes/tiny/build.py --preset smoke --work /tmp/tiny --cifar DIR                       # CPU: shows that all runs
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from presets import PRESETS, Preset

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Stage:
    """A command, the file that shows it is done, and the stages whose results it needs."""

    name: str
    command: list[str]
    result: Path
    needs: tuple[str, ...] = ()
    side: bool = False  # on the CPU, beside others
    spread: bool = False  # over all GPUs
    light: bool = False  # leaves room on its GPU for another stage


@dataclass
class Running:
    """A stage under way."""

    stage: Stage
    process: subprocess.Popen[str]
    output: Path
    began: float
    gpus: tuple[str, ...]
    num_shown: int = 0  # lines of its output


def plan_stages(
    preset: Preset, work: Path, fonts: Path | None, cifar: Path, workers: int, num_gpus: int = 1
) -> list[Stage]:
    """All stages in the order in which they start, as far as what they need is there and a GPU is free."""
    tokenizer, arrays, held, data = work / "tokenizer", work / "arrays", work / "held", work / "data"
    tower, language, teacher = work / "tower", work / "language", work / "teacher.pt"
    stream = work / "dialogues.npy"
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
            tokenizer / "tokenizer.model", side=True),
        Stage("held", script("arrays", *common, "--out", held, "--held", *preset.held, *typefaces, *cores),
            held / "truths.json", ("tokenizer",), side=True),
        Stage("arrays", script("arrays", *common, "--out", arrays, *preset.arrays, *typefaces, *cores),
            arrays / "truths.json", ("tokenizer",), side=True),
        Stage("dialogues", script("language", *common, "--out", language, "--stream", stream, "--stream-only", *typefaces,
            *cores, *preset.dialogues), stream, ("tokenizer",), side=True),
        Stage("teacher", script("teacher", "--cifar", cifar, "--out", teacher, *photos, *preset.teacher), teacher,
            light=True),
        Stage("language", script("language", *common, "--out", language, "--stream", stream, *typefaces, *cores,
            *preset.language), language / "report.json", ("dialogues",), light=True),
        Stage("dataset", script("dataset", "--out", data, "--cifar", cifar, *photos, *typefaces, *cores,
            *preset.dataset), data / "finetune.json", ("arrays",), side=True),
        Stage("dataset2", script("dataset", "--out", second, "--cifar", cifar, "--pretrain", "", "--finetune", "",
            *photos, *typefaces, *cores, *preset.second), second / "second.json", ("dataset",), side=True),
        Stage("clip", script("clip", *common, "--arrays", arrays, "--held", held, "--cifar", cifar, "--teacher",
            teacher, "--out", tower, *photos, *preset.clip), tower / "report.json", ("tokenizer",), light=True),
        Stage("stage1", spread(stage1_command(preset, language, tower, data, stage1), num_gpus),
            stage1 / "mm_projector.bin", ("arrays", "held", "teacher", "language", "clip", "dataset"), spread=True),
        Stage("stage2", spread(stage2_command(preset, language, tower, data, stage1, stage2), num_gpus),
            stage2 / "config.json", ("stage1",), spread=True),
        Stage("stage3", spread(stage3_command(preset, tower, second, stage2, stage3), num_gpus),
            stage3 / "config.json", ("stage2", "dataset2"), spread=True),
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
            "--output_dir", out, *preset.stage2,
        ],
        tower,
        data,
    )  # fmt: skip


def stage3_command(preset: Preset, tower: Path, data: Path, stage2: Path, out: Path) -> list[str]:
    """The whole model goes on from stage 2, with what is hard (second.py)."""
    return train_command(
        preset,
        ["--model_name_or_path", stage2, "--version", "v1", "--data_path", data / "second.json"],
        ["--unfreeze_mm_vision_tower", "True", "--output_dir", out, *preset.stage3],
        tower,
        data,
    )


def train_command(preset: Preset, first: list[object], last: list[object], tower: Path, data: Path) -> list[str]:
    shared = [
        "--image_folder", data / "images", "--vision_tower", tower, "--mm_projector_type", "mlp2x_gelu",
        "--mm_vision_select_layer", "-2", "--image_aspect_ratio", "pad", "--mm_use_im_start_end", "False",
        "--mm_use_im_patch_token", "False",
        "--packing", "True", "--evaluation_strategy", "no", "--save_strategy", "no", "--weight_decay", "0.",
        "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--model_max_length", "1024", "--lazy_preprocess", "True",
        "--report_to", "none", *preset.training,
    ]  # fmt: skip
    return [sys.executable, "-m", "llava.train.train", *map(str, [*first, *shared, *last])]


def spread(command: list[str], num_gpus: int) -> list[str]:
    """The same training with a process on each GPU, each of which takes its part of a batch's rows."""
    if num_gpus == 1:
        return command
    python, *words = command
    at = words.index("--per_device_train_batch_size") + 1
    rows, left = divmod(int(words[at]), num_gpus)
    if left or not rows:
        raise SystemExit(f"a batch of {words[at]} rows cannot be divided among {num_gpus} GPUs; take another --gpus")
    words[at] = str(rows)
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_gpus), *words]


def run(stages: Sequence[Stage], log: Path, gpus: tuple[str, ...]) -> int:
    """Run all of them, each as soon as what it needs is there; the exit code of the first that fails, or 0."""
    done = [stage.name for stage in stages if stage.result.exists()]
    for name in done:
        print(f"[{name}] already done", flush=True)
    waiting = [stage for stage in stages if stage.name not in done]
    running: list[Running] = []
    try:
        while waiting or running:
            heavy = {gpu for job in running for gpu in job.gpus if not job.stage.light}
            used = heavy | {gpu for job in running for gpu in job.gpus}
            free = sorted((gpu for gpu in gpus if gpu not in heavy), key=lambda gpu: (gpu in used, gpus.index(gpu)))
            for stage, taken in startable(waiting, done, free, len(gpus)):
                print(f"[{stage.name}] started{' beside the others' if stage.side else ''}", flush=True)
                running.append(start(stage, log, taken))
                waiting.remove(stage)
            time.sleep(POLL_SECONDS)
            for job in list(running):
                code = job.process.poll()
                show(job, log, ended=code is not None)
                if code is None:
                    continue
                running.remove(job)
                if failed := failure(job, code):
                    print(failed, flush=True)
                    return code or 1
                seconds = round(time.time() - job.began, 1)
                print(f"[{job.stage.name}] done in {seconds:.0f} s", flush=True)
                append(log, json.dumps({"stage": job.stage.name, "seconds": seconds}) + "\n")
                done.append(job.stage.name)
    finally:
        for job in running:
            job.process.terminate()
    return 0


def startable(
    waiting: Sequence[Stage], done: Collection[str], free: Sequence[str], num_gpus: int
) -> list[tuple[Stage, tuple[str, ...]]]:
    """Those whose needs are there, in their order, as far as GPUs are free, and which each takes. A light stage leaves its
    GPU to the next one as well."""
    found = []
    free = list(free)
    for stage in waiting:
        wanted = 0 if stage.side else num_gpus if stage.spread else 1
        if wanted <= len(free) and all(need in done for need in stage.needs):
            taken, free = free[:wanted], free[wanted:]
            found.append((stage, tuple(taken)))
            free += taken if stage.light else []
    return found


def start(stage: Stage, log: Path, gpus: tuple[str, ...]) -> Running:
    """In a process of its own, whose output goes to a file beside the log."""
    stage.result.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(HERE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    output = log.parent / f"{stage.name}.log"
    command = ["nice", *stage.command] if stage.side else stage.command
    with output.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, text=True, cwd=REPOSITORY
        )
    return Running(stage, process, output, time.time(), gpus)


def show(job: Running, log: Path, *, ended: bool) -> None:
    """The measurements (lines of JSON) that have come since the last time, on the screen and in the log."""
    lines = job.output.read_text(errors="replace").splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n") or ended]
    for line in complete[job.num_shown :]:
        if line.startswith("{"):
            print(line, end="", flush=True)
            append(log, line)
    job.num_shown = len(complete)


def append(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line)


def failure(job: Running, code: int) -> str | None:
    """What to say of a stage that has ended, if it went wrong."""
    name = job.stage.name
    if code:
        return f"[{name}] failed with exit code {code}:\n{job.output.read_text(errors='replace')[-4000:]}"
    return None if job.stage.result.exists() else f"[{name}] left no {job.stage.result}; see {job.output}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--fonts", type=Path, help="typefaces from fonts.py; without it Pillow's own face (trial only)")
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 in any of its usual layouts")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--gpus", type=int, default=1, help="how many to use, of those in CUDA_VISIBLE_DEVICES, or of all"
    )
    parser.add_argument(
        "--stage3-steps", type=int, help="instead of the preset's, to fit a run into the time that is left"
    )
    parser.add_argument("--until", help="stop after this stage and those before it")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    fonts = args.fonts.resolve() if args.fonts else None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = tuple(given.split(",") if given else map(str, range(args.gpus)))[: args.gpus]
    if len(gpus) < max(1, args.gpus):
        parser.error(f"--gpus {args.gpus}: CUDA_VISIBLE_DEVICES names {given or 'none'}")
    work, cifar = args.work.resolve(), args.cifar.resolve()
    preset = PRESETS[args.preset]
    if args.stage3_steps is not None:
        preset = replace(preset, stage3=(*preset.stage3, "--max_steps", str(args.stage3_steps)))
    stages = plan_stages(preset, work, fonts, cifar, args.workers, len(gpus))
    names = [stage.name for stage in stages]
    if args.until is not None:
        if args.until not in names:
            parser.error(f"unknown stage {args.until!r}; known: {', '.join(names)}")
        stages = stages[: names.index(args.until) + 1]
    if args.dry_run:
        for stage in stages:
            print(f"# {stage.name}{' (beside the next)' if stage.side else ''}\n{' '.join(stage.command)}\n")
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal; the same command goes on from here"))
    started = time.time()
    code = run(stages, args.work / "log.jsonl", gpus)
    print(json.dumps({"stage": "all", "exit_code": code, "seconds": round(time.time() - started, 1)}), flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
