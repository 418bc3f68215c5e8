"""Decode chosen frames of a video file.

In: a file that seeks, its container, and a `FrameSampling`. Out: an opened video, which knows the times of the frames and the
memory that they take before one is decoded, and then decodes them one after another. Videos are read by PyAV (the extra
`video`), animated images by Pillow. This runs in the process of a program for its own user, and for untrusted videos in
processes of their own (decoder_pool.py).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO, Protocol

from llava.errors import InputError, require
from llava.images.decode import Reserve, open_image, reserved, to_rgb, told
from llava.images.frames import (
    Container,
    FrameSampling,
    Video,
    VideoLimits,
    choose_frames,
    num_frame_bytes,
    scaled_to_fit,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from PIL import Image

# Decoders that are run, by the names that FFmpeg gives them.
CODECS = (
    "h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg",
    "theora", "h263", "flv", "prores",
)  # fmt: skip
MAX_PACKETS = 2_000_000  # of a video: ten hours at 50 frames a second
MAX_ANIMATED = 10_000  # frames of an animated image
CODEC_BYTES_PER_PIXEL = 64  # a decoder keeps up to 17 frames, of up to 3 bytes a pixel, and some more
FIXED_BYTES = 64 * 2**20
LAST_FRAMES = 2  # that a decoder may fail to give at a video's end


class LocalVideoDecoder:
    """Decodes in this process, for a program's own user."""

    def decode_video(
        self,
        file: BinaryIO,
        container: Container,
        sampling: FrameSampling,
        limits: VideoLimits,
        name: str,
        *,
        reserve: Reserve,
    ) -> Video:
        opened = open_frames(file, container, sampling, limits, name)
        kept = num_frame_bytes(opened.size, len(opened.times))
        with reserved(reserve, opened.num_bytes + kept, kept):
            return Video(tuple(opened.frames()), opened.times, opened.duration, opened.fps)


class OpenedVideo(Protocol):
    """A video whose frames have been chosen."""

    size: tuple[int, int]  # (width, height) of every frame, before it is turned upright
    times: tuple[float, ...]  # of the chosen frames
    duration: float
    fps: float
    num_bytes: int  # that a decoder takes, without the frames

    def frames(self) -> Iterator[Image.Image]:
        """Decode the chosen frames, RGB, all of one size."""


def open_frames(
    file: BinaryIO,
    container: Container,
    sampling: FrameSampling,
    limits: VideoLimits,
    name: str,
    *,
    num_threads: int = 0,
) -> OpenedVideo:
    """Open a file and choose frames. `name` is for messages; 0 threads are as many as there are processors.

    Raises:
        InputError: it is broken, has no video, or exceeds a limit; PyAV is not installed.
    """
    import_decoders(container)
    if container.is_image:
        return AnimatedImage(file, container, sampling, limits, name)
    return VideoFile(file, container, sampling, limits, name, num_threads=num_threads)


def import_decoders(container: Container) -> None:
    """Import what reads a container.

    Raises:
        MissingPackageError: PyAV is not installed.
    """
    if container.is_image:
        import PIL.Image  # noqa: F401
    else:
        require("av", extra="video")
    import numpy as np  # noqa: F401


