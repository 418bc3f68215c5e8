"""What an image may cost, wherever it comes from: bytes, pixels, time and addresses."""

from __future__ import annotations

from dataclasses import dataclass

from llava.errors import InputError


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost. The defaults suit a program for its own user and a public server alike."""

    max_bytes: int = 50 * 2**20  # of the file, on disk, in a URL or downloaded
    max_pixels: int = 89_478_485  # width x height, checked before decoding; Pillow's own threshold for suspicion
    timeout_s: float = 20.0  # for a whole download: name lookup, redirects and the last byte included
    max_redirects: int = 5
    allow_private_hosts: bool = False  # download from this machine and its own network too

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "timeout_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"the image limit {name} is {getattr(self, name)!r}; it must be above 0.")
        if self.max_redirects < 0:
            raise InputError(f"the image limit max_redirects is {self.max_redirects!r}; it must be 0 or more.")


DEFAULT_LIMITS = ImageLimits()


def too_large(name: str, size: int | None, limits: ImageLimits) -> InputError:
    """The refusal of a file, wherever it came from, for its size."""
    found = f"has {size:,} bytes" if size else "goes on"
    return InputError(f"{name} {found}, and at most {limits.max_bytes:,} bytes are allowed.")
