"""From a checkpoint to a target in another layout: look, write, prove, put in place.

In: a source folder (and its base), a target that does not exist, and what the target shall be. Out: a `Report` of what was
written and proved; or one sentence, and nothing written. A target appears under its name when it is complete and proved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.convert.original import OriginalLayout
from llava.convert.proof import LogitProof, TensorProof, prove_logits, prove_tensors
from llava.convert.source import Source, open_source
from llava.convert.transformers import DEFAULT_NAMES, TransformersLayout
from llava.convert.writer import SHARD_BYTES, Planned, Progress, write_json, write_shards
from llava.disk import refuse_existing, written_whole

RECORD = "conversion.json"
PROOFS = ("full", "tensors")


@dataclass(frozen=True)
class Options:
    """What a target shall be; each layout takes what concerns it."""

    dtype: str | None = None  # fp16, bf16, fp32; None: each tensor keeps its own
    shard_bytes: int = SHARD_BYTES
    tower: str = "keep"
    names: str = DEFAULT_NAMES
    proof: str = "full"


@dataclass(frozen=True)
class Report:
    """What came of a conversion; the same is kept in the target's conversion.json."""

    source: str
    target: Path
    layout: str
    num_bytes: int
    seconds: float  # of writing
    tensors: TensorProof
    logits: LogitProof | None  # None: not compared, because that was asked for
    notes: tuple[str, ...]


LAYOUTS: dict[str, Callable[[Source, Options], Any]] = {
    "original": lambda source, options: OriginalLayout(source, tower=options.tower),
    "transformers": lambda source, options: TransformersLayout(source, names=options.names),
}


def convert(
    path: str | Path, target: str | Path, *, to: str, base: str | Path | None = None, options: Options | None = None
) -> Report:
    """Write the checkpoint at `path` as `target`, a folder that does not exist, in the layout `to`."""
    options = options or Options()
    refuse_existing(Path(target))
    source = open_source(path, base=base, dtype=options.dtype)
    layout = LAYOUTS[to](source, options)
    return write_layout(layout, source, Path(target), to=to, options=options)


def write_layout(layout: Any, source: Source, target: Path, *, to: str, options: Options) -> Report:
    tensors: list[Planned] = layout.tensors()
    total = sum(planned.num_bytes for planned in tensors)
    with written_whole(target, num_bytes=total) as folder:
        started = time.perf_counter()
        with Progress("writing", total) as progress:
            write_shards(folder, tensors, shard_bytes=options.shard_bytes, progress=progress)
        layout.write_beside(folder)
        layout.write_small_files(folder)  # last of all config.json, without which nobody takes a folder for a model
        seconds = time.perf_counter() - started
        proof = prove_tensors(source, folder)
        logits = prove_logits(source, folder, exact=proof.is_exact) if options.proof == "full" else None
        notes = tuple(getattr(layout, "notes", list)())
        report = Report(str(source.folder), target, to, total, seconds, proof, logits, notes)
        write_json(folder / RECORD, _record(report))
    return report


def _record(report: Report) -> dict[str, Any]:
    import torch
    import transformers

    import llava

    values = asdict(report) | {"target": report.target.name, "source": Path(report.source).name}
    versions = {"llava": llava.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return values | {"logits": values["logits"] or "not compared (--proof tensors)", "versions": versions}
