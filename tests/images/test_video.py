"""Videos from outside: which frames are taken, and that nothing but a video's frames comes of any bytes."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_data import golden
from PIL import Image
from video_kit import STEP, frame_numbers, make_animation, make_video, write_frames

from llava.errors import InputError
from llava.images.decoder_pool import DecoderPool
from llava.images.frames import FrameSampling, Video, VideoDecoder, VideoLimits, choose_frames, looks_like_video
from llava.images.io import load_image
from llava.images.video import load_video

GOLDEN = json.loads(golden("next_video/frames.json").read_text())
KINDS = [
    ("mp4", "libx264", "yuv420p"),
    ("mp4", "libx265", "yuv420p10le"),
    ("mp4", "libsvtav1", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("webm", "libvpx", "yuv420p"),
    ("matroska", "mjpeg", "yuvj420p"),
    ("mov", "prores", "yuv422p10le"),
    ("avi", "mpeg4", "yuv420p"),
    ("mpegts", "libx264", "yuv420p"),
    ("flv", "flv", "yuv420p"),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    decoder = DecoderPool(2)
    yield decoder
    decoder.close()


def test_the_frames_that_the_original_chooses() -> None:
    limits = VideoLimits(max_frames=10_000)
    for row in GOLDEN["process_video_with_decord"]:
        times = [number / row["fps"] for number in range(row["frames"])]
        repeats = row["force_sample"] and row["frames_upbound"] > 0
        sampling = FrameSampling(row["frames_upbound"] or None, row["video_fps"], repeats=repeats)
        chosen = choose_frames(times, row["fps"], sampling, limits, "a video")
        if "raises" in row:  # a rate of less than half a frame per second: all frames are taken
            assert len(chosen) == min(row["frames"], row["frames_upbound"] or row["frames"]) or repeats
        else:
            assert chosen == row["frame_idx"]


def test_the_frames_that_the_original_decodes() -> None:
    for row in GOLDEN["process_video_with_pyav"]:
        sampling = FrameSampling(row["frames_upbound"] or None, row["video_fps"])
        video = load_video(golden("next_video/clip.mp4"), sampling)
        means = [float(np.asarray(frame).mean()) for frame in video.frames]
        assert means == pytest.approx(row["frame_means"], abs=0.5)
        assert [len(video.frames), *np.asarray(video.frames[0]).shape] == row["shape"]


@pytest.mark.parametrize(("container", "codec", "pixel_format"), KINDS)
def test_kinds_of_videos(container: str, codec: str, pixel_format: str, pool: DecoderPool) -> None:
    data = make_video(container, codec, pixel_format=pixel_format)
    assert looks_like_video(data)
    video = load_video(data, FrameSampling(9))
    assert frame_numbers(video.frames) == [0, 4, 8, 13, 17, 21, 26, 30, 35]
    assert video.times == pytest.approx([0, 0.4, 0.8, 1.3, 1.7, 2.1, 2.6, 3.0, 3.5], abs=0.01)
    assert (video.duration, video.fps, video.size) == (
        pytest.approx(3.6, abs=0.01),
        pytest.approx(10, abs=0.01),
        (64, 48),
    )
    apart = load_video(data, FrameSampling(9), decoder=pool)
    assert [frame.tobytes() for frame in apart.frames] == [frame.tobytes() for frame in video.frames]
    assert (apart.times, apart.duration, apart.fps) == (video.times, video.duration, video.fps)


@pytest.mark.parametrize(
    ("sampling", "numbers"),
    [
        (FrameSampling(1), [0]),
        (FrameSampling(4), [0, 11, 23, 35]),
        (FrameSampling(fps=2), [0, 5, 10, 15, 20, 25, 30, 35]),
        (FrameSampling(3, fps=2), [0, 17, 35]),
        (FrameSampling(99, fps=2), [0, 5, 10, 15, 20, 25, 30, 35]),
        (FrameSampling(3, start=1, end=2), [10, 15, 20]),
        (FrameSampling(fps=1, start=1.5), [15, 25, 35]),
        (FrameSampling(fps=1000, start=3.3), [33, 34, 35]),
        (FrameSampling(5, start=3.5, repeats=True), [35] * 5),
        (FrameSampling(), [number * 35 // 31 for number in range(32)]),
    ],
)  # fmt: skip
def test_sampling(sampling: FrameSampling, numbers: list[int]) -> None:
    video = load_video(make_video(), sampling)
    assert frame_numbers(video.frames) == numbers
    assert video.times == pytest.approx([number / 10 for number in numbers])


def test_a_rate_is_that_of_the_times_where_these_are_uneven() -> None:
    """Screens and phones record fewer frames where nothing moves."""
    times = [0.0, 0.1, 0.2, 5.0, 5.1, 5.9, 6.0, 9.0]
    for rate, expected in ((1, [0, 3, 6, 7]), (0.2, [0, 3]), (100, [*range(8)])):
        assert choose_frames(times, 7 / 9, FrameSampling(fps=rate), VideoLimits(), "a video") == expected
    jittered = [number / 10 + (0.04 if number % 3 == 1 else 0) for number in range(40)]
    assert choose_frames(jittered, 10, FrameSampling(fps=2), VideoLimits(), "a video") == [*range(0, 40, 5)]


def test_animated_images_folders_and_lists(tmp_path: Path, pool: DecoderPool) -> None:
    for kind in ("GIF", "WEBP", "PNG"):
        data = make_animation(kind=kind)
        assert not looks_like_video(data)  # it is an image, where nobody says otherwise
        for decoder in (None, pool):
            video = load_video(data, FrameSampling(3), decoder=decoder)
            assert (frame_numbers(video.frames), video.times) == (
                [0, 2, 4],
                (0, pytest.approx(0.4), pytest.approx(0.8)),
            )
            assert video.describe() == "3 frames of 1.0 seconds"
    folder = write_frames(tmp_path / "frames", 12)
    video = load_video(folder, FrameSampling(4))
    assert (frame_numbers(video.frames), video.times, video.time_instruction()) == ([0, 3, 7, 11], (), "")
    video = load_video(folder, FrameSampling(fps=1), frame_rate=4)
    assert (frame_numbers(video.frames), video.times, video.duration) == ([0, 4, 8], (0, 1, 2), 3)
    images = [Image.new("L", (9, 9), STEP * number) for number in range(3)]
    assert frame_numbers(load_video(images).frames) == [0, 1, 2]


def test_time_instruction() -> None:
    video = load_video(make_video(), FrameSampling(3))
    assert video.time_instruction() == (
        "The video lasts for 3.60 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,1.70s,3.50s.Please answer the following questions related to this video."
    )


def test_a_phone_held_upright(pool: DecoderPool) -> None:
    """The matrix in an MP4's track header turns the frames."""
    data = make_video(num_frames=5)
    at = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at)[0] == 65536
    sideways = data[:at] + struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30) + data[at + 36 :]
    assert load_video(sideways).size == load_video(sideways, decoder=pool).size == (48, 64)


