"""What decoding images in processes of their own costs a server, and what it gains.

    python -m benchmarks.serve.image_decoding [--seconds 3]          table: results/image_decoding.md

Images as cameras and screens make them, decoded in the calling thread and by a `DecoderPool`: processor time of an image, that
of both processes together, the median time of one image after another, and images per second of as many threads as there are
processors.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from llava.images.decoder_pool import DecoderPool
from llava.images.io import load_image

DEMO = Path(__file__).resolve().parents[2] / "images/demo.jpg"
SIZES = {"thumbnail": (336, 336), "web": (640, 480), "screen": (1920, 1080), "photograph": (4000, 3000)}
FORMATS: dict[str, dict[str, int]] = {"JPEG": {"quality": 90}, "PNG": {"compress_level": 6}, "WEBP": {"quality": 90}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number")
    args = parser.parse_args()
    num_threads = os.cpu_count() or 1
    print(f"Python {platform.python_version()}, Pillow {PIL.__version__}, {num_threads} processors\n")
    print("| image | bytes | CPU here, ms | CPU pool, ms | here, ms | pool, ms | here, images/s | pool, images/s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    pool = DecoderPool()
    started = time.perf_counter()
    load_image(DEMO, decoder=pool)
    first = time.perf_counter() - started
    for name, size in SIZES.items():
        for kind, options in FORMATS.items():
            data = encoded(size, kind, options)
            here, there = alternating(data, pool, args.seconds)
            rates = [rate(decode, num_threads, args.seconds) for decode in decoders(data, pool)]
            used = [processor_time(decode, pool, args.seconds) for decode in decoders(data, pool)]
            row = f"| {name} {size[0]}x{size[1]}, {kind} | {len(data):,} | {used[0]:.2f} | {used[1]:.2f} "
            print(f"{row}| {here:.2f} | {there:.2f} | {rates[0]:.0f} | {rates[1]:.0f} |", flush=True)
    print(f"\nThe first image of a server: {1000 * first:.0f} ms.")
    pool.close()


def encoded(size: tuple[int, int], kind: str, options: dict[str, int]) -> bytes:
    """Return a photograph of a size, with the noise of a sensor, without which it would be too easy to decode."""
    image = np.asarray(Image.open(DEMO).convert("RGB").resize(size), dtype=np.float32)
    noise = np.random.default_rng(0).normal(0, 6, image.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def decoders(data: bytes, pool: DecoderPool) -> tuple[Callable[[], object], Callable[[], object]]:
    return lambda: load_image(data), lambda: load_image(data, decoder=pool)


def processor_time(decode: Callable[[], object], pool: DecoderPool, seconds: float) -> float:
    """Return the milliseconds of processor time of an image, in this process and in those of the pool."""

    def used() -> float:
        pids = [process.pid for process in pool._idle]
        return (
            time.process_time() + sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9
        )

    started, before, count = time.perf_counter(), used(), 0
    while time.perf_counter() < started + seconds or count < 3:
        decode()
        count += 1
    return 1000 * (used() - before) / count


def alternating(data: bytes, pool: DecoderPool, seconds: float) -> tuple[float, float]:
    """Return the median milliseconds of both, measured in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + 2 * seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for decode, kept in zip(decoders(data, pool), times, strict=True):
            started = time.perf_counter()
            decode()
            kept.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[0]), statistics.median(times[1])


def rate(decode: Callable[[], object], num_threads: int, seconds: float) -> float:
    counts = [0] * num_threads
    decode()
    started = time.perf_counter()

    def work(number: int) -> None:
        while time.perf_counter() < started + seconds:
            decode()
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
