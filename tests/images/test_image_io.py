"""Opening images: every source and mode, and every way to be broken. Downloads are in test_download.py."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_kit import PNG, encoded, fails, gradient, png_of
from PIL import Image

from llava.errors import InputError
from llava.images.download import ImageLimits
from llava.images.io import load_image

# -- sources ----------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "an image #1.png"
    path.write_bytes(PNG)
    data_url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    quoted = "data:," + "".join(f"%{byte:02X}" for byte in PNG)
    url_safe = "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode().rstrip("=")
    escaped = (
        data_url.replace("+", "%2b").replace("/", "%2F").replace("data:image%2F", "data:image/").replace("=", "%3D")
    )
    for source in (path, str(path), PNG, bytearray(PNG), gradient(), data_url, quoted, url_safe, escaped):
        image = load_image(source)
        assert (image.mode, image.tobytes()) == ("RGB", gradient().tobytes())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG", "GIF"])
def test_formats(kind: str) -> None:
    image = load_image(encoded(gradient(), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert image.size == (12, 8)
    assert image.mode == "RGB"
    if kind not in ("JPEG", "GIF"):
        assert image.tobytes() == gradient().tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_convert_as_pillow_converts(mode: str) -> None:
    image = gradient().convert(mode)
    assert load_image(image).tobytes() == image.convert("RGB").tobytes()


def test_deep_greys_keep_their_shades() -> None:
    deep = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    shades = [0, 0, 1, 128, 255]
    assert np.asarray(load_image(encoded(Image.fromarray(deep))))[0, :, 1].tolist() == shades
    assert np.asarray(load_image(encoded(Image.fromarray(deep), "TIFF")))[0, :, 1].tolist() == shades
    assert np.asarray(load_image(Image.fromarray(deep.astype(np.int32))))[0, :, 1].tolist() == shades
    assert np.asarray(load_image(Image.fromarray(np.array([[7, 255]], dtype=np.int32))))[0, :, 1].tolist() == [7, 255]
    assert np.asarray(load_image(Image.fromarray(np.array([[0.2, 254.9]], dtype=np.float32))))[0, :, 1].tolist() == [
        0,
        254,
    ]
    for bad in (
        np.array([[70000]], dtype=np.int32),
        np.array([[-1]], dtype=np.int32),
        np.float32([[300]]),
        np.float32([[np.nan]]),
    ):
        with pytest.raises(InputError, match="grey values from"):
            load_image(Image.fromarray(bad))


def test_first_frame_of_several() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "TIFF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(load_image(data)).astype(int) - np.asarray(frames[0])).max() <= 3


def test_orientation_of_photographs() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright, its sensor was not
    data = encoded(gradient(), "PNG", exif=exif)
    assert load_image(data).tobytes() == gradient().transpose(Image.Transpose.ROTATE_270).tobytes()
    assert load_image(data, upright=False).tobytes() == gradient().tobytes()


# -- what cannot be read ----------------------------------------------------------------------------------------------


def test_files_that_are_no_image(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("dear diary\n" * 50)
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(encoded(Image.effect_noise((80, 80), 90))[:2000])
    (tmp_path / "cut.jpg").write_bytes(encoded(Image.effect_noise((80, 80), 90), "JPEG")[:900])
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe")
    fails(text, "notes.txt", "not an image in a known format")
    fails(str(tmp_path / "empty.png"), "empty")
    fails(str(tmp_path / "cut.png"), "cut.png", "broken")
    fails(str(tmp_path / "cut.jpg"), "cut.jpg", "broken")
    fails(tmp_path / "photo.heic", "HEIC", "JPEG")
    fails(tmp_path / "page.eps", "PostScript", "save it as PNG or JPEG")
    fails(tmp_path / "pipe", "not an ordinary file")
    fails(tmp_path, "is a folder")
    fails(str(tmp_path / "gone.png"), "no image file", "gone.png")
    fails("nul\0byte.png", "cannot be read")
    fails("x" * 5000, "cannot be read")
    fails("file:///etc/hostname", "file://")
    fails("ftp://host/x.png", "ftp://")
    fails(3.5, "float")
    fails(b"", "empty")
    fails("data:image/png;base64", "comma")
    fails("data:image/png;base64,@@@@", "base64")
    fails("data:image/png;base64,aGVsbG8=", "not an image")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_forbidden_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(PNG)
    path.chmod(0)
    fails(path, "Permission denied")


@pytest.mark.parametrize("size", [(10000, 9000), (12000, 12000), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_not_decoded(size: tuple[int, int], recwarn: pytest.WarningsRecorder) -> None:
    threshold = Image.MAX_IMAGE_PIXELS
    fails(png_of(*size), "pixels")
    assert threshold == Image.MAX_IMAGE_PIXELS
    assert not recwarn.list


def test_broken_in_a_thousand_ways(recwarn: pytest.WarningsRecorder) -> None:
    """Whatever is changed in a file, the answer is an image or an `InputError`, and nothing else."""
    generator = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        whole = bytearray(encoded(gradient(40, 30), kind))
        for _ in range(120):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 4):
                data[place] = generator.integers(0, 256)
            try:
                load_image(bytes(data[: generator.integers(1, len(data) + 1)]), limits=ImageLimits(max_pixels=10**6))
            except InputError:
                refused += 1
    assert refused > 300
    assert not recwarn.list


def test_limits(tmp_path: Path) -> None:
    small = ImageLimits(max_bytes=len(PNG) - 1, allow_private_hosts=True)
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for source in (path, PNG, "data:image/png;base64," + base64.b64encode(PNG + bytes(2000)).decode()):
        fails(source, "bytes are allowed", limits=small)
    fails("data:," + "%00" * 9999, "bytes are allowed", limits=small)
    fails(PNG, "12x8", "95", limits=ImageLimits(max_pixels=95))
    fails(gradient(), "12x8", limits=ImageLimits(max_pixels=95))
    assert load_image(PNG, limits=ImageLimits(max_pixels=96, max_bytes=len(PNG))).size == (12, 8)
    for bad in ({"max_bytes": 0}, {"timeout_s": -1}, {"max_redirects": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            ImageLimits(**bad)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_image_of_a_process(kind: str, tmp_path: Path) -> None:
    """Pillow imports its readers step by step; the first image of a program must not depend on earlier ones."""
    path = tmp_path / "a.png"
    path.write_bytes(encoded(gradient(), kind))
    code = "import sys; from llava.images.io import load_image; print(load_image(sys.argv[1]).size)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("(12, 8)", "")


def test_light_import() -> None:
    heavy = "('torch', 'PIL', 'numpy', 'http.client', 'ssl')"
    code = f"import sys, llava.images.io; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
