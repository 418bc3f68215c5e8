"""Where a model named on a command line is: a folder here, or a repository of the Hugging Face hub.

In: a path or a repository id. Out: a local folder. The network is asked only when the text is no local folder and has the
form `owner/name`; the library's own switch for working offline (HF_HUB_OFFLINE) is honoured, and every failure is one
sentence that names all places tried.
"""

from __future__ import annotations

import re
from pathlib import Path

from llava.errors import InputError

REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Everything a checkpoint may need except the weights in old formats, which are asked for only when nothing else is there.
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def resolve_checkpoint(path: str | Path, *, what: str = "model") -> Path:
    """The folder of a model: itself when it is one, else the local copy of the hub repository that it names."""
    text = str(path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"the {what} path {text!r} is a file; give the folder that holds its config.json")
    if not looks_like_repository(text):
        raise InputError(
            f"there is no {what} folder {text!r}; give an existing folder or a repository id such as 'owner/name'"
        )
    return fetch_repository(text, what=what, tried=[f"the folder {folder.absolute()}"])


def resolve_vision_tower(name: str, *, checkpoint_folder: Path | None = None, download: bool = True) -> str:
    """The folder of a vision tower named in a config: beside the checkpoint, then here, then on the hub.

    Without `download`, of the hub only what is on this disk already.
    """
    places = _tower_places(name, checkpoint_folder)
    here = find_vision_tower(name, checkpoint_folder=checkpoint_folder)
    if here is not None:
        return str(here)
    tried = [f"the folder {place}" for place in places]
    if not looks_like_repository(name):
        raise InputError(
            f"the vision tower {name!r} was not found; tried {' and '.join(tried)}, and it is no hub repository id"
        )
    return str(fetch_repository(name, what="vision tower", tried=tried, download=download))


def find_vision_tower(name: str, *, checkpoint_folder: Path | None = None) -> Path | None:
    """The same without the hub."""
    places = _tower_places(name, checkpoint_folder)
    return next((place for place in places if (place / "config.json").is_file()), None)


def _tower_places(name: str, checkpoint_folder: Path | None) -> list[Path]:
    given = Path(name).expanduser()
    beside = [] if checkpoint_folder is None or given.is_absolute() else [Path(checkpoint_folder).absolute() / given]
    return [*beside, given.absolute()]


def looks_like_repository(text: str) -> bool:
    """`owner/name`, unless the owner is a folder here: then a missing folder is meant, not a repository."""
    return REPOSITORY_ID.fullmatch(text) is not None and not Path(text).parent.is_dir()


def fetch_repository(repository: str, *, what: str, tried: list[str], download: bool = True) -> Path:
    """The local copy of a hub repository, downloaded when it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    tried = [*tried, f"the hub repository {repository}"]
    try:
        for pattern in WEIGHT_PATTERNS:
            wanted = [*SMALL_FILES, pattern]
            folder = Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=not download))
            if any(folder.glob(pattern)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the {what} {repository!r} was not found; tried {' and '.join(tried)} ({reason})") from error
    return folder
