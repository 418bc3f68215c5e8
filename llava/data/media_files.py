"""Find the images and videos of samples: files inside the image folder, bytes in the sample, or addresses.

In: a `MediaSource` and its folder. Out: the image, the frames of the video, or where it is. Training reads every image in every
epoch and on every rank, so addresses are refused unless the user allows them.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from llava.data.media import ImageSource, MediaSource, VideoSource
from llava.errors import InputError
from llava.images.io import load_image
from llava.images.video import FrameSampling, Video, load_video

if TYPE_CHECKING:
    from PIL import Image

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_FLAG = "--image_folder"
FRAMES_OF_FOLDER = 10  # where no number is given, as in LLaVA-NeXT
# Endings of images. Data sets name images by one of them and are handed on with another.
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG", ".GIF", ".WEBP")


def open_image(
    source: MediaSource, image_folder: str | None, *, flag: str = _FLAG, allow_urls: bool = False
) -> Image.Image:
    """Open an image of a sample, see `locate_image`; a video is an InputError."""
    if isinstance(source, VideoSource):
        raise InputError(f"it has a video ({image_label(source)}), which is not shown here; name another sample")
    return load_image(locate_image(source, image_folder, flag=flag, allow_urls=allow_urls))


def open_video(
    source: VideoSource, folder: str | None, sampling: FrameSampling, *, flag: str = _FLAG, allow_urls: bool = False
) -> Video:
    """Open a video of a sample as a few frames of it; of a folder or list of frames `sampling.fps` is not used."""
    located = locate_video(source, folder, flag=flag, allow_urls=allow_urls)
    if isinstance(located, list) or (isinstance(located, str) and os.path.isdir(located)):
        sampling = replace(sampling, fps=None, num_frames=sampling.num_frames or FRAMES_OF_FOLDER)
    return load_video(located, sampling)


def locate_video(
    source: VideoSource, folder: str | None, *, flag: str = _FLAG, allow_urls: bool = False
) -> ImageSource | list[ImageSource]:
    """Return a video's path inside the folder, its bytes, its address, or where its frames are; see `locate_image`."""
    if isinstance(source.source, tuple):
        return [locate_image(frame, folder, flag=flag, allow_urls=allow_urls) for frame in source.source]
    return locate_image(source.source, folder, flag=flag, allow_urls=allow_urls, what="video")


def locate_image(
    source: ImageSource,
    image_folder: str | None,
    *,
    flag: str = _FLAG,
    allow_urls: bool = False,
    what: str = "image",
) -> ImageSource:
    """Return an image's path inside the folder (links there may lead out of it), or its bytes, data: URL or address as it is.

    Where there is no such file, but one of the same name with another ending, it is that one.

    Raises:
        InputError: the path leads out of the folder, or there are several files that differ in the ending.
    """
    if isinstance(source, bytes) or source.startswith("data:"):
        return source
    if _ADDRESS.match(source):
        if allow_urls and source.lower().startswith(("http://", "https://")):
            return source
        raise InputError(
            f"{what} {source!r} is an address; download the {what}s of a data set into their folder, or allow addresses with "
            f"--image{flag[7]}urls"
        )
    if not image_folder:
        raise InputError(f"{what} {source!r} cannot be found: say where the {what}s are with {flag}")
    folder = os.path.abspath(image_folder)
    path = os.path.normpath(os.path.join(folder, source))
    if os.path.commonpath([folder, path]) != folder:
        raise InputError(f"{what} {source!r} lies outside the {what} folder {folder!r}")
    return path if what != "image" or os.path.exists(path) else _with_another_ending(path)


def _with_another_ending(path: str) -> str:
    stem = next((path[: -len(ending)] for ending in ENDINGS if path.endswith(ending)), path)
    found = [stem + ending for ending in ENDINGS if os.path.isfile(stem + ending)]
    found = [
        name for number, name in enumerate(found) if not any(os.path.samefile(name, other) for other in found[:number])
    ]
    if len(found) > 1:
        names = " and ".join(repr(os.path.basename(name)) for name in found)
        raise InputError(f"there is no image file {path!r}, but {names}; name one of them in the data")
    return found[0] if found else path


def image_label(source: MediaSource) -> str:
    """Name an image or a video for messages."""
    if isinstance(source, VideoSource):
        return (
            f"{len(source.source)} frames"
            if isinstance(source.source, tuple)
            else f"the video {image_label(source.source)}"
        )
    if isinstance(source, bytes):
        return f"{len(source):,} bytes in the file"
    return "a data: URL" if source.startswith("data:") else source