class VideoFile:
    """A video of a container and a codec that are on the lists."""

    def __init__(
        self,
        file: BinaryIO,
        container: Container,
        sampling: FrameSampling,
        limits: VideoLimits,
        name: str,
        *,
        num_threads: int,
    ) -> None:
        self._name, self._file, self._kind, self._num_threads = name, file, container, num_threads
        with told(name, "video"):
            self._begin()
            self._check_stream(limits)
            self._index(limits)
        base = self._stream.time_base or Fraction(1, 1000)
        first = self._pts[0]
        times = [float((pts - first) * base) for pts in self._pts]
        self.fps = self._rate(times)
        self.duration = times[-1] + 1 / self.fps
        if self.duration > limits.max_duration_s:
            raise InputError(
                f"{name} lasts {self.duration:,.0f} seconds, and at most {limits.max_duration_s:,.0f} are taken; cut it first."
            )
        self._chosen = choose_frames(times, self.fps, sampling, limits, name)
        self.times = tuple(times[number] for number in self._chosen)
        stored = self._stream.codec_context.width, self._stream.codec_context.height
        self.size = scaled_to_fit(stored, len(self.times), limits.max_pixels)
        self.num_bytes = CODEC_BYTES_PER_PIXEL * stored[0] * stored[1] + FIXED_BYTES

    def frames(self) -> Iterator[Image.Image]:
        with told(self._name, "video"):
            self._begin()
            wanted: Mapping[int, int] = {number: self._chosen.count(number) for number in dict.fromkeys(self._chosen)}
            source = self._sought(list(wanted)) if self._is_indexed else self._counted(list(wanted))
            rotation = None
            for count, frame in zip(wanted.values(), source, strict=True):
                rotation = frame.rotation % 360 if rotation is None else rotation  # one for all
                image = self._image(frame, rotation)
                for _ in range(count):
                    yield image

    def _begin(self) -> None:
        """Open the file, at its first frame. Not every container can be sought back to there."""
        from av.stream import Disposition

        self._file.seek(0)
        self._container = _open_container(self._file, self._kind)
        # An image of the cover is no video.
        streams = [one for one in self._container.streams.video if not one.disposition & Disposition.attached_pic]
        if not streams:
            raise InputError(f"{self._name} has no video in it.")
        self._stream = streams[0]
        if self._stream.codec_context is not None:
            self._stream.codec_context.thread_count = self._num_threads

    def _check_stream(self, limits: VideoLimits) -> None:
        context = self._stream.codec_context
        if context is None or context.codec.name not in CODECS:
            codec = "an unknown codec" if context is None else f"the codec {context.codec.name}"
            raise InputError(
                f"{self._name} is a video of {codec}, which is not decoded here; convert it to H.264 (ffmpeg -i IN OUT.mp4)."
            )
        if context.width * context.height > limits.max_frame_pixels:
            raise InputError(
                f"{self._name} has frames of {context.width}x{context.height} pixels, more than the "
                f"{limits.max_frame_pixels:,} allowed; make it smaller first."
            )
        if not context.width * context.height:
            raise InputError(
                f"{self._name} has frames of {context.width}x{context.height} pixels; there is nothing to see."
            )

    def _index(self, limits: VideoLimits) -> None:
        """Read when each frame is, and where decoding can begin, without decoding: packets have one frame each."""
        times: list[int | None] = []
        keys: list[int] = []
        for packet in self._container.demux(self._stream):
            if packet.size == 0 or packet.is_discard:  # the end, or cut away by an edit list
                continue
            times.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if len(times) > MAX_PACKETS:
                raise InputError(f"{self._name} has more than {MAX_PACKETS:,} frames; cut it first.")
        if not times:
            raise InputError(f"{self._name} has no frames.")
        known = sorted({pts for pts in times if pts is not None})
        self._is_indexed = len(known) == len(times) and bool(keys)
        if not self._is_indexed:  # frames are then found by counting, and their times follow from the rate
            base = self._stream.time_base or Fraction(1, 1000)
            step = 1 / (float(self._stream.average_rate or self._stream.guessed_rate or 25) * float(base))
            known = [round(number * step) for number in range(len(times))]
        self._pts, self._keys = known, sorted(keys)

    def _rate(self, times: list[float]) -> float:
        if len(times) > 1 and times[-1] > 0:
            return (len(times) - 1) / times[-1]
        return float(self._stream.average_rate or self._stream.guessed_rate or 25)

    def _decoded(self) -> Iterator[VideoFrame]:
        return self._container.decode(self._stream)

    def _sought(self, numbers: list[int]) -> Iterator[VideoFrame]:
        """Frames by their numbers, ascending; from one to the next by seeking where a key frame lies between."""
        decoded, frame = self._decoded(), None
        position, seeks = self._keys[0], True  # the time of the last decoded frame
        for number in numbers:
            target = self._pts[number]
            key = self._keys[max(0, bisect.bisect_right(self._keys, target) - 1)]
            if seeks and key > position:
                self._container.seek(key, stream=self._stream, backward=True)
                decoded = self._decoded()
                frame = next(decoded, None)
                if frame is None or frame.pts is None or frame.pts > target:  # it cannot be sought in exactly
                    self._begin()
                    decoded, frame, seeks = self._decoded(), None, False
            while frame is None or frame.pts is None or frame.pts < target:
                following = next(decoded, None)
                if following is None:
                    if frame is None or number - bisect.bisect_left(self._pts, position) > LAST_FRAMES:
                        raise self._incomplete(number)
                    break
                frame = following
                position = frame.pts if frame.pts is not None else position
            yield frame

    def _counted(self, numbers: list[int]) -> Iterator[VideoFrame]:
        """Frames by their numbers, ascending, all before them decoded."""
        decoded, count, frame = self._decoded(), -1, None
        for number in numbers:
            while count < number:
                following = next(decoded, None)
                if following is None:
                    if frame is None or number - count > LAST_FRAMES:
                        raise self._incomplete(number)
                    break
                frame, count = following, count + 1
            assert frame is not None
            yield frame

    def _incomplete(self, number: int) -> InputError:
        second = self.times[self._chosen.index(number)]
        return InputError(f"{self._name} is a broken video: its frames from {second:.1f} s on cannot be decoded.")

    def _image(self, frame: VideoFrame, rotation: int) -> Image.Image:
        from PIL import Image

        # Of its own size this converts colours alone.
        same = (frame.width, frame.height) == self.size
        width, height = self.size
        image = frame.to_image() if same else frame.to_image(width=width, height=height, interpolation="AREA")
        turn = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
        return image.transpose(turn[rotation]) if rotation in turn else image


