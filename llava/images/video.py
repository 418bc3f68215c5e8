"""Open a video: choose frames of it, and decode those.

In: a path, bytes, an http(s) or data: URL, a folder or list of images, and a `FrameSampling`. Out: a `Video`, frames as Pillow
RGB images with their times; every failure is an `InputError` of one sentence. Input is untrusted: the container is recognised
by its first bytes and forced, sizes and durations are checked before decoding, and nothing but the given bytes is opened.
Which frames are chosen is in frames.py; decoding is in video_decode.py, in this process, or for servers in others
(decoder_pool.py). Neither torch, Pillow nor PyAV is imported before it is needed.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from llava.errors import InputError
from llava.images.decode import Reserve
from llava.images.formats import looks_like_image
from llava.images.frames import (
    CONTAINERS,
    DEFAULT_FRAMES,
    DEFAULT_VIDEO_LIMITS,
    Container,
    FrameSampling,
    Video,
    VideoDecoder,
    VideoLimits,
    choose_frames,
    looks_like_video,
)
from llava.images.io import load_image, opened_source
from llava.images.video_decode import LocalVideoDecoder

if TYPE_CHECKING:
    from PIL import Image

# What users of this module name beside `load_video`.
__all__ = ["FrameSampling", "Video", "VideoLimits", "load_video", "looks_like_video"]

MAX_FILES = 100_000  # of a folder of frames
FIRST_BYTES = 1024  # by which a container is recognised
NUMBERS = re.compile(r"(\d+)")
URL = re.compile(r"(?:https?|data):", re.IGNORECASE)
VIDEO_ENDINGS = "mp4|m4v|mov|webm|mkv|avi|mpe?g|ogv|flv|3gp"
VIDEO_URL = re.compile(rf"data:video/|https?://[^?#]*\.(?:{VIDEO_ENDINGS})(?:[?#]|$)", re.IGNORECASE)

VideoSource: TypeAlias = "str | Path | bytes | Sequence[str | Path | bytes | Image.Image]"


def load_video(
    source: VideoSource,
    sampling: FrameSampling | None = None,
    limits: VideoLimits = DEFAULT_VIDEO_LIMITS,
    *,
    frame_rate: float | None = None,
    name: str | None = None,
    decoder: VideoDecoder | None = None,
    reserve: Reserve = lambda num_bytes: None,
) -> Video:
    """Open a video as a few frames of it.

    Args:
        source: a path, bytes, an http(s) or data: URL; or the frames: a folder of images, or a list of paths or images.
        sampling: which frames; None: 32 with equal distances, or all of a shorter video.
        frame_rate: of a folder or list of frames, in frames per second; without it their times are not known.
        name: what messages call the video; None: as its source does.
        decoder: decodes the bytes: in this process, or a `DecoderPool` for untrusted bytes.
        reserve: called with the number of bytes that decoding may take, before they are allocated, and with a negative number
            once some are free again; may raise.

    Raises:
        InputError: there is no such video, it is broken, of a kind that is not decoded, or it exceeds a limit; the package
            that decodes videos is not installed.
    """
    sampling = sampling or FrameSampling(DEFAULT_FRAMES)
    if frame_rate is not None and not 0 < frame_rate < math.inf:
        raise InputError(f"the frame rate is {frame_rate!r}; frames per second are a number above 0")
    if isinstance(source, (list, tuple)):
        return _of_images(source, sampling, limits, frame_rate, name or "the list of frames", reserve)
    if isinstance(source, (str, Path)) and _is_folder(source):
        files = _frames_in(Path(source), name or repr(str(source)))
        return _of_images(files, sampling, limits, frame_rate, name or repr(str(source)), reserve)
    if frame_rate is not None:
        raise InputError("a frame rate is for a folder or list of frames; a video file has its own")
    with opened_source(source, limits) as (file, own_name):  # type: ignore[arg-type]
        name = name or own_name
        container = _recognised(file, name)
        return (decoder or LocalVideoDecoder()).decode_video(file, container, sampling, limits, name, reserve=reserve)


def is_video(source: str | Path | bytes, *, as_video: bool = False) -> bool:
    """Whether a source is a video rather than an image, by its first bytes; a URL by its ending or its media type.

    With `as_video`, a folder and an animated image are videos too.
    """
    if isinstance(source, str) and URL.match(source):
        return bool(VIDEO_URL.match(source))
    if not isinstance(source, bytes) and _is_folder(source):
        return as_video
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            start = file.read(FIRST_BYTES)
            return looks_like_video(start) or (as_video and _is_animated(file, start))
    except (OSError, ValueError):  # whoever opens it as an image says what is wrong
        return False


def _is_animated(file: BinaryIO, start: bytes) -> bool:
    if not any(item.is_image and item.start.match(start) for item in CONTAINERS):
        return False
    from PIL import Image

    try:
        return bool(getattr(Image.open(file), "is_animated", False))
    except Exception:  # Pillow's readers raise errors of many types at broken data
        return False


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sorting key by which frame2 comes before frame10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in NUMBERS.split(name) if part]


def _recognised(file: BinaryIO, name: str) -> Container:
    start = file.read(FIRST_BYTES)
    file.seek(0)
    container = next((item for item in CONTAINERS if item.start.match(start)), None)
    if container is not None:
        return container
    if not start:
        raise InputError(f"{name} is empty.")
    if looks_like_image(start):
        raise InputError(f"{name} is an image, not a video; give it as an image.")
    known = ", ".join(item.what.partition(" ")[2] for item in CONTAINERS)
    raise InputError(f"{name} is not a video in a known format ({known}).")


# Frames that are files or images


def _is_folder(source: str | Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(source).st_mode)
    except (OSError, ValueError):  # a URL, a NUL in the name
        return False


def _frames_in(folder: Path, name: str) -> list[Path]:
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file() and not entry.name.startswith("."):
                files.append(entry.name)
                if len(files) > MAX_FILES:
                    raise InputError(
                        f"the folder {name} has more than {MAX_FILES:,} files; name one with the frames of a video."
                    )
    images = [file for file in files if _begins_like_image(folder / file)]
    if not images:
        raise InputError(f"the folder {name} has no images; a folder given as a video holds its frames.")
    return [folder / file for file in sorted(images, key=natural_order)]


def _begins_like_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return looks_like_image(file.read(64))
    except OSError:
        return False


def _of_images(
    sources: Sequence[str | Path | bytes | Image.Image],
    sampling: FrameSampling,
    limits: VideoLimits,
    frame_rate: float | None,
    name: str,
    reserve: Reserve,
) -> Video:
    if not sources:
        raise InputError(f"{name} is empty; a video has at least one frame.")
    if sampling.needs_times and frame_rate is None:
        raise InputError(
            f"{name} does not say when its frames are, so fps, start and end have no meaning; give num_frames."
        )
    fps = frame_rate or 1.0
    times = [number / fps for number in range(len(sources))]
    chosen = choose_frames(times, fps, sampling, limits, name)
    frames: dict[int, Image.Image] = {}
    left = limits.max_pixels
    for number in sorted(set(chosen)):
        source = sources[number]
        known = name if isinstance(source, (str, Path)) else f"frame {number + 1} of {name}"
        if left <= 0:
            raise InputError(f"the frames of {name} have more than the {limits.max_pixels:,} pixels that are allowed.")
        frame = load_image(
            source,
            limits=replace(limits, max_pixels=left),
            name=None if known == name else known,
            reserve=reserve,
        )
        left -= frame.width * frame.height
        frames[number] = frame
    kept = tuple(frames[number] for number in chosen)
    if frame_rate is None:
        return Video(kept)
    return Video(kept, tuple(times[number] for number in chosen), len(sources) / fps, fps)
