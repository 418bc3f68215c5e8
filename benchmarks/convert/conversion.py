"""Memory and time of conversions, beside a plain copy of the same files on the same disk.

In: a size, and a folder on the disk to be measured. Out: a table. The checkpoint is made of random shards, and is deleted
afterwards like every target. Memory is the largest anonymous and the largest resident memory of the process; the page cache
does not count. Files are dropped from the page cache before every run.

    python -m benchmarks.convert.conversion /tmp/convert-bench --size 13b --output benchmarks/results/convert.md
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from benchmarks.measure import add_output, process_memory, publish, table
from benchmarks.random_checkpoint import SIZES, make

CASES = {
    "original, sharded anew": ["--to", "original", "--shard-size", "2GB"],
    "transformers": ["--to", "transformers"],
    "original in fp16": ["--to", "original", "--dtype", "fp16"],
    "gguf f16": ["--to", "gguf", "--precision", "f16"],
    "gguf q8_0": ["--to", "gguf", "--precision", "q8_0"],
}


def drop_from_page_cache(folder: Path) -> None:
    """Write a folder's files to the disk, and drop them from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def copy(source: Path, target: Path) -> float:
    """Return the seconds of `cp` until everything is on the disk."""
    drop_from_page_cache(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    drop_from_page_cache(target)  # flushes
    return time.perf_counter() - started


def run(flags: list[str]) -> tuple[str, float, float, float]:
    """Run a conversion; return what it printed, its seconds, and its largest anonymous and resident memory in GB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "llava", "convert", *flags], stdout=subprocess.PIPE, text=True)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            anonymous = max(anonymous, process_memory(process.pid, "RssAnon"))
            resident = max(resident, process_memory(process.pid, "VmHWM"))
        except OSError:
            break
        time.sleep(0.02)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"llava convert {' '.join(flags)} ended with {process.returncode}")
    return output, time.perf_counter() - started, anonymous / 1e9, resident / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure conversions beside plain copies.")
    parser.add_argument("folder", type=Path, help="a folder to be made on the disk that is measured")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--full-proof", action="store_true", help="also one conversion with logits compared")
    add_output(parser)
    args = parser.parse_args()

    args.folder.mkdir(parents=True)
    source = args.folder / "source"
    rows = []
    try:
        make(source, args.size)
        total = size_of(source)
        runs = [(name, [*words, "--proof", "tensors"]) for name, words in CASES.items() if name in args.cases]
        if args.full_proof:
            runs.append(("transformers, with logits", CASES["transformers"]))
        for name, flags in runs:
            seconds = copy(source, args.folder / "copy")
            shutil.rmtree(args.folder / "copy")
            drop_from_page_cache(source)
            target = args.folder / "target"
            output, wall, anonymous, resident = run([str(source), str(target), *flags])
            printed = float(re.search(r" in ([\d.]+) s \(", output)[1])  # type: ignore[index]
            written = max(printed, 0.05)  # 0.0 is printed for less
            bytes_out = size_of(target)
            rates = f"{bytes_out / 1e6 / written:.0f}", f"{total / 1e6 / seconds:.0f}", f"{wall - written:.0f}"
            rows.append(
                (name, f"{bytes_out / 1e9:.1f}", f"{written:.0f}", *rates, f"{anonymous:.2f}", f"{resident:.2f}")
            )
            print(output, " | ".join(rows[-1]), sep="", flush=True)
            shutil.rmtree(target)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    conditions = (
        f"LLaVA of the shapes of {args.size}, bfloat16, {total / 1e9:.1f} GB of random weights. {os.cpu_count()}-core CPU, "
        f"torch {torch.__version__}, transformers {transformers.__version__}."
    )
    columns = (
        "target",
        "GB",
        "writing, s",
        "MB/s",
        "`cp` beside it, MB/s",
        "start and verification, s",
        "memory, GB",
        "resident, GB",
    )
    publish(f"{conditions}\n\n{table(columns, rows)}\n", args.output)


if __name__ == "__main__":
    main()
