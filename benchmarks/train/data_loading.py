"""Reading training data: opening a large file, memory of each loader process, images per second and core.

    python -m benchmarks.train.data_loading --samples 665000 --output benchmarks/results/data.md

In: nothing; a file of made-up conversations of the LLaVA-1.5 mix's size, and JPEG images, are written to a temporary folder.
Out: a table. The peer is the usual way: `json.load` of the whole file, a list of dicts forked into every loader process.
Memory is read from /proc, so that this needs Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.measure import add_output, publish

MIB = 2**20
IMAGES = 64
IMAGE_SIZE = (640, 480)


def write_samples(path: Path, count: int) -> None:
    """Dialogues of 1 to 6 rounds, 1.5 KB on average, one in sixteen without an image and longer."""
    rng = random.Random(0)
    words = [
        "a",
        "image",
        "shows",
        "two",
        "people",
        "near",
        "an",
        "old",
        "red",
        "bus",
        "while",
        "birds",
        "sit",
        "on",
        "it",
    ]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write("[" if number == 0 else ", ")
            text_only = number % 16 == 0
            turns = []
            for round_number in range(rng.randint(4, 10) if text_only else rng.randint(1, 7)):
                placeholder = "<image>\n" if round_number == 0 and not text_only else ""
                turns.append({"from": "human", "value": placeholder + rng.choice(texts)[:80]})
                turns.append({"from": "gpt", "value": rng.choice(texts) + (" café" if number % 50 == 0 else "")})
            image = {} if text_only else {"image": f"{number % IMAGES}.jpg"}
            sample = {"id": f"{number:012d}", **image, "conversations": turns}
            file.write(json.dumps(sample, ensure_ascii=False))
        file.write("]")


def write_images(folder: Path) -> None:
    """Smooth colours with some grain: about as many bytes as photographs of this size have."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            IMAGE_SIZE, Image.Resampling.BICUBIC
        )
        grain = rng.integers(-12, 13, (IMAGE_SIZE[1], IMAGE_SIZE[0], 3))
        image = np.clip(np.asarray(coarse).astype(int) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{number}.jpg", quality=85)


def memory_mib() -> dict[str, float]:
    """Return this process's resident memory, and the part that it shares with no other process."""
    fields: dict[str, float] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name.rstrip(":")] = float(value) / 1024
    return {"resident": fields["Rss"], "own": fields["Private_Clean"] + fields["Private_Dirty"]}


