"""Videos as values: which frames are chosen, within which limits, from which containers.

In: the times of a video's frames, a `FrameSampling` and `VideoLimits`. Out: numbers of frames; and the `Video` that is made of
them. Nothing is opened or decoded here: video.py opens, video_decode.py decodes. Neither torch, numpy nor Pillow is imported
before it is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, ClassVar, NamedTuple, Protocol

from llava.errors import InputError
from llava.images.decode import Reserve
from llava.images.download import ImageLimits
from llava.images.formats import BYTES_PER_PIXEL

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_FRAMES = 32
MAX_JITTER = 1.5  # frames by which the times of a video with an even rate may be off
OPENING_BYTES = 192 * 2**20  # that opening a file may take, before the size of its frames is known


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video, in the order of their times.

    `times` are seconds since the beginning, one for each frame, or empty where they are not known, as of images in a list.
    """

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...] = ()
    duration: float = 0.0  # seconds of the whole video, 0 where not known
    fps: float = 0.0  # frames per second of the whole video, 0 where not known
    tells_times: bool | None = None  # whether the prompt says when the frames are; None: as the checkpoint says

    def __post_init__(self) -> None:
        if not self.frames:
            raise InputError("a video has at least one frame, and this one has none")
        if self.times and len(self.times) != len(self.frames):
            raise InputError(
                f"a video of {len(self.frames)} frames has {len(self.times)} times; give one for each, or none"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the first frame."""
        return self.frames[0].size

    def describe(self) -> str:
        """What was sampled: "8 frames of 3.6 seconds"."""
        count = f"{len(self.frames)} frame{'s' * (len(self.frames) != 1)}"
        return f"{count} of {self.duration:.1f} seconds" if self.times else count

    def overview(self, *, columns: int = 8, height: int = 120) -> Image.Image:
        """All frames in one image, row by row, each of this height, for people to look at."""
        from PIL import Image

        width = max(1, round(height * self.size[0] / self.size[1]))
        columns = min(columns, len(self.frames))
        sheet = Image.new("RGB", (columns * width, -(-len(self.frames) // columns) * height))
        for number, frame in enumerate(self.frames):
            sheet.paste(frame.resize((width, height)), (number % columns * width, number // columns * height))
        return sheet

    def time_instruction(self) -> str:
        """The sentences by which LLaVA-Video is told, in training too, when its frames are; empty where that is not known."""
        if not self.times:
            return ""
        times = ",".join(f"{time:.2f}s" for time in self.times)
        return (
            f"The video lasts for {self.duration:.2f} seconds, and {len(self.frames)} frames are uniformly sampled from it. "
            f"These frames are located at {times}.Please answer the following questions related to this video."
        )


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video a model sees.

    With `num_frames`, so many with equal distances, the first and the last among them: what LLaVA-NeXT's models were trained
    with. With `fps`, so many for each second. With both, those of `fps` where they are not more than `num_frames`.
    """

    num_frames: int | None = None
    fps: float | None = None
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None: the video's end
    repeats: bool = False  # give `num_frames` frames of a shorter video too, some of them several times

    def __post_init__(self) -> None:
        if self.num_frames is not None and (type(self.num_frames) is not int or self.num_frames < 1):
            raise InputError(f"num_frames is {self.num_frames!r}; a video is seen by 1 frame or more")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise InputError(f"fps is {self.fps!r}; frames per second are a number above 0")
        if not 0 <= self.start < math.inf:
            raise InputError(f"the start of a video is {self.start!r}; it is 0 seconds or more")
        if self.end is not None and not self.start < self.end:
            raise InputError(f"the end of a video is {self.end!r} seconds; it is after the start, {self.start:g}")

    @property
    def needs_times(self) -> bool:
        return self.fps is not None or self.start > 0 or self.end is not None


@dataclass(frozen=True)
class VideoLimits(ImageLimits):
    """What a video may cost. Those of `ImageLimits` count the file's bytes, and the pixels of all chosen frames together.

    Frames that have more pixels together are scaled down while they are decoded.
    """

    max_bytes: int = 1024 * 2**20
    timeout_s: float = 60.0
    max_frames: int = 256  # that are chosen
    max_duration_s: float = 6 * 3600.0
    max_frame_pixels: int = 8192 * 4608  # of one frame, as it is stored
    max_decode_s: float = 120.0  # of processor time

    what: ClassVar[str] = "video"
    an: ClassVar[str] = "a video"
    opened: ClassVar[str] = "a list of frames"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_frames", "max_duration_s", "max_frame_pixels", "max_decode_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"the video limit {name} is {getattr(self, name)!r}; it must be above 0.")


DEFAULT_VIDEO_LIMITS = VideoLimits()


class Container(NamedTuple):
    """A container that is opened, by the demuxer of this name; an animated image has Pillow's name of its format."""

    name: str
    what: str  # for messages
    start: re.Pattern[bytes]
    is_image: bool = False


