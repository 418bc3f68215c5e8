"""Images decoded in processes of their own: the same pixels and sentences as here, within limits, whatever happens."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_kit import PNG, encoded, gradient, png_of
from PIL import Image
from serve_kit import wait_until

from llava.errors import InputError
from llava.images.decoder_pool import DecoderPool, missing_limits
from llava.images.download import DEFAULT_LIMITS, ImageLimits
from llava.images.formats import FORMATS, read_header
from llava.images.io import load_image

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no limits of this kind")


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    pool = DecoderPool(2)
    yield pool
    pool.close()


def outcome(data: bytes, **options: object) -> object:
    """The pixels, or the sentence that says why there are none."""
    try:
        image = load_image(data, **options)  # type: ignore[arg-type]
    except InputError as error:
        return str(error)
    return image.mode, image.size, image.tobytes()


def files() -> list[bytes]:
    """Files of every format, mode and orientation that Pillow writes."""
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"):
            deep = mode in ("I;16", "I", "F")
            image = Image.fromarray(np.arange(96).reshape(8, 12).astype("uint16")) if deep else gradient()
            try:
                found.append(encoded(image.convert(mode), kind))
            except (OSError, ValueError, KeyError):
                continue  # there is no such file
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        for orientation in range(10):
            exif = Image.Exif()
            exif[0x0112] = orientation
            found.append(encoded(gradient(), kind, exif=exif))
    frames = {"save_all": True, "append_images": [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]}
    found += [encoded(gradient(), kind, **frames) for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO")]
    found += [
        encoded(gradient(), "JPEG", progressive=True),
        encoded(gradient().convert("P"), "PNG", transparency=bytes(range(200))),
        encoded(gradient(900, 700)),  # several strips of shared memory
        b"",
        b"\x89PNG\r\n\x1a\n",
        encoded(gradient())[:60],
        png_of(30000, 30000),
        b"qoif" + bytes(40),
    ]
    return found


def test_pixels_and_sentences_are_the_same_as_here(pool: DecoderPool) -> None:
    examples = files()
    assert len(examples) > 90
    shown = 0
    for data in examples:
        for upright in (True, False):
            here = outcome(data, upright=upright)
            assert outcome(data, upright=upright, decoder=pool) == here
            shown += isinstance(here, tuple)
    assert shown > 150


def test_broken_files_end_in_the_same_sentence(pool: DecoderPool) -> None:
    generator = np.random.default_rng(1)
    refused = 0
    limits = ImageLimits(max_pixels=10**6)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"):
        whole = bytearray(encoded(gradient(40, 30), kind))
        for _ in range(40):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 4):
                data[place] = generator.integers(0, 256)
            there = outcome(bytes(data), limits=limits, decoder=pool)
            if isinstance(there, tuple) or "decoder failed" not in there:
                assert there == outcome(bytes(data), limits=limits)
            refused += isinstance(there, str)
    assert refused > 50


def test_many_threads_share_the_processes(pool: DecoderPool) -> None:
    images = [Image.new("RGB", (40 + number, 30), (number, 2 * number, 3)) for number in range(60)]
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda image: load_image(encoded(image), decoder=pool), images))
    assert [image.tobytes() for image in opened] == [image.tobytes() for image in images]
    assert len(pool._idle) <= pool.max_processes


def test_memory_is_reserved_before_and_released_after(pool: DecoderPool) -> None:
    for decoder in ({}, {"decoder": pool}):
        calls: list[int] = []
        load_image(PNG, reserve=calls.append, **decoder)
        assert calls[0] == read_header(PNG, "x", DEFAULT_LIMITS).decode_bytes
        assert sum(calls) == 4 * 12 * 8
        calls = []
        with pytest.raises(InputError):
            load_image(encoded(Image.effect_noise((80, 80), 90))[:2000], reserve=calls.append, **decoder)
        assert sum(calls) == 0
        assert calls[0] > 0

        def refuse(num_bytes: int) -> None:
            raise RuntimeError("full")

        with pytest.raises(RuntimeError, match="full"):
            load_image(PNG, reserve=refuse, **decoder)
    assert load_image(PNG, decoder=pool).size == (12, 8)


def test_a_process_that_dies_is_replaced(pool: DecoderPool) -> None:
    load_image(PNG, decoder=pool)
    (*_, process) = pool._idle
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(InputError, match="its decoder failed"):
        load_image(PNG, decoder=pool)
    assert load_image(PNG, decoder=pool).size == (12, 8)
    assert process not in pool._idle


def test_a_file_that_costs_too_much_time_is_given_up(pool: DecoderPool) -> None:
    """A progressive JPEG repeats its last scan: each repetition costs a pass over the whole image."""
    whole = encoded(Image.new("L", (1500, 1500)), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    started = threading.Event()
    answers: list[object] = []

    def bomb() -> None:
        started.set()
        answers.append(outcome(whole[:-2] + scan * 40_000 + b"\xff\xd9", decoder=pool))

    thread = threading.Thread(target=bomb)
    thread.start()
    started.wait()
    assert load_image(PNG, decoder=pool).size == (12, 8)  # meanwhile, in another process
    thread.join()
    assert isinstance(answers[0], str)
    assert "seconds of processor time" in answers[0]


def test_a_file_that_costs_too_much_memory_is_given_up(tmp_path: Path) -> None:
    """The process itself, with a format that is said to take next to nothing."""
    code = """