def in_new_process(task: str, *arguments: str) -> dict[str, float]:
    """Run a task of this file in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.train.data_loading", "--task", task, *arguments]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


# Tasks


def task_open(path: str) -> dict[str, float]:
    from llava.data.samples import open_samples

    start = time.perf_counter()
    samples = open_samples(path)
    samples.column("words").sum()
    return {"seconds": time.perf_counter() - start, "samples": len(samples), **memory_mib()}


def task_draw(path: str) -> dict[str, float]:
    """Memory of a forked loader process that has drawn 20,000 samples (as text) from all over the file."""
    from llava.data.samples import open_samples

    samples = open_samples(path)
    return _drawn_by_a_loader_process(lambda index: samples[index], len(samples))


def task_peer_open(path: str) -> dict[str, float]:
    start = time.perf_counter()
    with open(path, encoding="utf-8") as file:
        samples = json.load(file)
    return {"seconds": time.perf_counter() - start, "samples": len(samples), **memory_mib()}


def task_peer_draw(path: str) -> dict[str, float]:
    """The same from a list of dicts."""
    with open(path, encoding="utf-8") as file:
        samples = json.load(file)
    return _drawn_by_a_loader_process(lambda index: samples[index], len(samples))


def _drawn_by_a_loader_process(draw: Callable[[int], Any], count: int) -> dict[str, float]:
    import llava.train.run  # noqa: F401  # as in a run, whose loader processes are forked with all of it

    def work(pipe: Any) -> None:
        rng = random.Random(1)
        before = memory_mib()
        start = time.perf_counter()
        for _ in range(20_000):
            sum(len(turn["value"].split()) for turn in draw(rng.randrange(count))["conversations"])
        seconds = time.perf_counter() - start
        after = memory_mib()
        pipe.send({**after, "grown": after["resident"] - before["resident"], "microseconds": seconds / 20_000 * 1e6})

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
    process.start()
    result = ours.recv()
    process.join()
    return result


def task_load(path: str, images: str) -> dict[str, float]:
    """Prepare samples for a 336-pixel tower in one process; return the processor time of each part."""
    import torch

    from llava.assets import embedded_model_path
    from llava.conversation import conv_templates
    from llava.images.image_processor import ClipImageProcessor
    from llava.images.io import load_image
    from llava.mm_utils import process_images
    from llava.text.tokenization import load_tokenizer
    from llava.train.data import LazySupervisedDataset

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(embedded_model_path(), model_max_length=2048)
    tokenizer.pad_token = tokenizer.unk_token
    processor = ClipImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    args = SimpleNamespace(
        image_folder=images,
        image_processor=processor,
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
    )
    dataset = LazySupervisedDataset(path, tokenizer, args, conv=conv_templates["v1"])
    with_image = [index for index, length in enumerate(dataset.modality_lengths[:2000]) if length > 0][:500]

    def timed(work: Callable[[int], Any]) -> float:
        for index in with_image[:20]:
            work(index)
        start = time.process_time()
        for index in with_image:
            work(index)
        return (time.process_time() - start) / len(with_image) * 1e3

    def image(index: int) -> Any:
        return load_image(Path(images) / f"{index % IMAGES}.jpg")

    opened = [image(index) for index in range(8)]
    return {
        "sample_ms": timed(lambda index: dataset[index]),
        "decode_ms": timed(image),
        "pixels_ms": timed(lambda index: process_images([opened[index % 8]], processor, args)),
        "tokens_ms": timed(lambda index: dataset.tokens(dataset.list_data_dict[index], num_images=1)),
        "tokens": sum(len(dataset[index]["input_ids"]) for index in with_image[:50]) / 50,
        "image_kb": sum(file.stat().st_size for file in Path(images).iterdir()) / IMAGES / 1000,
    }


TASKS: dict[str, Callable[..., dict[str, float]]] = {
    "open": task_open,
    "draw": task_draw,
    "peer_open": task_peer_open,
    "peer_draw": task_peer_draw,
    "load": task_load,
}


def lines_of(samples: int, folder: Path) -> Iterator[str]:
    path, images = folder / "samples.json", folder / "images"
    images.mkdir()
    write_samples(path, samples)
    write_images(images)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    first = in_new_process("open", str(path))
    second = in_new_process("open", str(path))
    drawn = in_new_process("draw", str(path))
    peer, peer_drawn = in_new_process("peer_open", str(path)), in_new_process("peer_draw", str(path))
    load = in_new_process("load", str(path), str(images))
    index_mib = sum(file.stat().st_size for file in (folder / "cache" / "llava").iterdir()) / MIB
    yield "# Reading training data"
    yield ""
    yield (
        f"`python -m benchmarks.train.data_loading --samples {samples}` on a machine with {os.cpu_count()} CPU cores "
        f"({platform.machine()}, Python {platform.python_version()}), which other work kept busy at the time. "
        f"{samples:,} made-up conversations, {path.stat().st_size / 1e9:.2f} GB of JSON, "
        f"index {index_mib:.0f} MiB. No GPU was involved."
    )
    yield ""
    yield "| | `llava` | `json.load`, list of dicts |"
    yield "|---|---:|---:|"
    yield f"| open the first time, s | {first['seconds']:.1f} | {peer['seconds']:.1f} |"
    yield f"| open again, s | {second['seconds']:.2f} | {peer['seconds']:.1f} |"
    yield f"| main process after opening, resident MiB | {second['resident']:,.0f} | {peer['resident']:,.0f} |"
    yield f"| loader process of a run, resident MiB | {drawn['resident']:,.0f} | {peer_drawn['resident']:,.0f} |"
    yield f"| of that, not shared with any other process, MiB | {drawn['own']:,.0f} | {peer_drawn['own']:,.0f} |"
    yield f"| draw one sample at random, µs | {drawn['microseconds']:.0f} | {peer_drawn['microseconds']:.0f} |"
    yield ""
    yield "Loader processes have drawn 20,000 samples from all over the file before their memory is read; what is resident"
    yield "is mostly the program itself (torch, transformers), in pages that all of them share. Times are wall clock."
    yield ""
    width, height = IMAGE_SIZE
    yield f"One loader process, JPEG of {width}x{height} ({load['image_kb']:.0f} kB) padded and resized to 336x336, CPU time:"
    yield ""
    yield "| step | ms |"
    yield "|---|---:|"
    yield f"| read and decode the image | {load['decode_ms']:.2f} |"
    yield f"| pad, resize, normalise | {load['pixels_ms']:.2f} |"
    yield f"| parse, render, tokenize, label ({load['tokens']:.0f} tokens) | {load['tokens_ms']:.2f} |"
    yield f"| whole sample | {load['sample_ms']:.2f} |"
    yield f"| **images/s per core** | **{1000 / load['sample_ms']:.0f}** |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=665_000)
    add_output(parser)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(TASKS[options.task](*options.arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(lines_of(options.samples, Path(folder))) + "\n"
    publish(text, options.output)


if __name__ == "__main__":
    main()
