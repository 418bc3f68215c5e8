"""Convert a checkpoint to another layout: read the source, write the target, verify it, move it into place.

In: a source folder (and its base), a target that does not exist, and `ConversionOptions`. Out: a `ConversionReport`, or one
error and nothing written. The target appears under its name only when it is complete and verified.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from llava.convert.gguf.pair import GgufPair
from llava.convert.layouts.delta import DeltaLayout
from llava.convert.layouts.original import OriginalLayout
from llava.convert.layouts.projector import ProjectorLayout
from llava.convert.layouts.transformers import DEFAULT_NAMES, TransformersLayout
from llava.convert.options import NEEDS_BASE
from llava.convert.source import Source, open_source
from llava.convert.verify import LogitComparison, TensorComparison
from llava.convert.writer import SHARD_BYTES, ByteProgress, write_json
from llava.files import flush_tree, refuse_existing, written_whole

RECORD = "conversion.json"


@dataclass(frozen=True)
class ConversionOptions:
    """How the target is written; each layout takes the options that concern it."""

    dtype: str | None = None  # fp16, bf16, fp32; None: each tensor keeps its own
    shard_bytes: int = SHARD_BYTES
    tower: str = "keep"
    names: str = DEFAULT_NAMES
    precision: str = "f16"  # of a GGUF pair
    verification: str = "full"  # or "tensors", which skips the logits


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion, also written to the target's conversion.json."""

    source: str
    target: Path
    layout: str
    num_bytes: int
    write_s: float  # until everything was on the disk
    verify_s: float
    tensors: TensorComparison
    logits: LogitComparison | None  # None: not compared, because that was asked for
    notes: tuple[str, ...]


class Layout(Protocol):
    """What a target consists of, and whether its files say what the source says."""

    @property
    def num_bytes(self) -> int: ...

    def write(self, folder: Path, progress: ByteProgress) -> None: ...

    def verify(self, folder: Path, *, logits: bool) -> tuple[TensorComparison, LogitComparison | None]: ...

    def notes(self) -> list[str]: ...


# What `base` means to the last two is the other side of the sum; to the others, what the source is built on.
LAYOUTS: dict[str, Callable[[Source, ConversionOptions, str | Path | None], Layout]] = {
    "original": lambda source, o, _: OriginalLayout(source, tower=o.tower, shard_bytes=o.shard_bytes),
    "transformers": lambda source, o, _: TransformersLayout(source, names=o.names, shard_bytes=o.shard_bytes),
    "gguf": lambda source, o, _: GgufPair(source, precision=o.precision),
    "projector": lambda source, o, _: ProjectorLayout(source),
    "delta": lambda source, o, base: DeltaLayout(source, base or "", sign=-1, shard_bytes=o.shard_bytes),
    "from-delta": lambda source, o, base: DeltaLayout(source, base or "", sign=1, shard_bytes=o.shard_bytes),
}


def convert(
    path: str | Path,
    target: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    options: ConversionOptions | None = None,
) -> ConversionReport:
    """Write the checkpoint at `path` as `target`, a folder that does not exist, in the layout `to`."""
    options = options or ConversionOptions()
    refuse_existing(Path(target))
    source = open_source(path, base=None if to in NEEDS_BASE else base, dtype=options.dtype)
    layout = LAYOUTS[to](source, options, base)
    with written_whole(Path(target), num_bytes=layout.num_bytes) as folder:
        started = time.perf_counter()
        with ByteProgress("writing", layout.num_bytes) as progress:
            layout.write(folder, progress)
            flush_tree(folder)
        written = time.perf_counter()
        tensors, logits = layout.verify(folder, logits=options.verification == "full")
        verified = time.perf_counter()
        report = ConversionReport(
            source=str(source.folder),
            target=Path(target),
            layout=to,
            num_bytes=layout.num_bytes,
            write_s=written - started,
            verify_s=verified - written,
            tensors=tensors,
            logits=logits,
            notes=tuple(layout.notes()),
        )
        write_json(folder / RECORD, _record(report))
    return report


def _record(report: ConversionReport) -> dict[str, Any]:
    import torch
    import transformers

    import llava

    values = asdict(report) | {"target": report.target.name, "source": Path(report.source).name}
    versions = {"llava": llava.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return values | {"logits": values["logits"] or "not compared", "versions": versions}
