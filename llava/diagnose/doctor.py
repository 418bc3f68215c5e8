"""`llava doctor PATH`: find the cause of what goes wrong with a checkpoint, a data set, a training run or a server.

In: a command line. Out: findings on stdout, as text or JSON, and an exit status: 0 healthy, 1 if something was found, 2 for
a wrong call. The causes are in checks/findings.py; the checks are in checks/checkpoint.py, checks/dataset.py,
checks/training_config.py and checks/server.py. With `--fix`, a copy is repaired and examined again.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llava.cli.colors import Colors, wants_colors
from llava.cli.program import ArgumentParser, add_number
from llava.diagnose.checks.findings import CAUSES, DoctorFinding, DoctorReport
from llava.errors import InputError
from llava.model.checkpoints.hub import gguf_pair

EXIT_FOUND = 1
KINDS = ("checkpoint", "data", "config", "server")
EXAMPLES = """\
examples:
  llava doctor ./llava-v1.5-7b                         a checkpoint: files, tokenizer, projector, numbers, a smoke test
  llava doctor ./llava-v1.5-7b-lora --model-base ./vicuna-7b-v1.5
  llava doctor ./llava-v1.5-7b --quick                 headers and configs only, in seconds
  llava doctor data.json --image-folder images         a data set
  llava doctor run.yaml                                a training run that was not started yet
  llava doctor http://localhost:8000                   a running server
  llava doctor ./broken --fix ./repaired               repair a copy, where that is safe
  llava doctor --list                                  every cause that it knows
"""
WIDTH = 110


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava doctor",
        description="Find the cause of what goes wrong with a checkpoint, a data set, a training run or a server.",
        epilog=EXAMPLES,
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help="a model folder, a data file, a run's .yaml, or a URL")
    parser.add_argument("--as", dest="kind", choices=KINDS, help="what PATH is, where its name does not tell")
    parser.add_argument("--quick", action="store_true", help="checkpoint: read no weights, only headers and configs")
    parser.add_argument("--model-base", metavar="FOLDER", help="checkpoint: the model under a LoRA or projector")
    parser.add_argument("--mmproj", metavar="FILE", help="GGUF file: that of its tower and projector")
    parser.add_argument("--image-folder", metavar="FOLDER", help="data: the folder that images are relative to")
    parser.add_argument("--model-path", "-m", metavar="FOLDER", help="data: read labels and lengths with this model")
    parser.add_argument("--max-length", type=int, metavar="N", help="data: judge lengths by this limit")
    parser.add_argument("--conv-mode", metavar="NAME", help="data: conversation template (default: the model's)")
    parser.add_argument("--api-key", metavar="KEY", help="server: the key that it asks for")
    add_number(parser, "--timeout", 60.0, "SECONDS", "server: per request")
    parser.add_argument("--fix", metavar="COPY", help="write a repaired copy; what cannot be repaired safely stays")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--verbose", "-v", action="store_true", help="say what was looked at, too")
    parser.add_argument("--list", action="store_true", help="list every cause that can be found, and end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    if args.list:
        causes = {code: vars(cause) for code, cause in CAUSES.items()}
        print(json.dumps(causes, indent=2) if args.json else list_causes())
        return 0
    if args.path is None:
        raise InputError("say what to examine: a model folder, a data file, a run's .yaml, or a server's URL")
    kind = args.kind or kind_of(args.path)
    if args.fix and (kind == "server" or Path(args.fix).exists()):
        raise InputError(
            "a server cannot be repaired from here"
            if kind == "server"
            else f"--fix {args.fix!r} exists already; name a folder or file that does not, since the repair is a copy"
        )
    after, done = (None, [])
    with _quiet():
        report = examine_path(kind, args.path, args)
        if args.fix and any(finding.fix for finding in report.findings):
            done = repair(args.path, report.findings, Path(args.fix))
            after = examine_path(kind, args.fix, args)
    if args.json:
        content = report.as_json()
        if after is not None:
            content["fix"] = {"copy": args.fix, "done": done, "left": after.as_json()["findings"]}
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        print(as_text(report, Colors(wants_colors(sys.stdout)), verbose=args.verbose))
        if args.fix:
            print(_repair_text(args.fix, done, after))
    return EXIT_FOUND if report.findings else 0


def kind_of(path: str) -> str:
    """Tell from a path's form and its files which of `KINDS` it is."""
    if re.match(r"https?://", path):
        return "server"
    file = Path(path)
    if file.is_dir() or not file.exists():
        return "checkpoint"  # or a hub repository
    if file.suffix.lower() == ".gguf":
        return "checkpoint"
    if file.suffix.lower() in (".yaml", ".yml"):
        text = file.read_text(encoding="utf-8", errors="replace")
        return "data" if re.search(r"^datasets\s*:", text, flags=re.MULTILINE) else "config"
    return "data"


