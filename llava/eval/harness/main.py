"""`llava eval`: run benchmarks, or score, compare and show what was run.

In: a command line. Out: an exit status. `llava eval TASKS ...` is run.py; a first word `score`, `compare`, `report` or
`list` picks another of the programs named in `PROGRAMS`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.tasks import SUITES, TASKS

DATA_DIR = "./playground/data/eval"
EXAMPLES = """\
examples:
  llava eval pope,mme,textvqa --model-path ./llava-v1.5-7b --data-dir ./playground/data/eval
  llava eval my.jsonl --model-path ./llava-v1.5-7b             questions of your own; see docs/evaluate.md
  llava eval score pope --answers answers.jsonl --data-dir ./playground/data/eval
  llava eval compare eval-runs/a eval-runs/b                   which answers changed, and whether it matters
  llava eval report eval-runs/a                                the HTML report again
  llava eval list                                              the tasks and the files that they read
"""


def add_data_dir(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(DATA_DIR),
        metavar="FOLDER",
        help=f"the folder with the benchmarks' folders in it (default: {DATA_DIR})",
    )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in PROGRAMS:
        return PROGRAMS[words[0]](words[1:])
    from llava.eval.harness.run import main as run

    return run(words)


def score(argv: Sequence[str]) -> int:
    return score_parser().run(_score, argv)


def score_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava eval score",
        description="Score answers that are there already. No model is loaded.",
        epilog="The answers may be JSON lines with question_id and text, or the benchmark's own result format.",
    )
    parser.add_argument(
        "task", metavar="TASK", help="a task of `llava eval list`, or a .jsonl or .yaml file of your own"
    )
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help="file or folder of answers")
    add_data_dir(parser)
    parser.add_argument("--json", action="store_true", help="print the figures at full precision as JSON")
    parser.add_argument("--strict", action="store_true", help="end with status 2 when any answer is missing or faulty")
    return parser


def _score(args: Namespace) -> int:
    import json

    from llava.eval.harness.scoring import score_file, table
    from llava.eval.tasks import find_task

    report = score_file(find_task(args.task), args.answers, args.data_dir)
    if args.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
    else:
        print(table(report))
    return 2 if args.strict and report.faults.kinds else 0


def show_list(argv: Sequence[str]) -> int:
    return list_parser().run(_show_list, argv)


def list_parser() -> ArgumentParser:
    return ArgumentParser(prog="llava eval list", description="The tasks, and the folder that each reads.")


def _show_list(_: Namespace) -> None:
    width = max(map(len, TASKS))
    for name, task in TASKS.items():
        judged = "; needs a judge" if task.judge else ""
        print(f"{name:<{width}}  {task.title} ({task.folder}/): {task.headline}{judged}")
    print("\nseveral by one name: " + "; ".join(f"{name} ({', '.join(parts)})" for name, parts in SUITES.items()))
    print("or a .jsonl or .yaml file with questions of your own; docs/evaluate.md tells the files of each task")


def compare(argv: Sequence[str]) -> int:
    from llava.eval.harness import compare as program

    return program.build_parser().run(program.run, argv)


def report(argv: Sequence[str]) -> int:
    return report_parser().run(_report, argv)


def report_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="llava eval report", description="Write the HTML report of a finished run again.")
    parser.add_argument("run", type=Path, metavar="FOLDER", help="the run's folder")
    return parser


def _report(args: Namespace) -> None:
    from llava.eval.harness.report import rewrite_report

    print(rewrite_report(args.run))


PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "score": score,
    "compare": compare,
    "report": report,
    "list": show_list,
}

if __name__ == "__main__":
    sys.exit(main())
