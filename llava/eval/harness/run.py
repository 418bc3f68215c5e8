"""`llava eval TASKS`: ask a model the questions of benchmarks, score its answers, and write a report.

In: a command line. Out: a folder with answers, results.json, results.md, report.html and manifest.json. The tasks are read and
scored by eval/tasks/, the model is asked by runner.py, and results.py and report.py write.
"""

from __future__ import annotations

import fcntl
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava.cli.model_flags import add_model_flags, find_model, quantization_from, sampling_from
from llava.cli.program import ArgumentParser, add_number
from llava.conversation import get_model_name_from_path, get_template
from llava.errors import InputError
from llava.eval.files import Faults, read_json_object, write_json
from llava.eval.harness.answer_log import AnswerLog
from llava.eval.harness.client import ModelChoice, missing_images
from llava.eval.harness.judge import Judge, add_judge_flags, judge_answers
from llava.eval.harness.manifest import PER_TASK, differences, environment, model_hash, prompts_hash
from llava.eval.harness.report import write_report
from llava.eval.harness.results import MANIFEST, TABLE, write_results
from llava.eval.harness.runner import NOT_ASKED, AskSettings, TaskJob, answer_jobs, num_shards
from llava.eval.harness.scoring import TaskReport, add_data_dir, load_questions, score_questions, table
from llava.eval.tasks import find_tasks
from llava.eval.tasks.task import Task
from llava.eval.types import JsonRow
from llava.model.checkpoints.hub import resolve_checkpoint

EXAMPLES = """\
examples:
  llava eval pope,mme,textvqa --model-path ./llava-v1.5-7b --data-dir ./playground/data/eval
  llava eval my.jsonl --model-path ./llava-v1.5-7b             questions of your own; see docs/evaluate.md
  llava eval score pope --answers answers.jsonl --data-dir ./playground/data/eval
  llava eval compare eval-runs/a eval-runs/b                   which answers changed, and whether it matters
  llava eval report eval-runs/a                                the HTML report again
  llava eval list                                              the tasks and the files that they read
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava eval",
        usage="%(prog)s TASK[,TASK...] [FLAGS]\n       %(prog)s score|compare|report|list ...",
        description="Ask a model the questions of benchmarks and score its answers.",
        epilog=EXAMPLES,
    )
    parser.add_argument("tasks", metavar="TASKS", help="names or your own files, with commas between (llava eval list)")
    add_data_dir(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for answers and results (default: eval-runs/MODEL)")
    model = parser.add_argument_group("model")
    add_model_flags(model)
    answers = parser.add_argument_group("answers")
    add_number(answers, "--temperature", 0.0, "T", "0 takes the most probable token")
    answers.add_argument("--top-p", type=float, metavar="P", help="sample from top tokens of this total probability")
    add_number(answers, "--num-beams", 1, "N", "beam search, one question at a time")
    answers.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer, at most (default: the task's)")
    add_number(answers, "--seed", 0, "N", "seed of sampled answers")
    answers.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task, for a trial")
    answers.add_argument("--shards", type=int, metavar="N", help="processes to share questions (default: one per GPU)")
    answers.add_argument("--fresh", action="store_true", help="delete the answers in --out first")
    skip = "leave out questions whose image is missing; they count as wrong"
    answers.add_argument("--skip-missing-images", action="store_true", help=skip)
    add_judge_flags(parser, model=None)
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress bar")
    return parser


@dataclass(frozen=True)
class TaskPlan:
    """A task, what the model is asked for it, and what was wrong with its questions and answers."""

    task: Task
    job: TaskJob
    faults: Faults


def run(args: Namespace) -> None:
    tasks = find_tasks(args.tasks, args.data_dir)
    if args.conv_mode is not None:
        get_template(args.conv_mode)
    if (args.judge_url is None) != (args.judge_model is None):
        raise InputError("--judge-url and --judge-model go together; give both or neither")
    for flag in ("limit", "max_new_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag.replace('_', '-')} is {value}; give 1 or more, or leave it out")
    sampling = sampling_from(args)
    model_path = find_model(args.model_path, args.mmproj)
    name = get_model_name_from_path(model_path)
    out = args.out or Path("eval-runs") / name
    plans = [plan_task(task, args, out) for task in tasks]
    choice = ModelChoice(model_path, args.model_base, args.device, args.dtype, quantization_from(args), args.conv_mode)
    settings = AskSettings(choice, name, sampling, args.seed, num_shards(args.shards), args.quiet)

    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        manifest = {"settings": run_settings(args, plans, choice, name), "shards": settings.shards, **environment()}
        prepare_folder(out, plans, manifest, fresh=args.fresh)
        outcome = answer_jobs([plan.job for plan in plans], settings)
        for plan, faults in zip(plans, outcome.faults, strict=True):
            plan.faults.kinds.update(faults.kinds)
            failed = faults.kinds.get(NOT_ASKED)
            if failed is not None and failed.count == len(plan.job.questions):
                title, number = plan.task.title, failed.count
                raise InputError(f"{title}: none of its {number} questions could be asked; {failed.first}")
        if outcome.template is not None:
            manifest["template"] = outcome.template
            write_json(out / MANIFEST, manifest)
        judge = Judge(args.judge_url, args.judge_model) if args.judge_url else None
        reports = [score_plan(plan, args.data_dir, judge) for plan in plans]
        results = write_results(out, reports, manifest)
        page = write_report(out, results | {"manifest": manifest})
    for report in reports:
        print(table(report))
    print(f"\nwritten: {page}, {out / TABLE}, {out / 'results.json'}")


def plan_task(task: Task, args: Namespace, out: Path) -> TaskPlan:
    """Read a task's questions, and check before a model is loaded that their images exist or may be skipped."""
    questions = load_questions(task, args.data_dir)[: args.limit]
    faults = Faults()
    missing = set(missing_images(questions))
    if missing and not args.skip_missing_images:
        first = next(path for question in questions for path in question.images if path in missing)
        raise InputError(
            f"{task.title}: {len(missing)} images are missing, the first is {str(first)!r}; put them there, or give "
            "--skip-missing-images to count their questions as wrong"
        )
    left_out = frozenset(number for number, question in enumerate(questions) if missing & set(question.images))
    for number in sorted(left_out):
        faults.add("questions without their image", "they are not asked and count as wrong", repr(questions[number].id))
    max_new_tokens = args.max_new_tokens or task.max_new_tokens
    return TaskPlan(task, TaskJob(task.title, questions, out / task.name, max_new_tokens, left_out), faults)


