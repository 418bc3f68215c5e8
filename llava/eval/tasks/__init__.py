"""The table of benchmarks. To add one: a `Task` here, or a file of rows on the command line (custom.py)."""

from __future__ import annotations

from pathlib import Path

from llava.errors import InputError
from llava.eval.task import Task
from llava.eval.tasks import judged, mmbench, mme, mmmu, pope, qbench, scienceqa, seed, short
from llava.eval.tasks.custom import task_from_file
from llava.program import closest

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        short.VQAV2,
        short.GQA,
        short.VIZWIZ,
        scienceqa.SCIENCEQA,
        scienceqa.SCIENCEQA_IMG,
        short.TEXTVQA,
        pope.POPE,
        mme.MME,
        mmbench.MMBENCH,
        mmbench.MMBENCH_CN,
        mmbench.MMBENCH_CIRCULAR,
        mmbench.MMBENCH_CN_CIRCULAR,
        seed.SEED,
        judged.LLAVA_BENCH,
        judged.MMVET,
        qbench.QBENCH,
        qbench.QBENCH_ZH,
        mmmu.MMMU,
    )
}


def find_task(name: str) -> Task:
    """A task by its name, or by the file that describes it."""
    if name in TASKS:
        return TASKS[name]
    if name.endswith((".jsonl", ".json", ".yaml", ".yml")):
        return task_from_file(Path(name))
    raise InputError(
        f"unknown task {name!r}{closest(name, list(TASKS))} (tasks: {', '.join(TASKS)}; or a .jsonl or .yaml file)"
    )
