"""Download a repository of the Hugging Face hub, so that a program can show how far it is, and say why it cannot be had.

In: the name of a repository. Out: the folder of its local copy. What is already there is not fetched again, and a download that
was interrupted is taken up where it ended. hub.py decides what is a repository.
"""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llava.errors import InputError, describe_system_error, is_disk_full
from llava.utils import Wait, is_watched, waiting

if TYPE_CHECKING:
    from tqdm import tqdm

# All files of a checkpoint except weights; those in the old format are downloaded only where there is no other.
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
# The packages by which versions of the hub library speak HTTP; their errors have no common class.
HTTP_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


PIECE = 2**18  # bytes


class DownloadStopped(Exception):
    """Raised in the threads of a download, which would go on otherwise until their files are whole."""


def download_repository(repository: str, *, what: str, tried: list[str], options: dict[str, Any]) -> Path:
    """Return the local copy of a repository, downloaded if need be.

    Args:
        repository: `owner/name`.
        what: How errors call it.
        tried: The places that an error names.
        options: Arguments of `huggingface_hub.snapshot_download`.

    Raises:
        InputError: It cannot be had; the sentence says why and what to do.
    """
    from huggingface_hub import snapshot_download

    stop = threading.Event()
    try:
        with waiting(f"downloading {repository}", in_bytes=True) as wait, _stopped_by_interrupt(stop), _in_pieces():
            if is_watched():
                options = {**options, "tqdm_class": _byte_counter(wait, stop)}
            for pattern in WEIGHT_PATTERNS:
                folder = Path(snapshot_download(repository, allow_patterns=[*SMALL_FILES, pattern], **options))
                if any(folder.glob(pattern)):
                    break
    except Exception as error:
        sentence = _sentence(error, repository, what, tried, options.get("revision"))
        if sentence is None:
            raise
        raise InputError(sentence) from error
    return folder


@contextmanager
def _stopped_by_interrupt(stop: threading.Event) -> Iterator[None]:
    """Within the block, let Ctrl-C end the threads of a download too; it waits for them otherwise."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.set()
        if callable(before):
            before(number, frame)

    if before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _in_pieces() -> Iterator[None]:
    """Within the block, let the hub library hand on bytes sooner; its 10 MiB at once take a slow line minutes."""
    from huggingface_hub import constants

    before = constants.DOWNLOAD_CHUNK_SIZE
    constants.DOWNLOAD_CHUNK_SIZE = PIECE
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = before


def _byte_counter(wait: Wait, stop: threading.Event) -> type[tqdm]:
    """A progress bar that shows nothing and counts the bytes of a download, which the hub library adds up in one bar."""
    from tqdm import tqdm

    class ByteCounter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False, "miniters": 2**60})
            self._take()

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise DownloadStopped
            self.n += n or 0
            self._take()

        def refresh(self, *args: Any, **kwargs: Any) -> None:
            self._take()

        def display(self, *args: Any, **kwargs: Any) -> None:
            pass

        def _take(self) -> None:
            if getattr(self, "unit", None) == "B":
                wait.done = max(wait.done, int(self.n))
                wait.total = max(wait.total or 0, int(self.total or 0)) or None

    return ByteCounter


def _sentence(error: Exception, repository: str, what: str, tried: list[str], revision: str | None) -> str | None:
    """Say why a repository cannot be had, and what to do; None for an error that is a bug."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set the variable HF_TOKEN"
    responses = (getattr(one, "response", None) for one in (error, error.__cause__))
    status = next((response.status_code for response in responses if response is not None), None)
    not_found = f"the {what} {repository!r} was not found; tried {' and '.join(tried)}"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return f"the {what} {repository!r} is given to those who accept its terms: accept them on {page}, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{not_found}, which has no revision {revision!r}; look at {constants.ENDPOINT}/{repository}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{not_found}; check the name, and if it is private {log_in}"
    if status in (401, 403):
        return f"{not_found}, which refuses this user (status {status}); if it is private or gated, {log_in}"
    if is_disk_full(error):
        return (
            f"the disk became full while {repository!r} was downloaded; make room, or set the variable HF_HOME to a folder on "
            f"another disk (now {constants.HF_HOME}); what is there is kept"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{not_found} ({_first_line(error)}); unset the variable HF_HUB_OFFLINE, or give a folder"
    is_http = type(error).__module__.split(".")[0] in HTTP_PACKAGES
    if isinstance(error, (errors.HfHubHTTPError, errors.LocalEntryNotFoundError)) or is_http:
        return (
            f"{not_found}, which {constants.ENDPOINT} did not give ({_first_line(error)}); check the connection, set "
            "HF_ENDPOINT to a mirror, or give a folder; what was downloaded is kept"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{not_found} ({_first_line(error)})"
    if isinstance(error, OSError):
        return describe_system_error(error) or f"{not_found} ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].removeprefix("Got: ").rstrip(".") if lines else type(error).__name__
