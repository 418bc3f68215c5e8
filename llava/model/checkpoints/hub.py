"""Find a model: a local folder, a pair of GGUF files, or a repository of the Hugging Face hub.

In: a path or a repository id. Out: a local folder. The network is used only for a text of the form `owner/name` that is no
local folder; the hub library's switch for working offline (HF_HUB_OFFLINE) applies, and an error names all places tried.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from llava.assets import embedded_model_path
from llava.errors import InputError
from llava.model.checkpoints.catalog import EMBEDDED, did_you_mean, repository_of
from llava.model.checkpoints.gguf.folder import gguf_checkpoint, holds_gguf_files
from llava.model.checkpoints.hub_download import download_repository

REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubOptions:
    """How a hub repository is looked up; none of it matters for a local folder."""

    revision: str | None = None  # a branch, tag or commit
    cache_dir: str | Path | None = None  # where copies are kept; None: the hub library's own place
    local_files_only: bool = False  # look into that place only
    token: str | bool | None = None  # for private repositories; None: the one that the hub library has stored

    @property
    def for_other_repositories(self) -> HubOptions:
        """Those for what a model needs besides its own repository, of which a revision says nothing."""
        return replace(self, revision=None)


DEFAULT_HUB = HubOptions()


def resolve_checkpoint(path: str | Path, *, what: str = "model", hub: HubOptions = DEFAULT_HUB) -> Path:
    """Find the folder of a model: a local folder, or the local copy of a hub repository, downloaded if need be.

    A GGUF file, or a folder of GGUF files, gives the folder that gguf/folder.py makes for it. A name of catalog.py that is no
    folder stands for its repository, or for the model in the package.

    `what` is how errors call it.
    """
    text = str(path)
    folder = Path(text).expanduser()
    if is_gguf(folder):
        return gguf_checkpoint(folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"the {what} path {text!r} is a file; give the folder that holds its config.json")
    if text == EMBEDDED:
        return embedded_model_path()
    text = repository_of(text) or text
    if not looks_like_repository(text):
        raise InputError(
            f"there is no {what} folder {text!r}{did_you_mean(text) or ';'} give an existing folder, a repository id such as "
            "'owner/name', or a name that llava models lists"
        )
    return fetch_repository(text, what=what, tried=[f"the folder {folder.absolute()}"], hub=hub)


def is_known_name(text: str) -> bool:
    """Whether a text is a name of catalog.py, and no folder."""
    return (text == EMBEDDED or repository_of(text) is not None) and not Path(text).expanduser().exists()


def local_copy(repository: str) -> Path | None:
    """The folder of a repository's last copy in the hub library's cache, whole or not; None without one."""
    snapshots = cache_of(repository) / "snapshots"
    found = [folder for folder in snapshots.iterdir() if folder.is_dir()] if snapshots.is_dir() else []
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def cache_of(repository: str) -> Path:
    """Where the hub library keeps a repository, and nothing else."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF file on this disk, or a folder with nothing but such files."""
    place = Path(path).expanduser()
    return holds_gguf_files(place) or (place.suffix == ".gguf" and place.is_file())


def gguf_pair(path: str | Path | None, mmproj: str | Path) -> Path:
    """The folder of small files for a language model in a GGUF file, with the file of its tower and projector."""
    if path is None or not is_gguf(path):
        raise InputError(
            f"--mmproj belongs to a language model in a .gguf file, and the model is {str(path)!r}; leave it out"
        )
    return gguf_checkpoint(Path(path).expanduser(), Path(mmproj).expanduser())


def resolve_vision_tower(name: str, *, checkpoint_folder: Path | None = None, hub: HubOptions = DEFAULT_HUB) -> str:
    """Find the folder of a vision tower: beside the checkpoint, then in the working directory, then on the hub."""
    here = find_vision_tower(name, checkpoint_folder=checkpoint_folder)
    if here is not None:
        return str(here)
    tried = [f"the folder {place}" for place in _tower_places(name, checkpoint_folder)]
    if not looks_like_repository(name):
        raise InputError(
            f"the vision tower {name!r} was not found; tried {' and '.join(tried)}, and it is no hub repository id"
        )
    return str(fetch_repository(name, what="vision tower", tried=tried, hub=hub))


def find_vision_tower(name: str, *, checkpoint_folder: Path | None = None) -> Path | None:
    """Find the folder of a vision tower without the hub; None if it is not on this disk."""
    places = _tower_places(name, checkpoint_folder)
    return next((place for place in places if (place / "config.json").is_file()), None)


def _tower_places(name: str, checkpoint_folder: Path | None) -> list[Path]:
    given = Path(name).expanduser()
    beside = [] if checkpoint_folder is None or given.is_absolute() else [Path(checkpoint_folder).absolute() / given]
    return [*beside, given.absolute()]


def looks_like_repository(text: str) -> bool:
    """Whether a text has the form `owner/name`, and the owner is no local folder, in which the name would be missing."""
    return REPOSITORY_ID.fullmatch(text) is not None and not Path(text).parent.is_dir()


def fetch_repository(repository: str, *, what: str, tried: list[str], hub: HubOptions = DEFAULT_HUB) -> Path:
    """Return the local copy of a hub repository, downloaded if need be; `tried` are the places that an error names."""
    revision = f" at {hub.revision}" if hub.revision is not None else ""
    tried = [*tried, f"the hub repository {repository}{revision}"]
    return download_repository(repository, what=what, tried=tried, options=dict(vars(hub)))