def examine_path(kind: str, path: str, args: Namespace) -> DoctorReport:
    if kind == "checkpoint":
        from llava.diagnose.checks.checkpoint import examine_checkpoint

        if args.mmproj is not None:
            path = str(gguf_pair(path, args.mmproj))
        return examine_checkpoint(path, args.model_base, quick=args.quick)
    if kind == "data":
        from llava.data.reader import read_model
        from llava.diagnose.checks.dataset import examine_data

        reader = None
        if args.model_path:
            reader = read_model(args.model_path, conv_mode=args.conv_mode, max_length=args.max_length)
        elif args.max_length or args.conv_mode:
            raise InputError("--max-length and --conv-mode need a tokenizer to count with: name one with --model-path")
        return examine_data(path, image_folder=args.image_folder, reader=reader)
    if kind == "config":
        from llava.diagnose.checks.training_config import examine_training

        return examine_training(path)
    from llava.diagnose.checks.server import examine_server

    return examine_server(path, api_key=args.api_key, timeout=args.timeout)


def repair(path: str, findings: Sequence[DoctorFinding], copy: Path) -> list[str]:
    """Copy the input and apply every fix once; return what each of them changed."""
    source = Path(path)
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)
    fixes: list[Callable[[Path], str]] = []
    for finding in findings:
        if finding.fix is not None and finding.fix not in fixes:
            fixes.append(finding.fix)
    return [fix(copy) for fix in fixes]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence libraries and our own log within the block; findings report the same."""
    from llava.cli.terminal import quiet_libraries

    quiet_libraries()
    log = logging.getLogger("llava")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def as_text(report: DoctorReport, colors: Colors, *, verbose: bool = False) -> str:
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.facts.items() if value is not None)
    lines = [colors(report.subject, "bold") + (f"  {colors(facts, 'dim')}" if facts else "")]
    for finding in report.findings:
        meaning = CAUSES[finding.code].meaning
        lines += ["", f"{colors('found', 'red', 'bold')}  {colors(finding.code, 'bold')}: {meaning}"]
        on_a_copy = " (--fix does it, on a copy)" if finding.fix and "--fix" not in finding.remedy else ""
        for name, text in (
            ("what", finding.what),
            ("numbers", ", ".join(f"{key} {value}" for key, value in finding.evidence.items())),
            ("where", ", ".join(finding.where)),
            ("remedy", finding.remedy + on_a_copy),
        ):
            if text:
                lines += _wrapped(name, text, colors)
    if verbose and report.checked:
        lines += ["", *_wrapped("looked at", ", ".join(report.checked), colors)]
    if verbose or report.findings:
        reasons: dict[str, list[str]] = {}
        for check, why in report.skipped:
            reasons.setdefault(why, []).append(check)
        for why, checks in reasons.items():
            lines += _wrapped("not looked at", f"{', '.join(checks)}: {why}", colors)
    count = len(report.findings)
    if count:
        return "\n".join([*lines, "", f"{count} finding{'s' * (count > 1)}"])
    return "\n".join([*lines, colors("nothing found", "green") + f" in {len(report.checked)} checks"])


def _wrapped(name: str, text: str, colors: Colors) -> list[str]:
    head = f"  {name:>7}  "
    body = textwrap.wrap(text, WIDTH - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    return [colors(head, "dim") + body[0], *(" " * len(head) + line for line in body[1:])]


def _repair_text(copy: str, done: Sequence[str], after: DoctorReport | None) -> str:
    if after is None:
        return "nothing here can be repaired safely; no copy was written"
    left = f"left: {', '.join(after.codes)}" if after.findings else "examined again: nothing found"
    return "\n".join([f"repaired copy: {copy}", *(f"  {line}" for line in done), f"  {left}"])


def list_causes() -> str:
    width = max(map(len, CAUSES))
    return "\n".join(f"{code:<{width}}  {cause.meaning}" for code, cause in CAUSES.items())


if __name__ == "__main__":
    sys.exit(main())
