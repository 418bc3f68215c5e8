"""The error type for a user's input, errors of the system that are a user's too, and the import of optional packages.

The message of an `InputError` is one sentence that names the value, the place and the remedy. Command-line programs print
it and exit with status 2; libraries catch it as a `ValueError`. Errors of the operating system about a path or a full disk
become such a sentence in programs (`describe_system_error`). Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sysconfig
from pathlib import Path
from types import ModuleType

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_FULL_WORDS = ("no space left", "file too large", "quota exceeded", "enforce fail at inline_container")

# What the system says of a path, and the remedy; errors with other numbers are ours.
PATH_REMEDIES = {
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOENT: "name one that exists",
    errno.ENOTDIR: "a part of the path is a file; name a folder",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another one, or remove this one first",
    errno.ENOTEMPTY: "name another one, or empty it first",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.ELOOP: "its links lead in a circle; name another one",
    errno.EBUSY: "wait until nothing uses it, or name another one",
    errno.EIO: "check the disk, or name another place",
    errno.ENXIO: "name an ordinary file",
}


class InputError(ValueError):
    """A user's input cannot work; the message is one sentence that says what to do instead."""


class MissingPackageError(InputError, ImportError):
    """An optional package is absent; the message names the extra that installs it."""


def shortened(text: str, limit: int = 200) -> str:
    """Return a text as a message may repeat it: what is longer than `limit` loses its middle."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, says that the disk or a limit on files is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        # errors of safetensors and torch have no errno
        if any(words in str(error).lower() for words in DISK_FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_system_error(error: BaseException) -> str | None:
    """Return the sentence for an error of the operating system that a user's path or disk has caused; None for any other.

    A file of this package or of the Python installation is none of the user's: its absence is a bug.
    """
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    path = os.fsdecode(named) if isinstance(named, (str, bytes, os.PathLike)) else None
    if is_disk_full(error):
        place = f"cannot write {path!r}: its disk" if path else "cannot write: the disk"
        return f"{place} is full or limited; make room, or name a target on another disk"
    if not isinstance(error, OSError) or path is None or error.errno not in PATH_REMEDIES:
        return None
    installed = (os.path.dirname(os.path.abspath(__file__)), *sysconfig.get_paths().values())
    if error.errno == errno.ENOENT and any(os.path.abspath(path).startswith(folder + os.sep) for folder in installed):
        return None
    return f"{path!r} cannot be used: {str(error.strerror).lower()}; {PATH_REMEDIES[error.errno]}"


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module, or raise `MissingPackageError` with the name of the extra that installs it.

    Errors of a package that is installed but broken are raised as they are.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise MissingPackageError(
            f"this needs the package {package!r}; install it with: {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """The command that installs an extra, by how this package is installed: clone, folder, file, repository or index."""
    root = Path(__file__).absolute().parents[1]
    if (root / "pyproject.toml").is_file():  # a clone, editable or run in place
        return f"pip install -e '.[{extra}]' (in {root})"
    from importlib import metadata

    try:
        found = metadata.distribution("llava")
    except metadata.PackageNotFoundError:  # a copy of the package's folder alone
        return f"pip install 'llava[{extra}]'"
    pip = "uv pip" if (found.read_text("INSTALLER") or "").strip() == "uv" else "pip"
    source = _source_of(found.read_text("direct_url.json"), extra)
    if source is None:  # an index, or a place that is gone: what the extra consists of is enough
        source = " ".join(f"'{need}'" for need in _requirements(found.requires or [], extra)) or f"'llava[{extra}]'"
    return f"{pip} install {source}"


def _source_of(direct_url: str | None, extra: str) -> str | None:
    """What pip is given to install an extra from where the package came from; None where that is an index, or is gone."""
    import json
    from urllib.parse import unquote, urlsplit

    facts = json.loads(direct_url or "{}")
    url = facts.get("url", "")
    if "vcs_info" in facts:
        vcs = facts["vcs_info"]
        return f"'llava[{extra}] @ {vcs.get('vcs', 'git')}+{url}@{vcs.get('commit_id', 'HEAD')}'"
    if url.startswith("file:"):
        place = unquote(urlsplit(url).path)
        return f"'{place}[{extra}]'" if os.path.exists(place) else None
    return f"'llava[{extra}] @ {url}'" if url else None


def _requirements(requires: list[str], extra: str) -> list[str]:
    """The requirements of an extra, of those that a package's metadata lists; an extra may consist of others."""
    found = []
    for requirement in requires:
        what, _, condition = (part.strip() for part in requirement.partition(";"))
        if f'extra == "{extra}"' not in condition.replace("'", '"'):
            continue
        inner = what.removeprefix("llava[").removesuffix("]") if what.startswith("llava[") else ""
        for other in inner.split(",") if inner else []:
            found += _requirements(requires, other.strip())
        found += [] if inner else [what]
    return found
