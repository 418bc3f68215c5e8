"""Checks of `llava doctor FILE`: faults of training data, by cause rather than by sample.

In: a data file or a mixture, perhaps a model to read it with. Out: a `DoctorReport` with one finding for each kind of fault,
the number of samples that have it, and the first of them. Samples are validated by data/validate.py; `llava data check`
lists every faulty one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.check import DatasetReport, collect
from llava.data.formats import media_sources
from llava.data.reader import SampleReader
from llava.data.samples import Samples, open_samples
from llava.data.validate import SampleChecker, SampleFault
from llava.diagnose.checks.findings import CAUSES, DoctorFinding, DoctorReport, Fix, found
from llava.errors import InputError

REMEDIES = {
    "malformed": "give every record 'conversations', a list of turns with 'from' and 'value' (docs/data.md); --fix drops them",
    "missing-image": "give the folder of the images with --image-folder, or add the files; --fix drops the samples",
    "broken-image": "copy the files again; --fix drops the samples",
    "placeholders": f"put one {DEFAULT_IMAGE_TOKEN} into the text for each image; --fix puts missing ones at its start",
    "turn-order": "let 'human' and 'gpt' alternate, beginning with 'human'; --fix drops the samples",
    "empty-answer": "write the answers, or drop the turns; --fix drops the samples",
    "nothing-to-train": "add answers, or raise the length limit; --fix drops the samples",
    "too-long": "raise --model_max_length, shorten the samples, or use fewer tiles per image",
    "unread-key": "take the key out, or train it where it belongs (docs/data.md)",
    "duplicate-id": "give every sample its own id; --fix appends numbers",
}
KEPT = ("too-long", "unread-key")  # faults of samples that are trained, if not as was meant
LISTED = 5


def examine_data(
    path: str | Path, *, image_folder: str | None = None, reader: SampleReader | None = None, workers: int = 1
) -> DoctorReport:
    report = DoctorReport(str(path), "data")
    try:
        samples = open_samples(str(path)).distinct()
    except InputError as error:
        report.findings.append(
            found("data-unreadable", str(error), "give a .json, .jsonl or .parquet file of samples", path=str(path))
        )
        return report
    faults = collect(SampleChecker(samples, image_folder, reader), workers=workers)
    report.checked += ["samples", "images", "turns"] + (["labels", "lengths"] if reader is not None else [])
    if reader is None:
        report.skipped += [(name, "--model-path names no model to read with") for name in ("labels", "lengths")]
    report.facts = {"samples": len(samples), "bad_samples": faults.num_bad}
    is_text = Path(path).suffix.lower() in (".json", ".jsonl")
    is_one_file = is_text and len(samples.parts) == 1 and samples.parts[0].file.plain == Path(path)
    report.findings += by_cause(faults, repair=is_one_file)
    return report


def by_cause(faults: DatasetReport, *, repair: bool = False) -> list[DoctorFinding]:
    """Make one finding for each kind of fault, in the order of `REMEDIES`."""
    samples = faults.samples
    fix = _repair(samples, faults.faults) if repair else None
    findings = []
    untrained = {index for index, fault in faults.faults if fault.kind == "nothing-to-train"}
    for kind, remedy in REMEDIES.items():
        hits = [(index, fault) for index, fault in faults.faults if fault.kind == kind]
        if kind == "too-long":  # not if nothing is left to train, which has been reported
            hits = [(index, fault) for index, fault in hits if index not in untrained]
        if hits:
            index, fault = hits[0]
            findings.append(
                found(
                    f"data-{kind}",
                    f"{len(hits)} of {len(samples)} samples: {CAUSES[f'data-{kind}'].meaning}; "
                    f"{samples.describe(index)}: {fault.message}",
                    remedy,
                    fix=fix if kind not in KEPT else None,
                    samples=len(hits),
                    of=len(samples),
                    first_ids=[samples.id(index) for index, _ in hits[:LISTED]],
                )
            )
    return findings


def _repair(samples: Samples, faults: Sequence[tuple[int, SampleFault]]) -> Fix:
    """Make a fix of the whole file: add image placeholders, make ids unique, drop unusable samples."""
    kinds: dict[int, set[str]] = {}
    for index, fault in faults:
        if fault.kind not in KEPT:
            kinds.setdefault(samples.locate(index)[1], set()).add(fault.kind)

    def fix(file: Path) -> str:
        text = file.read_text(encoding="utf-8")
        is_list = file.suffix.lower() == ".json"
        records = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
        kept, marked, renamed = [], 0, 0
        for row, record in enumerate(records):
            found_kinds = kinds.get(row, set())
            if "duplicate-id" in found_kinds:
                record["id"], renamed = f"{record['id']}-{row}", renamed + 1
            found_kinds = found_kinds - {"duplicate-id"}
            if found_kinds == {"placeholders"} and _insert_placeholders(record):
                found_kinds, marked = set(), marked + 1
            if not found_kinds:
                kept.append(record)
        dumps = partial(json.dumps, ensure_ascii=False)
        content = dumps(kept, indent=1) if is_list else "\n".join(map(dumps, kept))
        file.write_text(content + "\n", encoding="utf-8")
        return (
            f"{file.name}: image placeholders added to {marked} samples, {renamed} ids made unique, "
            f"{len(records) - len(kept)} samples dropped, {len(kept)} kept"
        )

    return fix


def _insert_placeholders(record: dict[str, Any]) -> bool:
    """Put a placeholder for each image before the first question; False if the sample has placeholders already."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or any(DEFAULT_IMAGE_TOKEN in str(turn.get("value")) for turn in turns):
        return False
    question = next((turn for turn in turns if turn.get("from") in ("human", "user")), None)
    if question is None:
        return False
    question["value"] = f"{DEFAULT_IMAGE_TOKEN}\n" * len(media_sources(record)) + question["value"]
    return True
