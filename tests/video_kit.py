"""Videos for tests, made in memory by PyAV, each frame of one grey that tells its number; and tiny models that take them."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from engine_kit import random_image
from PIL import Image

from llava.images.frames import Video

ANYRES = tiny.ANYRES | {"image_aspect_ratio": "anyres_max_4"}
# As LLaVA-Video's configs have it, and as OneVision's.
KINDS: dict[str, dict[str, Any]] = {
    "rows": {**ANYRES, "mm_newline_position": "grid", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2},
    # As LLaVA-NeXT-Video in transformers' layout.
    "early": {
        **tiny.ANYRES,
        "mm_newline_position": "no_token",
        "mm_spatial_pool_mode": "average",
        "mm_spatial_pool_stride": 2,
        "mm_spatial_pool_before_projector": True,
    },
    "one": {**ANYRES, "mm_spatial_pool_mode": "bilinear", "add_time_instruction": True},
}
STEP = 7  # of grey, from one frame to the next


@cache
def make_video(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    num_frames: int = 36,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    pixel_format: str = "yuv420p",
) -> bytes:
    """A video whose frame n is of grey `n * STEP`, with a key frame every 12."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.gop_size = 12
        for number in range(num_frames):
            frame = np.full((size[1], size[0], 3), number * STEP % 256, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def frame_numbers(frames: tuple[Image.Image, ...]) -> list[int]:
    """Which frames of `make_video` these are, where it has at most 36."""
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in frames]


def make_animation(num_frames: int = 5, *, kind: str = "GIF", milliseconds: int = 200) -> bytes:
    """An animated image whose frame n is of grey `n * STEP`."""
    frames = [Image.new("RGB", (40, 30), (number * STEP,) * 3) for number in range(num_frames)]
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options)
    return file.getvalue()


def write_frames(folder: Path, num_frames: int) -> Path:
    """A folder of images frame1.png to frameN.png, beside a file that is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_frames):
        Image.new("RGB", (40, 30), (number * STEP,) * 3).save(folder / f"frame{number + 1}.png")
    (folder / "notes.txt").write_text("taken on a Monday")
    return folder


@cache
def loaded(kind: str) -> Any:
    from llava.model.builder import load

    folder = Path(tempfile.mkdtemp(prefix="llava-videos-"))
    model = load(tiny.build(folder / kind, "qwen2", seed=3, siglip=True, **KINDS[kind]), device="cpu")
    with torch.no_grad():  # louder than the tiny model is, so that answers depend on all that was asked
        for name, parameter in model.model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif parameter.dim() > 1:
                parameter.mul_(2.0)
    return model


def random_video(seed: int, num_frames: int = 5, *, size: tuple[int, int] = (40, 30), times: bool = True) -> Video:
    frames = tuple(random_image(100 * seed + number, *size) for number in range(num_frames))
    return Video(frames, tuple(number / 2 for number in range(num_frames)) if times else (), num_frames / 2, 2.0)