import os, sys
from llava.images import decoder_main, formats
decoder_main.SPARE_BYTES = 0
kinds = tuple(kind._replace(bytes_per_pixel=0) for kind in formats.FORMATS)
formats.FORMATS = kinds
data = open(sys.argv[1], "rb").read()
shared = os.memfd_create("x")
os.pwrite(shared, data, 0)
print(decoder_main._answer({"num_bytes": len(data), "name": "'x'", "max_pixels": 10**8, "upright": True}, shared))
"""
    if sys.platform != "linux":
        pytest.skip("only Linux keeps to the limit")
    file = tmp_path / "large.png"
    file.write_bytes(encoded(Image.new("RGB", (6000, 6000))))
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert "'memory': True" in done.stdout, done.stderr
    assert "not enough memory to decode 'x', which has 6000x6000 pixels" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_knows_no_keys_and_is_light(pool: DecoderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_API_KEYS", "a-secret-of-the-server")
    pool.close()
    load_image(PNG, decoder=pool)
    (process,) = pool._idle
    assert "a-secret-of-the-server" not in Path(f"/proc/{process.pid}/environ").read_text()
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "PIL" in maps
    assert "torch" not in maps


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_their_server() -> None:
    code = """
import sys, time
from llava.images.decoder_pool import DecoderPool
from llava.images.io import load_image
pool = DecoderPool()
load_image(bytes.fromhex(sys.argv[1]), decoder=pool)
print(pool._idle[0].pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, PNG.hex()], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    state = Path(f"/proc/{child}/stat")
    wait_until(lambda: not state.exists() or " Z " in state.read_text())  # nobody may be there to collect it


# Headers


def tiff(width: int, height: int, tile: tuple[int, int], *, big: bool = False) -> bytes:
    """A TIFF of one tile, compressed with LZW."""
    data = b"\x80" * 1000
    place = 16 if big else 8
    tags = [
        (256, width), (257, height), (258, 8), (259, 5), (262, 1), (277, 1), (322, tile[0]), (323, tile[1]), (324, place),
        (325, len(data)),
    ]  # fmt: skip
    start = place + len(data)
    if big:
        head = b"II+\0" + struct.pack("<HHQ", 8, 0, start)
        entries = [struct.pack("<HHQQ", tag, 4, 1, value) for tag, value in tags]
        return head + data + struct.pack("<Q", len(tags)) + b"".join(entries) + bytes(8)
    head = b"II*\0" + struct.pack("<I", start)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    return head + data + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("big", [False, True])
def test_tiles_far_larger_than_their_image_are_refused(big: bool) -> None:
    for tile in ((46_000, 46_000), (65_520, 16 * 200), (2**31, 2)):
        with pytest.raises(InputError, match="its tiles are far larger than the whole image"):
            load_image(tiff(16, 16, tile, big=big))
    header = read_header(tiff(300, 200, (512, 512), big=big), "x", DEFAULT_LIMITS)
    assert (header.width, header.height) == (300, 200)
    assert header.decode_bytes == header.format.bytes_per_pixel * (300 * 200 + 512 * 512)


def test_headers_say_what_pillow_says() -> None:
    for data in files():
        try:
            header = read_header(data, "x", DEFAULT_LIMITS)
            image = Image.open(io.BytesIO(data))
        except (InputError, OSError):
            continue
        assert header.num_pixels == image.width * image.height
        assert image.format in (header.format.name, "MPO")
    assert {kind.name for kind in FORMATS} == {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"}


def test_padding_of_headers_is_passed_over_within_bounds() -> None:
    whole = encoded(gradient(), "JPEG")
    padded = whole[:2] + b"\xff" * 5_000_000 + whole[2:]
    header = read_header(padded, "x", DEFAULT_LIMITS)
    assert (header.width, header.height) == (12, 8)
    assert load_image(padded).tobytes() == load_image(whole).tobytes()
    whole = encoded(gradient(), "GIF")
    place = 13 + (3 << (whole[10] & 7) + 1)
    for num_blocks, expected in ((1000, (300, 8)), (4_000_000, (12, 8))):  # beyond the bound the screen's size counts
        comment = b"\x21\xfe" + b"\1x" * num_blocks + b"\0"
        frame = whole.index(b"\x2c", place)
        wide = bytearray(whole[frame:])
        wide[5:7] = struct.pack("<H", 300)
        header = read_header(whole[:place] + comment + bytes(wide), "x", DEFAULT_LIMITS)
        assert (header.width, header.height) == expected


def test_an_image_larger_than_its_header_is_not_decoded() -> None:
    """Two headers in one file: the first is small, and Pillow believes the last."""
    data = encoded(gradient(900, 900), "JPEG")
    place = data.index(b"\xff\xc0")
    small = bytearray(data[place : place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")])
    small[5:9] = struct.pack(">HH", 8, 8)
    with pytest.raises(InputError, match="broken image"):
        load_image(data[:place] + bytes(small) + data[place:])


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\1\0\1\0\x10\x10", "icon"),
        (b"qoif\0\0\0\1", "QOI"),
        (b"P3\n2 2\n255\n", "PPM"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'>", "SVG"),
    ],
)
def test_a_format_that_is_not_decoded_is_named(start: bytes, what: str) -> None:
    with pytest.raises(InputError, match=rf"{what}.*, which is not decoded here; save it as PNG or JPEG\.$"):
        load_image(start + bytes(200))


def test_limits_that_a_system_does_not_have_are_told() -> None:
    assert missing_limits("linux") is None
    assert "memory" in (missing_limits("darwin") or "")
    assert "time and memory" in (missing_limits("win32") or "")
