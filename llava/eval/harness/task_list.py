"""`llava eval list`: the tasks, and the folder that each reads."""

from __future__ import annotations

from argparse import Namespace

from llava.cli.program import ArgumentParser
from llava.eval.tasks import SUITES, TASKS


def build_parser() -> ArgumentParser:
    return ArgumentParser(prog="llava eval list", description="The tasks, and the folder that each reads.")


def run(_: Namespace) -> None:
    width = max(map(len, TASKS))
    for name, task in TASKS.items():
        judged = "; needs a judge" if task.judge else ""
        print(f"{name:<{width}}  {task.title} ({task.folder}/): {task.headline}{judged}")
    print("\nseveral by one name: " + "; ".join(f"{name} ({', '.join(parts)})" for name, parts in SUITES.items()))
    print("or a .jsonl or .yaml file with questions of your own; docs/evaluate.md lists the files of each task")
