"""`llava data check FILE`: read a data set before a training run does, and say what is wrong with it, by id.
`llava data show FILE`: one sample as a model will see it (show.py).

In: a command line. Out: a report on stdout, for people or as JSON, and an exit status: 0, or 1 if faults were found. What
counts as a fault is in validate.py, reading the files is samples.py's work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from llava.cli.colors import shows_unicode
from llava.cli.program import ArgumentParser, called_as, run_program
from llava.data.samples import Samples, open_samples
from llava.data.validate import KINDS, Checker, Fault, Finding
from llava.errors import InputError

EXIT_FAULTS = 1
# Upper ends of the histogram's bars.
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BAR_WIDTH = 40
_SHARE = 64  # samples handed to a process at once


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in PROGRAMS:
        return PROGRAMS[words[0]](words[1:])
    name = called_as("llava data")
    return run_program(_choose, words, name, name=name)


def _choose(words: Sequence[str], name: str) -> None:
    """Where no program is picked: say which there are."""
    if words and words[0] not in ("-h", "--help"):
        raise InputError(f"unknown command {words[0]!r} (known: {', '.join(PROGRAMS)})")
    print(f"usage: {name} check FILE ...   what is wrong with the samples of a file")
    print(f"       {name} show FILE ...    one sample as it will be trained on")
    print(f"\n  {name} check --help, {name} show --help: their flags")


def show_program(argv: Sequence[str]) -> int:
    from llava.data import show

    return show.build_parser().run(show.run, argv)


def check_program(argv: Sequence[str]) -> int:
    return build_parser().run(run, argv)


PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {"check": check_program, "show": show_program}


def run(options: Namespace) -> int:
    samples = open_samples(options.file).distinct()
    reader = None
    if options.model_path:
        from llava.data.reader import read_model

        reader = read_model(options.model_path, conv_mode=options.conv_mode, max_length=options.max_length)
    elif options.max_length or options.conv_mode:
        raise InputError("--max-length and --conv-mode need a tokenizer to count with: name one with --model-path")
    checker = Checker(samples, options.image_folder, reader, look_at_images=not options.no_images)
    report = collect(checker, workers=options.workers)
    unit = "tokens" if reader else "words"
    print(json.dumps(report.as_json(unit), indent=2) if options.json else report.as_text(unit, options.show))
    return EXIT_FAULTS if report.faults else 0


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="llava data check", description="Say what is wrong with a training set, by id.")
    parser.add_argument("file", metavar="FILE", help="what --data_path would be: .json, .jsonl, .parquet, or a mixture")
    parser.add_argument("--image-folder", help="the folder that the samples' images are relative to")
    parser.add_argument("--no-images", action="store_true", help="do not open the images")
    parser.add_argument("--model-path", help="count tokens with this model's tokenizer, and judge lengths by its limit")
    parser.add_argument("--max-length", type=_positive, help="judge lengths by this limit instead")
    parser.add_argument("--conv-mode", help="conversation template; the model's own if absent")
    parser.add_argument("--workers", type=_positive, default=_cores(), help="processes (default: one per core)")
    parser.add_argument("--show", type=_positive, default=10, help="faults to print of each kind (default: 10)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Looking at all samples


@dataclass
class Report:
    """What was found, in the order of the samples."""

    samples: Samples
    faults: list[tuple[int, Fault]] = field(default_factory=list)
    images: Counter[int] = field(default_factory=Counter)  # samples by their number of images
    lengths: Counter[int] = field(default_factory=Counter)
    num_bad: int = 0
    num_unmeasured: int = 0

    def add(self, finding: Finding, extra: Iterable[Fault]) -> None:
        faults = [*finding.faults, *extra]
        self.faults += [(finding.index, fault) for fault in faults]
        self.num_bad += bool(faults)
        self.images[finding.num_images] += 1
        if finding.length is None:
            self.num_unmeasured += 1
        else:
            self.lengths[finding.length] += 1

    def as_json(self, unit: str) -> dict[str, Any]:
        lengths = sorted(self.lengths.elements())
        counts = Counter(fault.kind for _, fault in self.faults)
        return {
            "files": [str(part.file.path) for part in self.samples.parts],
            "samples": len(self.samples),
            "bad_samples": self.num_bad,
            "modalities": dict(self._modalities()),
            "lengths": {
                "unit": unit,
                "min": lengths[0] if lengths else None,
                "median": lengths[len(lengths) // 2] if lengths else None,
                "max": lengths[-1] if lengths else None,
                "histogram": [{"up_to": end, "samples": count} for end, count in self._histogram()],
            },
            "counts": {kind: counts[kind] for kind in KINDS if counts[kind]},
            "faults": [
                {
                    "id": self.samples.id(index),
                    "file": str(self.samples.locate(index)[0].file.path),
                    "index": self.samples.locate(index)[1],
                    "kind": fault.kind,
                    "message": fault.message,
                }
                for index, fault in self.faults
            ],
        }

    def as_text(self, unit: str, shown: int) -> str:
        total = len(self.samples)
        lines = [f"{total:,} samples in {', '.join(str(part.file.path) for part in self.samples.parts)}", ""]
        lines += _bars("images", self._modalities())
        lines += ["", *_bars(unit, [(f"up to {end:,}", count) for end, count in self._histogram()])]
        if self.num_unmeasured:
            lines.append(f"  {self.num_unmeasured:,} samples have no length, since they cannot be read")
        lines.append("")
        if not self.faults:
            return "\n".join([*lines, "no faults"])
        for kind, meaning in KINDS.items():
            found = [(index, fault) for index, fault in self.faults if fault.kind == kind]
            if found:
                lines.append(f"{kind}: {len(found):,} ({meaning})")
                lines += [f"  {self.samples.describe(index)}: {fault.message}" for index, fault in found[:shown]]
                if len(found) > shown:
                    lines.append(f"  and {len(found) - shown:,} more; --show {len(found)} or --json lists them")
        lines.append(f"\n{self.num_bad:,} of {total:,} samples have faults")
        return "\n".join(lines)

    def _modalities(self) -> list[tuple[str, int]]:
        several = sum(count for number, count in self.images.items() if number > 1)
        named = [("text only", self.images[0]), ("one image", self.images[1]), ("several images", several)]
        return [(name, count) for name, count in named if count]

    def _histogram(self) -> list[tuple[int, int]]:
        """Samples up to each length, from the first that occurs to the last."""
        if not self.lengths:
            return []
        ends = [*LENGTHS, max(self.lengths)] if max(self.lengths) > LENGTHS[-1] else list(LENGTHS)
        counts = Counter(dict.fromkeys(ends, 0))
        for length, count in self.lengths.items():
            counts[next(end for end in ends if length <= end)] += count
        filled = [position for position, end in enumerate(ends) if counts[end]]
        return [(end, counts[end]) for end in ends[filled[0] : filled[-1] + 1]]


def collect(checker: Checker, *, workers: int = 1) -> Report:
    """Look at every sample, in several processes where that pays, with a bar on a terminal."""
    from tqdm import tqdm

    report = Report(checker.samples)
    seen: set[str] = set()
    findings = _findings(checker, workers)
    for finding in tqdm(findings, total=len(checker.samples), unit=" samples", disable=None, leave=False, delay=1):
        report.add(finding, _repeated_id(checker.samples, finding.index, seen))
    return report


def _findings(checker: Checker, workers: int) -> Iterator[Finding]:
    indices = range(len(checker.samples))
    if workers == 1 or len(indices) < 4 * _SHARE:
        yield from map(checker, indices)
        return
    # Forked processes share the index's memory; where there is no fork, they get a copy.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods and sys.platform == "linux" else "spawn")
    with closing(context.Pool(workers, initializer=_take, initargs=(checker,))) as pool:
        yield from pool.imap(_look, indices, chunksize=_SHARE)


_checker: Checker | None = None  # of a process that was started to check


def _take(checker: Checker) -> None:
    global _checker
    _checker = checker


def _look(index: int) -> Finding:
    assert _checker is not None
    return _checker(index)


def _repeated_id(samples: Samples, index: int, seen: set[str]) -> list[Fault]:
    name = samples.id(index)
    if name is None:
        return []
    key = json.dumps(name, sort_keys=True)
    if key in seen:
        return [Fault("duplicate-id", f"an earlier sample has the id {name!r} too")]
    seen.add(key)
    return []


def _bars(title: str, rows: Sequence[tuple[str, int]]) -> list[str]:
    """A histogram in text, with blocks where the terminal can show them."""
    block = "█" if shows_unicode(sys.stdout) else "#"
    width = max((len(name) for name, _ in rows), default=0)
    digits = max((len(f"{count:,}") for _, count in rows), default=0)
    room = max(10, min(BAR_WIDTH, shutil.get_terminal_size().columns - width - digits - 6))
    most = max((count for _, count in rows), default=1) or 1
    return [title] + [
        f"  {name:>{width}}  {count:>{digits},}  {block * -(-count * room // most)}".rstrip() for name, count in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