def _starts(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


CONTAINERS = (
    # AVIF and HEIC files begin alike and are images.
    Container(
        "mov",
        "an MP4 or QuickTime video",
        _starts(rb".{4}(?:ftyp(?!avi[fs]|he[iv][cmsx]|m[is]f1)|moov|mdat|wide|free|skip)"),
    ),
    Container("matroska", "a WebM or Matroska video", _starts(rb"\x1a\x45\xdf\xa3")),
    Container("avi", "an AVI video", _starts(rb"RIFF.{4}AVI ")),
    Container("mpegts", "an MPEG transport stream", _starts(rb"G.{187}G.{187}G")),
    Container("mpeg", "an MPEG video", _starts(rb"\0\0\x01\xba")),
    Container("flv", "a Flash video", _starts(rb"FLV\x01")),
    Container("ogg", "an Ogg video", _starts(rb"OggS")),
    Container("GIF", "an animated GIF", _starts(rb"GIF8[79]a"), is_image=True),
    Container("WEBP", "an animated WebP", _starts(rb"RIFF.{4}WEBP"), is_image=True),
    Container("PNG", "an animated PNG", _starts(rb"\x89PNG\r\n\x1a\n"), is_image=True),
)


def looks_like_video(data: bytes) -> bool:
    """Whether the first bytes of a file are a video's; an animated image is an image where nobody says otherwise."""
    return any(item.start.match(data) for item in CONTAINERS if not item.is_image)


def choose_frames(
    times: Sequence[float], fps: float, sampling: FrameSampling, limits: VideoLimits, name: str
) -> list[int]:
    """Choose frames of a video by their numbers.

    Args:
        times: of all frames, in seconds, ascending.
        fps: their number for each second, on average.

    Raises:
        InputError: no frame is between start and end, or more are asked for than the limits allow.
    """
    import numpy as np

    if sampling.num_frames is not None and sampling.num_frames > limits.max_frames:
        raise InputError(f"num_frames is {sampling.num_frames:,}, and at most {limits.max_frames:,} frames are taken")
    end = math.inf if sampling.end is None else sampling.end
    chosen = [number for number, time in enumerate(times) if sampling.start <= time <= end]
    if not chosen:
        span = "on" if sampling.end is None else f"to {sampling.end:g} s"
        raise InputError(
            f"{name} has no frame from {sampling.start:g} s {span}; it lasts {times[-1] + 1 / fps:.1f} seconds"
        )
    if sampling.fps is not None:
        chosen = _by_rate(chosen, times, fps, sampling.fps)
    num_frames = sampling.num_frames
    if num_frames is None and sampling.fps is None:
        num_frames = DEFAULT_FRAMES
    if num_frames is not None and (len(chosen) > num_frames or sampling.repeats):
        if sampling.fps is not None:  # the frames in between too, so that the distances are equal
            chosen = [number for number, time in enumerate(times) if sampling.start <= time <= end]
        # Rounded down, by numpy's floats, as in training.
        chosen = [chosen[at] for at in np.linspace(0, len(chosen) - 1, num_frames, dtype=int).tolist()]
    if len(chosen) > limits.max_frames:
        raise InputError(
            f"{sampling.fps:g} frames per second of {name} make {len(chosen):,} frames, and at most {limits.max_frames:,} are "
            "taken; give num_frames too, or a smaller rate"
        )
    return chosen


def _by_rate(chosen: list[int], times: Sequence[float], fps: float, rate: float) -> list[int]:
    """Choose `rate` frames for each second: by whole steps, as in training, or by their times where these are uneven."""
    if all(abs(time - number / fps) <= MAX_JITTER / fps for number, time in enumerate(times)):
        return chosen[:: max(1, round(fps / rate))]
    first = due = times[chosen[0]]
    kept = []
    for number in chosen:
        if times[number] >= due:
            kept.append(number)
            due = first + (math.floor((times[number] - first) * rate) + 1) / rate
    return kept


def scaled_to_fit(size: tuple[int, int], count: int, max_pixels: int) -> tuple[int, int]:
    """The size (width, height) by which `count` frames have no more than `max_pixels` together; their own where it fits."""
    width, height = size
    if count * width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (count * width * height))
    return max(1, int(width * scale)), max(1, int(height * scale))


def num_frame_bytes(size: tuple[int, int], count: int) -> int:
    """What frames take in memory."""
    return BYTES_PER_PIXEL * size[0] * size[1] * count


class VideoDecoder(Protocol):
    """Decodes the chosen frames of a file whose container is known; `name` is for messages."""

    def decode_video(
        self,
        file: BinaryIO,
        container: Container,
        sampling: FrameSampling,
        limits: VideoLimits,
        name: str,
        *,
        reserve: Reserve,
    ) -> Video: ...
