"""Write the training data of the two LLaVA stages: standard JSON and a folder of images, with all cores.

In: counts per kind, typefaces, photographs. Out: FOLDER/pretrain.json (image and caption), FOLDER/finetune.json (image
and a conversation of several turns), FOLDER/images/. These are the files that `python -m llava.train.train` reads.
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
from typing import Any

import second
import wordings
from photos import load_photos
from samples import DRAW, Source, draw_sample, reshape
from talk import converse

from llava.data.samples import open_samples

FIRST_SEED = 20_000_000  # apart from the seeds of arrays.py and language.py
CHUNK = 500
STAGES = ("pretrain", "finetune", "second")
_sources: dict[tuple[Path | None, Path | None], Source] = {}  # one per worker process: photographs load once


@dataclass(frozen=True)
class Part:
    """One worker's share of one stage."""

    stage: str
    kind: str
    start: int
    count: int


@dataclass(frozen=True)
class Options:
    fonts: Path | None
    cifar: Path | None
    photos: int | None
    suffix: str


def write_data(folder: Path, counts: dict[str, dict[str, int]], options: Options, *, workers: int) -> dict[str, int]:
    """counts[stage][kind]; returns the rows written per stage."""
    parts = [
        Part(stage, kind, start, min(CHUNK, count - start))
        for stage, kinds in counts.items()
        for kind, count in kinds.items()
        for start in range(0, count, CHUNK)
    ]
    rows: dict[str, list[dict[str, Any]]] = {stage: [] for stage in counts}
    random.Random(0).shuffle(parts)
    wordings.prepare()
    with ProcessPoolExecutor(workers) as pool:
        for part, found in zip(
            parts, pool.map(partial(write_part, folder=folder, options=options), parts), strict=True
        ):
            rows[part.stage] += found
    for stage, found in rows.items():
        random.Random(1).shuffle(found)
        (folder / f"{stage}.json").write_text(json.dumps(found))
        open_samples(folder / f"{stage}.json")  # keeps an index, which the training stage then need not make
    return {stage: len(found) for stage, found in rows.items()}


def open_source(options: Options) -> Source:
    key = (options.fonts, options.cifar)
    if key not in _sources:
        photos = load_photos(options.cifar, "train", limit=options.photos) if options.cifar else None
        _sources[key] = Source(options.fonts, photos)
    return _sources[key]


def write_part(part: Part, *, folder: Path, options: Options) -> list[dict[str, Any]]:
    source = open_source(options)
    inside = f"{part.stage}/{part.kind}-{part.start // CHUNK:04d}"
    (folder / "images" / inside).mkdir(parents=True, exist_ok=True)
    rows = []
    offset = FIRST_SEED * (1 + STAGES.index(part.stage))
    for number in range(part.start, part.start + part.count):
        rng = random.Random(f"{part.stage}-{part.kind}-{number}")
        sample = draw_sample(part.kind, offset + number, source)
        ask = source.asker(rng)
        if part.stage == "pretrain":
            turns = [("", sample.caption)]
        elif part.stage == "second":
            sample = second.harder(sample, rng, lambda seed: draw_sample(part.kind, seed, source), offset + number)
            turns = [(turn.question, turn.answer) for turn in second.converse(ask, sample)]
        else:
            turns = [(turn.question, turn.answer) for turn in converse(ask, sample.questions, rng.randint(3, 6))]
        row: dict[str, Any] = {"id": f"{part.stage}-{part.kind}-{number}"}
        share = second.RESHAPED if part.stage == "second" else 0.125
        names = []
        for place, image in enumerate(sample.images):
            names.append(f"{inside}/{number}{'ab'[place] if len(sample.paints) > 1 else ''}{options.suffix}")
            if not any(
                "[0" in answer or "[0" in question for question, answer in turns
            ):  # boxes are of this very image
                image = reshape(image, rng, sample.places, share=share)
            image.save(folder / "images" / names[-1], **SAVE.get(options.suffix, {}))
        if names:
            row["image"] = names if len(names) > 1 else names[0]
            turns[0] = ("\n".join(["<image>"] * len(names) + [turns[0][0]]).strip(), turns[0][1])
        row["conversations"] = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        rows.append(row)
    return rows


SAVE: dict[str, dict[str, int]] = {".png": {"compress_level": 1}, ".jpg": {"quality": 96, "subsampling": 0}}


def parse_counts(text: str) -> dict[str, int]:
    """ "scene=1000,text=500" -> {"scene": 1000, "text": 500}"""
    counts = {name: int(number) for name, number in (pair.split("=") for pair in text.split(",") if pair)}
    unknown = set(counts) - set(DRAW)
    if unknown:
        raise ValueError(f"unknown kinds {sorted(unknown)}; known: {', '.join(DRAW)}")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files and images/")
    parser.add_argument("--fonts", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--photos", type=int, help="use only this many photographs")
    parser.add_argument(
        "--pretrain", type=parse_counts, default="scene=40000,sign=10000,text=40000,photo=20000,chart=4000"
    )
    parser.add_argument(
        "--finetune",
        type=parse_counts,
        default="scene=170000,sign=30000,text=90000,photo=100000,chart=15000,pair=25000,talk=6000",
    )
    parser.add_argument("--second", type=parse_counts, default="")
    parser.add_argument(
        "--suffix", default=".jpg", choices=(".bmp", ".png", ".jpg"), help="jpg is the smallest, bmp the fastest"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    started = time.time()
    options = Options(args.fonts, args.cifar, args.photos, args.suffix)
    given = {"pretrain": args.pretrain, "finetune": args.finetune, "second": args.second}
    counts = {stage: kinds for stage, kinds in given.items() if kinds}
    rows = write_data(args.out, counts, options, workers=args.workers)
    print(json.dumps({"stage": "dataset", **rows, "seconds": round(time.time() - started, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
