"""`llava data check FILE`: validate training data.

In: what program.py parsed. Out: a report on stdout, as text or as JSON, and an exit status: 0, or 1 if faults were found.
validate.py says what a fault is; samples.py reads the files.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from llava.cli.colors import shows_unicode
from llava.data.samples import Samples, open_samples
from llava.data.validate import FAULT_KINDS, CheckedSample, SampleChecker, SampleFault
from llava.errors import InputError

EXIT_FAULTS = 1
# Upper ends of the histogram's bars.
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BAR_WIDTH = 40
_CHUNK = 64  # samples given to a process at once


def run(options: Namespace) -> int:
    samples = open_samples(options.file).distinct()
    reader = None
    if options.model_path:
        from llava.data.reader import read_model

        reader = read_model(options.model_path, conv_mode=options.conv_mode, max_length=options.max_length)
    elif options.max_length or options.conv_mode:
        raise InputError("--max-length and --conv-mode need a tokenizer to count with: name one with --model-path")
    checker = SampleChecker(
        samples, options.image_folder, reader, look_at_images=not options.no_images, allow_urls=options.image_urls
    )
    report = collect(checker, workers=options.workers)
    unit = "tokens" if reader else "words"
    print(json.dumps(report.as_json(unit), indent=2) if options.json else report.as_text(unit, options.show))
    return EXIT_FAULTS if report.faults else 0


# Validating all samples


@dataclass
class DatasetReport:
    """The faults, images and lengths of a data set, in the order of its samples."""

    samples: Samples
    faults: list[tuple[int, SampleFault]] = field(default_factory=list)
    images: Counter[int] = field(default_factory=Counter)  # samples by their number of images
    lengths: Counter[int] = field(default_factory=Counter)
    num_bad: int = 0
    num_unmeasured: int = 0

    def add(self, checked: CheckedSample, extra: Iterable[SampleFault]) -> None:
        faults = [*checked.faults, *extra]
        self.faults += [(checked.index, fault) for fault in faults]
        self.num_bad += bool(faults)
        self.images[checked.num_images] += 1
        if checked.length is None:
            self.num_unmeasured += 1
        else:
            self.lengths[checked.length] += 1

    def as_json(self, unit: str) -> dict[str, object]:
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
            "notes": self.samples.notes(),
            "counts": {kind: counts[kind] for kind in FAULT_KINDS if counts[kind]},
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
        lines += [f"note: {note}" for note in self.samples.notes()]
        lines.append("")
        if not self.faults:
            return "\n".join([*lines, "no faults"])
        for kind, meaning in FAULT_KINDS.items():
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
        """The number of samples up to each length, from the shortest that occurs to the longest."""
        if not self.lengths:
            return []
        ends = [*LENGTHS, max(self.lengths)] if max(self.lengths) > LENGTHS[-1] else list(LENGTHS)
        counts = Counter(dict.fromkeys(ends, 0))
        for length, count in self.lengths.items():
            counts[next(end for end in ends if length <= end)] += count
        filled = [position for position, end in enumerate(ends) if counts[end]]
        return [(end, counts[end]) for end in ends[filled[0] : filled[-1] + 1]]


def collect(checker: SampleChecker, *, workers: int = 1) -> DatasetReport:
    """Validate every sample, in several processes where there are many, with a progress bar on a terminal."""
    from tqdm import tqdm

    report = DatasetReport(checker.samples)
    seen: set[str] = set()
    results = _checked_samples(checker, workers)
    for checked in tqdm(results, total=len(checker.samples), unit=" samples", disable=None, leave=False, delay=1):
        report.add(checked, _repeated_id(checker.samples, checked.index, seen))
    return report


def _checked_samples(checker: SampleChecker, workers: int) -> Iterator[CheckedSample]:
    indices = range(len(checker.samples))
    if workers == 1 or len(indices) < 4 * _CHUNK:
        yield from map(checker, indices)
        return
    # Forked processes share the index's memory; where there is no fork, they get a copy.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods and sys.platform == "linux" else "spawn")
    with closing(context.Pool(workers, initializer=_set_checker, initargs=(checker,))) as pool:
        yield from pool.imap(_check, indices, chunksize=_CHUNK)


_checker: SampleChecker | None = None  # of a worker process


def _set_checker(checker: SampleChecker) -> None:
    global _checker
    _checker = checker


def _check(index: int) -> CheckedSample:
    assert _checker is not None
    return _checker(index)


def _repeated_id(samples: Samples, index: int, seen: set[str]) -> list[SampleFault]:
    name = samples.id(index)
    if name is None:
        return []
    key = json.dumps(name, sort_keys=True)
    if key in seen:
        return [SampleFault("duplicate-id", f"an earlier sample has the id {name!r} too")]
    seen.add(key)
    return []


def _bars(title: str, rows: Sequence[tuple[str, int]]) -> list[str]:
    """Draw a histogram in text, with blocks where the terminal can show them."""
    block = "█" if shows_unicode(sys.stdout) else "#"
    width = max((len(name) for name, _ in rows), default=0)
    digits = max((len(f"{count:,}") for _, count in rows), default=0)
    bar = max(10, min(BAR_WIDTH, shutil.get_terminal_size().columns - width - digits - 6))
    most = max((count for _, count in rows), default=1) or 1
    return [title] + [
        f"  {name:>{width}}  {count:>{digits},}  {block * -(-count * bar // most)}".rstrip() for name, count in rows
    ]