def _open_container(file: BinaryIO, container: Container) -> InputContainer:
    """Open by the demuxer that the first bytes call for; whatever else a file names is not opened."""
    import av

    av.logging.set_level(av.logging.PANIC)
    whitelist = ",".join(CODECS)
    return av.open(
        file,
        mode="r",
        format=container.name,
        metadata_errors="ignore",
        container_options={"codec_whitelist": whitelist, "protocol_whitelist": "none"},
        io_open=_refuse,
    )


def _refuse(url: str, flags: int, options: object) -> BinaryIO:
    raise InputError("a video refers to another file, which is not opened.")


class AnimatedImage:
    """A GIF, WebP or PNG with several frames."""

    def __init__(
        self, file: BinaryIO, container: Container, sampling: FrameSampling, limits: VideoLimits, name: str
    ) -> None:
        from llava.images.formats import read_header

        self._name = name
        data = file.read()
        header = read_header(data, name, limits)
        if header.num_pixels > limits.max_frame_pixels:
            raise InputError(
                f"{name} has frames of {header.width}x{header.height} pixels, more than the "
                f"{limits.max_frame_pixels:,} allowed."
            )
        with told(name, "video"):
            self._image = open_image(data, header, name)
            ends = self._read_ends()
        if len(ends) < 2:
            raise InputError(f"{name} has one frame; give it as an image.")
        self.duration = ends[-1]
        if self.duration > limits.max_duration_s:
            raise InputError(
                f"{name} lasts {self.duration:,.0f} seconds, and at most {limits.max_duration_s:,.0f} are taken."
            )
        times = [0.0, *ends[:-1]]
        self.fps = len(times) / self.duration
        self._chosen = choose_frames(times, self.fps, sampling, limits, name)
        self.times = tuple(times[number] for number in self._chosen)
        self.size = scaled_to_fit(self._image.size, len(self.times), limits.max_pixels)
        self.num_bytes = header.decode_bytes + FIXED_BYTES

    def _read_ends(self) -> list[float]:
        """When each frame ends, in seconds. A duration of nothing is shown as a tenth of a second, as browsers do."""
        ends: list[float] = []
        end = 0.0
        with suppress(EOFError):
            for number in range(MAX_ANIMATED + 1):
                if number == MAX_ANIMATED:
                    raise InputError(f"{self._name} has more than {MAX_ANIMATED:,} frames; cut it first.")
                self._image.seek(number)
                self._image.load()  # WebP knows a frame's duration only then
                end += (self._image.info.get("duration") or 100.0) / 1000
                ends.append(end)
        self._image.seek(0)
        return ends

    def frames(self) -> Iterator[Image.Image]:
        with told(self._name, "video"):
            for number in self._chosen:
                self._image.seek(number)
                frame = to_rgb(self._image)
                # `seek` goes on to change an image that is RGB already.
                yield frame.copy() if frame.size == self.size else frame.resize(self.size)
