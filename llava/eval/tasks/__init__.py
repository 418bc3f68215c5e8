"""The table of benchmarks. To add one, add a `Task` here, or give a file of rows on the command line (custom.py)."""

from __future__ import annotations

from pathlib import Path

from llava.cli.program import closest
from llava.errors import InputError
from llava.eval.tasks import judged, mmbench, mme, mmmu, pope, qbench, scienceqa, seed, short, tiny
from llava.eval.tasks.custom import custom_task, task_from_file
from llava.eval.tasks.own_rows import FILES
from llava.eval.tasks.task import Task

__all__ = ["SUITES", "TASKS", "custom_task", "find_task", "find_tasks"]

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
        tiny.SCENES,
        tiny.READING,
        tiny.YES_NO,
        tiny.PHOTOS,
    )
}

# Names for several tasks. Of the last, the photographs are left out where they are not in the data folder.
SUITES = {
    "llava-1.5": (
        "vqav2", "gqa", "vizwiz", "scienceqa-img", "textvqa", "pope", "mme", "mmbench", "mmbench-cn", "seed",
        "llava-bench", "mmvet",
    ),
    "tiny": ("tiny-scenes", "tiny-reading", "tiny-yes-no", "tiny-photos"),
}  # fmt: skip


def find_tasks(names: str, data_dir: Path) -> list[Task]:
    """Find tasks and suites by their names with commas between them, each task once."""
    found: dict[str, Task] = {}
    for word in dict.fromkeys(filter(None, names.split(","))):
        for name in SUITES.get(word, (word,)):
            task = find_task(name)
            if found.get(task.name, task) is not task:
                raise InputError(
                    f"two of the tasks {names!r} are called {task.name!r}; name one of the files otherwise"
                )
            if word == "tiny" and task is tiny.PHOTOS and not tiny.has_photos(task.home(data_dir)):
                continue
            found[task.name] = task
    if not found:
        raise InputError("no task is named; see llava eval list")
    return list(found.values())


def find_task(name: str) -> Task:
    """Find a task by its name, or read the file that describes it."""
    if name in TASKS:
        return TASKS[name]
    if name.lower().endswith((*FILES, ".yaml", ".yml")):
        return task_from_file(Path(name))
    known = [*TASKS, *SUITES]
    hint = closest(name, known)
    raise InputError(
        f"unknown task {name!r}{hint} (tasks: {', '.join(known)}; or a file of your own: {', '.join(FILES)}, .yaml)"
    )