def run_settings(args: Namespace, plans: Sequence[TaskPlan], choice: ModelChoice, name: str) -> JsonRow:
    """Return what decides the answers, for the manifest."""
    return {
        "model": {
            "name": name,
            "path": str(choice.path),
            "hash": model_hash(resolve_checkpoint(choice.path)),
            "base": choice.base,
            "conv_mode": choice.conv_mode or "the model's own",
            "dtype": choice.dtype,
            "quantization": choice.quantization,
        },
        "sampling": {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "num_beams": args.num_beams,
            "seed": args.seed,
            "max_new_tokens": args.max_new_tokens or "each task's own",
        },
        "prompts": {plan.task.name: prompts_hash(plan.job.questions) for plan in plans},
        "questions": {plan.task.name: len(plan.job.questions) for plan in plans},
    }


def prepare_folder(out: Path, plans: Sequence[TaskPlan], manifest: JsonRow, *, fresh: bool) -> None:
    """Write the manifest; `InputError` if `out` holds answers of a run with other settings."""
    file = out / MANIFEST
    if fresh:
        for plan in plans:
            AnswerLog(plan.job.folder, plan.job.questions, "").clear()
    elif file.is_file():
        previous = read_json_object(file, "manifest")
        before = previous["settings"]
        manifest["template"] = previous.get("template")
        changed = differences(before, manifest["settings"])
        if changed:
            raise InputError(
                f"{str(out)!r} holds answers of another run ({'; '.join(changed[:3])}); give another --out, or --fresh to "
                "start over"
            )
        for key in PER_TASK:
            manifest["settings"][key] = before.get(key, {}) | manifest["settings"][key]
    write_json(file, manifest)


def score_plan(plan: TaskPlan, data_dir: Path, judge: Judge | None) -> TaskReport:
    """Score a task's answers from their file, ask the judge where there is one, and write the submission."""
    report = score_questions(plan.task, plan.job.questions, plan.job.folder / "answers.jsonl", plan.faults)
    reviews = plan.job.folder / "reviews.jsonl"
    if plan.task.judge is not None and (judge is not None or reviews.is_file()):
        home = plan.task.home(data_dir)
        scores = judge_answers(plan.task.judge, report.answered, home, judge, reviews, plan.faults)
        report = TaskReport(plan.task, scores, plan.faults, report.answered)
    if plan.task.write is not None:
        try:
            plan.task.write(report.answered, plan.task.home(data_dir), plan.job.folder / "submission")
        except InputError as error:
            plan.faults.add("submissions not written", str(error), plan.task.name)
    return report


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, since two runs in it would answer every question twice."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is writing to {str(folder)!r}; wait for it, or give another --out") from None
        yield