def test_many_pixels_are_scaled_down() -> None:
    video = load_video(make_video(size=(640, 480)), FrameSampling(12), VideoLimits(max_pixels=1_000_000))
    assert video.size == (333, 250)
    assert frame_numbers(video.frames)[:4] == [0, 3, 6, 9]


@pytest.mark.parametrize("decoder", [None, "pool"])
def test_refusals(decoder: str | None, pool: DecoderPool, tmp_path: Path) -> None:
    tight = VideoLimits(max_bytes=10**6, max_frames=8, max_duration_s=3, max_frame_pixels=64 * 48)
    image = make_animation(1)
    still = tmp_path / "empty"
    still.mkdir()
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    cases: list[tuple[object, FrameSampling | None, VideoLimits, str]] = [
        (b"", None, tight, "is empty"),
        (playlist, None, tight, "is not a video in a known format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", None, tight, "is not a video in a known format"),
        (b"\xff\xd8\xff\xe0" + bytes(99), None, tight, "is an image, not a video"),
        (image, None, tight, "has one frame; give it as an image"),
        (make_video("matroska", "ffv1"), None, tight, "codec ffv1, which is not decoded here; convert it"),
        (make_video()[:600], None, VideoLimits(), "is a broken video"),
        (make_video(), FrameSampling(2), tight, "lasts 4 seconds, and at most 3 are taken"),
        (make_video(size=(64, 64)), None, tight, "has frames of 64x64 pixels, more than the 3,072 allowed"),
        (make_video(), FrameSampling(300), VideoLimits(), "num_frames is 300, and at most 256 frames are taken"),
        (make_video(), FrameSampling(fps=10), replace(tight, max_duration_s=9), "make 36 frames, and at most 8"),
        (make_video(), FrameSampling(start=5), VideoLimits(), "no frame from 5 s on; it lasts 3.6 seconds"),
        (make_video(), None, VideoLimits(max_bytes=99), "at most 99 bytes are allowed"),
        (tmp_path / "none.mp4", None, tight, "there is no video file"),
        (still, None, tight, "has no images; a folder given as a video holds its frames"),
        ([], None, tight, "is empty; a video has at least one frame"),
        ([Image.new("RGB", (9, 9))], FrameSampling(fps=1), tight, "does not say when its frames are"),
        (7, None, tight, "a video is a path, a URL, bytes or a list of frames, not int"),
        ("rtsp://host/camera", None, tight, "a video cannot be read from a rtsp:// address"),
        ("http://127.0.0.1/clip.mp4", None, tight, "videos are not downloaded from there"),
    ]
    for source, sampling, limits, message in cases:
        chosen: VideoDecoder | None = pool if decoder else None
        with pytest.raises(InputError) as caught:
            load_video(source, sampling, limits, decoder=chosen)  # type: ignore[arg-type]
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": 2.0}, r"num_frames is 2\.0"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"start": -1}, "start of a video is -1"),
        ({"start": 3, "end": 3}, "end of a video is 3 seconds; it is after the start, 3"),
    ],
)
def test_samplings_that_cannot_work(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FrameSampling(**values)  # type: ignore[arg-type]


def test_broken_videos_end_in_a_sentence_and_the_pool_goes_on(pool: DecoderPool) -> None:
    randomly = random.Random(1)
    videos = [make_video(), make_video("webm", "libvpx-vp9"), make_video("avi", "mpeg4"), make_animation(4)]
    good, messages = 0, []
    for number in range(80):
        data = bytearray(videos[number % len(videos)])
        for _ in range(randomly.choice((1, 3, 30))):
            data[randomly.randrange(12, len(data))] = randomly.randrange(256)
        try:
            video = load_video(bytes(data), FrameSampling(4), decoder=pool)
            good += 1
            assert 1 <= len(video.frames) <= 4
        except InputError as error:
            messages.append(str(error))
    assert good
    assert messages
    assert not any("\n" in message for message in messages)
    assert frame_numbers(load_video(make_video(), FrameSampling(2), decoder=pool).frames) == [0, 35]


def test_libraries_are_loaded_whatever_the_last_file_was_allowed() -> None:
    decoder = DecoderPool(1)
    try:
        small = io.BytesIO()
        Image.new("RGB", (8, 8)).save(small, "JPEG")
        png = io.BytesIO()
        Image.new("I;16", (8, 8)).save(png, "PNG")
        for _ in range(2):
            assert load_image(small.getvalue(), decoder=decoder).size == (8, 8)
            assert load_image(png.getvalue(), decoder=decoder).size == (8, 8)
            assert load_image(small.getvalue(), decoder=decoder).size == (8, 8)
            assert load_video(make_video(), FrameSampling(1), decoder=decoder).size == (64, 48)
    finally:
        decoder.close()


def test_what_is_reserved_is_released_but_for_the_frames(pool: DecoderPool) -> None:
    held: list[int] = []
    load_video(make_video(), FrameSampling(4), decoder=pool, reserve=held.append)
    assert sum(held) == 4 * 4 * 64 * 48
    assert max(held) >= 7 * 4 * 64 * 48
    held.clear()
    with pytest.raises(InputError):
        load_video(make_video()[:600], decoder=pool, reserve=held.append)
    assert sum(held) == 0

    def refuse(num_bytes: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        load_video(make_video(), decoder=pool, reserve=refuse)
    assert load_video(make_video(), FrameSampling(2), decoder=pool).frames


def test_a_video_is_no_image() -> None:
    for data in (make_video(), make_video("webm", "libvpx"), make_video("avi", "mpeg4")):
        with pytest.raises(InputError, match=r"is a video \(.*\), not an image; give it as a video\.$"):
            load_image(data)


def test_a_video_says_what_it_holds() -> None:
    frame = Image.new("RGB", (8, 8))
    with pytest.raises(InputError, match="has none"):
        Video(())
    with pytest.raises(InputError, match="2 frames has 1 times"):
        Video((frame, frame), (0.0,))
