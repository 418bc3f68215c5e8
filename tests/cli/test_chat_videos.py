"""`llava chat` about videos: from a file to an answer, and what is said of the frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from video_kit import KINDS, loaded, make_animation, make_video, write_frames

from llava.cli import chat
from llava.cli.image_words import read_line, read_words
from llava.errors import InputError
from llava.images.download import DEFAULT_LIMITS
from llava.images.frames import FrameSampling, Video
from llava.session import LoadedImage, Session, VideoOptions

CLIP = "clip.mp4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.build(tmp_path_factory.mktemp("model"), "qwen2", siglip=True, **KINDS["rows"]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / CLIP).write_bytes(make_video())
    (tmp_path / "dance.gif").write_bytes(make_animation())
    write_frames(tmp_path / "frames", 6)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = chat.main(["--device", "cpu", "--max-new-tokens", "6", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_video_and_a_question(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = ask(capsys, CLIP, "What happens?", "-m", model, "--num-frames", "8", "--json")
    row = json.loads(out)
    assert (status, row["images"], row["num_image_tokens"]) == (0, [CLIP], 16)
    assert f"attached {CLIP} (8 frames of 3.6 seconds, 64x48)" in err
    # The same within a sentence, by a rate, with the times told.
    status, out, err = ask(
        capsys, f"What happens in {CLIP}?", "-m", model, "--fps", "1", "--video-start", "1", "--time-instruction", "-v"
    )
    assert status == 0
    assert "3 frames of 3.6 seconds" in err
    assert "asked: What happens in the video?" in err
    assert "These frames are located at 1.00s,2.00s,3.00s." in err


def test_folders_and_animations_are_videos_where_asked(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, frames in (("frames", "6 frames,"), ("dance.gif", "5 frames of 1.0 seconds")):
        status, _, err = ask(capsys, f"./{source}", "What happens?", "-m", model, "--as-video")
        assert (status, frames in err) == (0, True)
    status, _, err = ask(capsys, "./frames", "What happens?", "-m", model)
    assert (status, "is a folder, not an image" in err) == (2, True)
    assert isinstance(LoadedImage.open("dance.gif").image, Video) is False


def test_frames_are_images_for_a_model_without_videos(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = ask(capsys, CLIP, "What happens?", "--num-frames", "3")
    assert (status, out) == (2, "")
    assert f"takes images and no videos; give {CLIP} with --frames-as-images" in err
    assert "Traceback" not in err
    status, out, err = ask(capsys, CLIP, "What happens?", "--num-frames", "3", "--frames-as-images", "--json")
    row = json.loads(out)
    assert (status, row["images"]) == (0, [CLIP] * 3)
    assert err.count("attached") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-frames", "0"], "num_frames is 0"),
        (["--fps", "-1"], "fps is -1"),
        (["--video-start", "9"], "has no frame from 9 s on; it lasts 3.6 seconds"),
        (["--video-start", "2", "--video-end", "1"], "the end of a video is 1.0 seconds"),
        (["--num-frames", "9999"], "at most 256 frames are taken"),
    ],
)
def test_errors_come_before_the_model(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, out, err = ask(capsys, CLIP, "What happens?", "-m", "/there/is/no/model", *words)
    assert (status, out) == (2, "")
    assert message in err


def test_words_that_name_videos(folder: Path) -> None:
    assert read_words([CLIP, "What happens?"]).sources == (CLIP,)
    line = read_line(f"Is {CLIP} like dance.gif?")
    assert (line.sources, line.question) == ((CLIP, "dance.gif"), "Is the video like the image?")
    (folder / "b.webm").write_bytes(make_video("webm", "libvpx"))
    line = read_line(f"Compare {CLIP} with b.webm and dance.gif, please")
    assert line.question == "Compare the first video with the second video and the image, please"
    assert read_line(f"{CLIP}里发生了什么？").question == "视频里发生了什么？"


def test_a_conversation_about_a_video_is_saved_and_taken_up(folder: Path) -> None:
    session = Session(loaded("rows"))
    options = VideoOptions(FrameSampling(4, start=1.0))
    session.attach(LoadedImage.open_all(CLIP, DEFAULT_LIMITS, options))
    session.record("What happens?", "Much.")
    session.attach(LoadedImage.open_all(CLIP, DEFAULT_LIMITS, VideoOptions(FrameSampling(2), as_images=True)))
    session.record("And in these?", "Less.")
    session.save("saved.json")
    other = Session(loaded("rows"))
    other.load("saved.json", DEFAULT_LIMITS)
    (video, *frames), (_, *before) = other.images, session.images
    assert isinstance(video.image, Video)
    assert video.image.times == pytest.approx((1.0, 1.8, 2.6, 3.5))
    assert [frame.image.tobytes() for frame in frames] == [frame.image.tobytes() for frame in before]
    assert other.conversation("?").get_prompt() == session.conversation("?").get_prompt()
    broken = json.loads((folder / "saved.json").read_text())
    broken["exchanges"][0]["images"][0]["sampling"]["speed"] = 2
    (folder / "saved.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match="is not a conversation that /save wrote"):
        other.load("saved.json", DEFAULT_LIMITS)
