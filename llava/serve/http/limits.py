"""The limits of one request, and the opening of its images and videos within them.

In: limits, and the images and videos of a request as URLs or base64. Out: PIL images and `Video`s, or an `InputError`. Body
sizes, hosts and API keys are checked in middleware.py; downloads are in images/download.py. Both are decoded in processes of
their own (images/decoder_pool.py), and what that takes is reserved before.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.images.decoder_pool import DecoderPool
from llava.images.download import ImageLimits
from llava.images.frames import DEFAULT_FRAMES, FrameSampling, Video, VideoLimits
from llava.images.io import decode_base64, load_image
from llava.images.video import load_video

if TYPE_CHECKING:
    from PIL import Image

    from llava.serve.http.memory_budget import Reservation


SERVED_VIDEOS = VideoLimits(
    max_bytes=100 * 2**20,
    timeout_s=30.0,
    max_frames=128,
    max_duration_s=3600.0,
    max_frame_pixels=4096 * 2304,
    max_decode_s=60.0,
)


@dataclass(frozen=True)
class ServeLimits:
    """What one request may take. The defaults suit a server on a network."""

    max_images: int = 16  # of one request, videos included
    max_requests: int = (
        2048  # answers at once, waiting ones, prompts and completions counted one by one; one more gets 429
    )
    deadline_s: float = 600.0  # from the first byte of a request to the last of its answer
    images: ImageLimits = field(default_factory=lambda: ImageLimits(max_bytes=20 * 2**20, timeout_s=10.0))
    videos: VideoLimits = SERVED_VIDEOS
    allow_urls: bool = True  # download images and videos from http and https addresses
    strict: bool = False  # refuse fields of bodies that are not known
    image_folder: Path | None = None  # file:// addresses are read in this folder; None: nowhere
    decoder: DecoderPool = field(default_factory=DecoderPool, compare=False)  # starts its processes when an image comes

    def __post_init__(self) -> None:
        for name in ("max_requests", "deadline_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"the limit {name} is {getattr(self, name)!r}; it must be above 0")
        if self.max_images < 0:
            raise InputError(f"the limit max_images is {self.max_images!r}; it must be 0 or more")
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise InputError(f"there is no image folder {str(self.image_folder)!r}")

    def check_count(self, num_images: int) -> None:
        if num_images > self.max_images:
            raise InputError(f"the request has {num_images} images, and this server takes at most {self.max_images}")


@dataclass(frozen=True)
class VideoUrl:
    """A video of a request: its data:, http(s): or file: URL, and which frames of it are asked for."""

    url: str
    sampling: FrameSampling = field(default_factory=FrameSampling)
    tells_times: bool | None = None  # as `Video` has it

    def allowed_by(self, limits: VideoLimits) -> FrameSampling:
        """The frames asked for; where nothing is, as many as usual within the limits."""
        if self.sampling.num_frames is None and self.sampling.fps is None:
            return replace(self.sampling, num_frames=min(DEFAULT_FRAMES, limits.max_frames))
        return self.sampling


Source = str | bytes | Path


def open_images(
    urls: Sequence[str | VideoUrl], limits: ServeLimits, reservation: Reservation
) -> list[Image.Image | Video]:
    """Open images and videos of data:, http(s): and file: URLs.

    The pixels of all images together are limited as those of one image, and so are those of all videos' frames.
    """
    return _open_all(urls, lambda url, allowed: _source_of(url, limits, allowed), limits, reservation)


def decode_images(
    texts: Sequence[str | VideoUrl], limits: ServeLimits, reservation: Reservation
) -> list[Image.Image | Video]:
    """Open the images of the original protocol: base64, with or without the head of a data: URL."""

    def source(text: str, allowed: ImageLimits) -> Source:
        return text if text.startswith("data:") else decode_base64(text, "an image", allowed)

    return _open_all(texts, source, limits, reservation)


def _open_all(
    given: Sequence[str | VideoUrl],
    source_of: Callable[[str, ImageLimits], Source],
    limits: ServeLimits,
    reservation: Reservation,
) -> list[Image.Image | Video]:
    limits.check_count(len(given))
    opened: list[Image.Image | Video] = []
    left: dict[bool, int] = {
        False: limits.images.max_pixels,
        True: limits.videos.max_pixels,
    }  # by whether it is a video
    numbers = {False: 0, True: 0}
    for one in given:
        is_video = isinstance(one, VideoUrl)
        numbers[is_video] += 1
        usual = limits.videos if is_video else limits.images
        if left[is_video] <= 0:
            raise InputError(
                f"the {usual.what}s before {usual.what} {numbers[is_video]} have all {usual.max_pixels:,} pixels that are "
                "allowed"
            )
        try:
            if isinstance(one, VideoUrl):
                videos = replace(limits.videos, max_pixels=left[True])
                video = load_video(
                    source_of(one.url, videos),
                    one.allowed_by(videos),
                    videos,
                    decoder=limits.decoder,
                    reserve=reservation.change,
                )
                opened.append(replace(video, tells_times=one.tells_times))
                left[True] -= len(video.frames) * video.size[0] * video.size[1]
            else:
                images = replace(limits.images, max_pixels=left[False])
                source = source_of(one, images)
                image = load_image(source, limits=images, decoder=limits.decoder, reserve=reservation.change)
                opened.append(image)
                left[False] -= image.width * image.height
        except InputError as error:
            raise InputError(f"{usual.what} {numbers[is_video]}: {error}") from error
    return opened


def _source_of(url: str, limits: ServeLimits, kind: ImageLimits) -> Source:
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https") and not limits.allow_urls:
        raise InputError(f"this server downloads no {kind.what}s; send them as data: URLs")
    if scheme in ("data", "http", "https"):
        return url
    if scheme == "file":
        return _inside(url, limits.image_folder, kind)
    raise InputError(f"the url must begin with data:, http:// or https://; {kind.what}s in base64 go into a data: URL")


def _inside(url: str, folder: Path | None, kind: ImageLimits) -> Path:
    """Return the file of a file: URL, which must be in the folder, with links followed."""
    if folder is None:
        raise InputError(f"this server opens no file:// addresses; send the {kind.what} as a data: URL")
    try:
        path = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a loop of links
        inside = False
    if not inside:
        raise InputError("the file:// address leaves the folder that this server reads images from")
    if path.is_dir():  # a folder of frames may have links that lead out of it
        raise InputError("the file:// address is that of a folder; name a file in it")
    return path
