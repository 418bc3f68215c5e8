"""How much memory and time a conversion takes, beside a plain copy of the same files on the same disk.

In: a size and a folder on the disk to be measured. Out: a table, also written with --output. The checkpoint is made of
random shards and deleted afterwards, like every target. Memory is what the process holds of its own at the highest
(anonymous pages) and its whole resident peak; the system's cache of files is not the process's. Files are put out of
that cache before every run.

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

from benchmarks.random_checkpoint import SIZES, make

CASES = {
    "original, sharded anew": ["--to", "original", "--shard-size", "2GB"],
    "transformers": ["--to", "transformers"],
    "original in fp16": ["--to", "original", "--dtype", "fp16"],
    "gguf f16": ["--to", "gguf", "--precision", "f16"],
    "gguf q8_0": ["--to", "gguf", "--precision", "q8_0"],
}


def forget(folder: Path) -> None:
    """Put a folder's files out of the system's cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp` until everything is on the disk."""
    forget(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    forget(target)  # flushes
    return time.perf_counter() - started


def run(words: list[str]) -> tuple[str, float, float, float]:
    """A conversion in a process of its own: what it printed, seconds, highest anonymous and resident memory in GB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "llava", "convert", *words], stdout=subprocess.PIPE, text=True)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        anonymous = max(anonymous, *(int(kb) for kb in re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        resident = max(resident, *(int(kb) for kb in re.findall(r"VmHWM:\s+(\d+)", status)), 0)
        time.sleep(0.02)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"llava convert {' '.join(words)} ended with {process.returncode}")
    return output, time.perf_counter() - started, anonymous / 1e6, resident / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure conversions beside plain copies.")
    parser.add_argument("folder", type=Path, help="a folder to be made on the disk that is measured")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--full-proof", action="store_true", help="also one conversion with logits compared")
    parser.add_argument("--output", type=Path)
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
        for name, words in runs:
            seconds = copy(source, args.folder / "copy")
            shutil.rmtree(args.folder / "copy")
            forget(source)
            target = args.folder / "target"
            output, wall, anonymous, resident = run([str(source), str(target), *words])
            printed = float(re.search(r" in ([\d.]+) s \(", output)[1])  # type: ignore[index]
            written = max(printed, 0.05)  # which is printed as 0.1, and less as 0.0
            bytes_out = size_of(target)
            rows.append(
                f"| {name} | {bytes_out / 1e9:.1f} | {written:.0f} | {bytes_out / 1e6 / written:.0f} | "
                f"{total / 1e6 / seconds:.0f} | {wall - written:.0f} | {anonymous:.2f} | {resident:.2f} |"
            )
            print(output, rows[-1], sep="", flush=True)
            shutil.rmtree(target)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    table = "\n".join(
        [
            f"LLaVA of the shapes of {args.size}, bfloat16, {total / 1e9:.1f} GB of random numbers. {os.cpu_count()}-core CPU, "
            f"torch {torch.__version__}, transformers {transformers.__version__}.",
            "",
            "| target | GB | writing, s | MB/s | `cp` beside it, MB/s | start and proof, s | memory, GB | resident, GB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
    print(table)
    if args.output is not None:
        args.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
