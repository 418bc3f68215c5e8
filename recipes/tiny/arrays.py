"""Write training images and captions as plain arrays, with all cores, for the small CLIP.

In: counts per kind, a tokenizer, typefaces. Out: FOLDER/pixels.npy (N, 112, 112, 3) uint8, captions.npy (N, 2, LENGTH)
uint16 (0 after the end), kinds.npy (N,), truths.json. Photographs are not in here: the trainer varies them on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
from samples import SIDE, Sample, Source, draw_sample

LENGTH = 96
KINDS = ("scene", "sign", "text", "chart")
BOS, EOS = 1, 2
CHUNK = 500


@dataclass(frozen=True)
class Slice:
    """One worker's share: rows start.. of one kind."""

    kind: str
    start: int
    count: int


def write_arrays(
    folder: Path, counts: dict[str, int], source: Source, tokenizer: Path, *, workers: int, first_seed: int = 0
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(counts.values())
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, (total, SIDE, SIDE, 3))
    captions = np.lib.format.open_memmap(folder / "captions.npy", "w+", np.uint16, (total, 2, LENGTH))
    slices, row, kinds = [], 0, []
    for kind, count in counts.items():
        slices += [Slice(kind, row + i, min(CHUNK, count - i)) for i in range(0, count, CHUNK)]
        kinds += [KINDS.index(kind)] * count
        row += count
    random.Random(0).shuffle(slices)
    truths: list[str] = [""] * total
    job = partial(fill, folder=folder, source=source, tokenizer=tokenizer, first_seed=first_seed)
    with ProcessPoolExecutor(workers) as pool:
        for part, found in zip(slices, pool.map(job, slices), strict=True):
            truths[part.start : part.start + part.count] = found
    del pixels, captions
    np.save(folder / "kinds.npy", np.asarray(kinds, dtype=np.int64))
    part = folder / "truths.json.part"  # whoever waits for the file finds it complete
    part.write_text(json.dumps(truths))
    part.rename(folder / "truths.json")


def fill(part: Slice, *, folder: Path, source: Source, tokenizer: Path, first_seed: int) -> list[str]:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    pixels = np.load(folder / "pixels.npy", mmap_mode="r+")
    captions = np.load(folder / "captions.npy", mmap_mode="r+")
    truths = []
    for row in range(part.start, part.start + part.count):
        sample = draw_sample(part.kind, first_seed + row, source)
        pixels[row] = np.asarray(sample.images[0])
        captions[row, 0] = encode(pieces, sample.caption)
        captions[row, 1] = encode(pieces, second_caption(sample, pieces, random.Random(row)))
        truths.append(sample.truth)
    return truths


def second_caption(sample: Sample, pieces: sentencepiece.SentencePieceProcessor, rng: random.Random) -> str:
    """Facts in question form: they carry what a description leaves implicit, such as counts and relations."""
    asked = [qa for qa in sample.questions if qa.category not in ("unknown", "describe", "kind", "absent")]
    text = ""
    for qa in rng.sample(asked, min(4, len(asked))):
        longer = f"{text} {qa.question} {qa.answer}".strip()
        if len(pieces.encode(longer)) > LENGTH - 2:
            break
        text = longer
    return text or sample.caption


def encode(pieces: sentencepiece.SentencePieceProcessor, text: str) -> np.ndarray:
    ids = [BOS, *pieces.encode(text), EOS]
    if len(ids) > LENGTH:
        raise ValueError(f"a caption of {len(ids)} tokens does not fit {LENGTH}: {text!r}")
    return np.asarray(ids + [0] * (LENGTH - len(ids)), dtype=np.uint16)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the arrays")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.model")
    parser.add_argument("--fonts", type=Path, help="folder with train/ and held/ typefaces; without it Pillow's own")
    parser.add_argument("--scenes", type=int, default=140_000)
    parser.add_argument("--signs", type=int, default=20_000)
    parser.add_argument("--texts", type=int, default=140_000)
    parser.add_argument("--charts", type=int, default=10_000)
    parser.add_argument("--held", action="store_true", help="held-out typefaces, texts and seeds")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    started = time.time()
    counts = {"scene": args.scenes, "sign": args.signs, "text": args.texts, "chart": args.charts}
    source = Source(args.fonts, None, held=args.held, plain=True)
    write_arrays(args.out, counts, source, args.tokenizer, workers=args.workers)
    report = {"stage": "arrays", "images": sum(counts.values()), "seconds": round(time.time() - started, 1)}
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
