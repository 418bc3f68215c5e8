"""Convert a checkpoint to another layout: read the source, write the target, verify it, move it into place.

In: a source folder (and its base), a target that does not exist, and `ConversionOptions`. Out: a `ConversionReport`, or one
error and nothing written. The target appears under its name only when it is complete and verified.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from llava.convert.accounting import unused_tensors
from llava.convert.gguf.pair import GgufPair
from llava.convert.layouts.delta import DeltaLayout
from llava.convert.layouts.hf import HFLayout
from llava.convert.layouts.original import OriginalLayout
from llava.convert.layouts.projector import ProjectorLayout
from llava.convert.options import NAME_VERSIONS, NEEDS_BASE, PRECISIONS, TOWER_PLACES, VERIFICATIONS, size_text
from llava.convert.source import Source, open_source
from llava.convert.verify import LogitComparison, TensorComparison, Verification
from llava.convert.writer import SHARD_BYTES, ByteProgress, write_json
from llava.files import atomic_folder, flush_tree, refuse_existing

RECORD = "conversion.json"


@dataclass(frozen=True)
class ConversionOptions:
    """How the target is written; each layout takes the options that concern it."""

    dtype: str | None = None  # fp16, bf16, fp32; None: each tensor keeps its own
    shard_bytes: int = SHARD_BYTES
    tower: str = TOWER_PLACES[0]
    names: str = NAME_VERSIONS[0]
    precision: str = PRECISIONS[0]  # of a GGUF pair
    verification: str = VERIFICATIONS[0]  # "tensors" skips the logits


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
    logits: LogitComparison | None  # None: not compared
    video_logits: LogitComparison | None  # the same
    left_out: Mapping[str, tuple[str, ...]]  # stored tensors of the source that the target does not hold, by reason
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # that use the target

    def summary(self) -> str:
        """Format what was written and how it was verified, a line each."""
        rate = self.num_bytes / 1e6 / max(self.write_s, 1e-9)
        lines = [
            f"wrote {self.target}: {self.layout} layout, {size_text(self.num_bytes)} in {self.write_s:.1f} s "
            f"({rate:.0f} MB/s)",
            f"compared {self.tensors.num_tensors} tensors both ways: largest difference {self.tensors.largest:.3g}",
        ]
        logits = self.logits
        if logits is None:
            lines.append("logits were not compared (--proof tensors, or a layout that is no model by itself)")
        else:
            lines.append(f"compared logits of a sample with an image in float32: {logits.summary()}")
            if logits.pixels is not None:
                lines.append(
                    f"compared prompt and ids of the sample: equal; pixels: largest difference {logits.pixels:.3g}"
                )
        if self.video_logits is not None:
            lines.append(f"compared logits of a sample with a video in float32: {self.video_logits.summary()}")
        for reason, names in self.left_out.items():
            lines.append(f"left out {len(names)} tensors, {names[0]} first: {reason}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"run it: {command}" for command in self.commands)])


class Layout(Protocol):
    """A target in one layout: how much it takes, how it is written, and whether its files hold the source's weights."""

    @property
    def num_bytes(self) -> int: ...
    def write(self, folder: Path, progress: ByteProgress) -> None: ...
    def verify(self, folder: Path, *, logits: bool) -> Verification: ...
    def notes(self) -> list[str]: ...
    def left_out(
        self,
    ) -> dict[str, tuple[str, ...]]: ...  # tensors that the model has and the target does not, by reason
    def commands(self, target: Path) -> list[str]: ...


# Of delta and from-delta, `base` is the other side of the sum; of the others, the model that the source is built on.
LAYOUT_BUILDERS: dict[str, Callable[[Source, ConversionOptions, str | Path | None], Layout]] = {
    "original": lambda source, o, _: OriginalLayout(source, tower=o.tower, shard_bytes=o.shard_bytes),
    "transformers": lambda source, o, _: HFLayout(source, names=o.names, shard_bytes=o.shard_bytes),
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
    """Convert a checkpoint, a model folder or hub repository in any layout, to the layout `to`.

    Args:
        target: The folder to write; it must not exist.
        to: One of `LAYOUT_BUILDERS`.
        base: The base model of an adapter or projector; for deltas, the model that is subtracted or added.

    Raises:
        InputError: The source cannot be read or the layout cannot express it; nothing is written.
        VerificationError: The written target differs from the source; it is removed.
    """
    options = options or ConversionOptions()
    refuse_existing(Path(target))
    source = open_source(path, base=None if to in NEEDS_BASE else base, dtype=options.dtype)
    layout = LAYOUT_BUILDERS[to](source, options, base)
    left_out = unused_tensors(source.meta_model) | layout.left_out()
    with atomic_folder(Path(target), num_bytes=layout.num_bytes) as folder:
        started = time.perf_counter()
        with ByteProgress("writing", layout.num_bytes) as progress:
            layout.write(folder, progress)
            flush_tree(folder)
        written = time.perf_counter()
        found = layout.verify(folder, logits=options.verification == "full")
        verified = time.perf_counter()
        report = ConversionReport(
            source=str(source.folder),
            target=Path(target),
            layout=to,
            num_bytes=layout.num_bytes,
            write_s=written - started,
            verify_s=verified - written,
            tensors=found.tensors,
            logits=found.logits,
            video_logits=found.video_logits,
            left_out=left_out,
            notes=tuple(layout.notes()),
            commands=tuple(layout.commands(Path(target))),
        )
        write_json(folder / RECORD, _record(report))
    return report


def _record(report: ConversionReport) -> dict[str, object]:
    import torch
    import transformers

    import llava

    values = asdict(report) | {"target": report.target.name, "source": Path(report.source).name}
    del values["commands"]  # which name the folder that the target was first in
    versions = {"llava": llava.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return values | {"logits": values["logits"] or "not compared", "versions": versions}
