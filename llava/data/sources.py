"""Find the data files that a name stands for: a file, a pattern, a folder, or a data set of the Hugging Face hub.

In: `a.json`, `{a,b}.json`, `shards/*.tar`, a folder of shards, one of `datasets.save_to_disk` or of Megatron-Energon,
`owner/name` or `owner/name/folder`. Out: `DataSource`s, one for each file, sorted. What files hold is read in index.py.
"""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava.data.file_types import is_data_file, known_suffixes
from llava.errors import InputError

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"(?:hf://datasets/|hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w.=-]+)*)")
MAX_FILES = 100_000
_TRAIN = re.compile(r"(?i)(?:^|[^a-z])train(?:ing)?(?:[^a-z]|$)")
_OTHER = re.compile(r"(?i)(?:^|[^a-z])(?:test|val|valid|validation|dev|eval)(?:[^a-z]|$)")
# Descriptions that lie in folders of data sets.
_NO_SAMPLES = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "README.json",
)


@dataclass(frozen=True)
class DataSource:
    """One data file, and the folder of its images where that is known by the form of the data set."""

    path: Path
    image_folder: str | None = None


def find_sources(name: str | Path) -> list[DataSource]:
    """List the files of a name.

    Raises:
        InputError: there are none, or it cannot be told which.
    """
    text = str(name)
    sources = [source for path in expand_braces(text) for source in _of_path(path)]
    if len(sources) > MAX_FILES:
        raise InputError(f"{text!r} stands for {len(sources):,} data files; at most {MAX_FILES:,} are read")
    return sources


def expand_braces(text: str) -> Iterator[str]:
    """Expand `{a,b}` and `{000..012}`, as shells do; a file of that very name goes first."""
    match = None if Path(text).exists() else re.search(r"\{([^{}]*)\}", text)
    if match is None:
        yield text
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) > MAX_FILES:
            raise InputError(f"{text!r} stands for more than {MAX_FILES:,} data files")
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        words = [f"{number:0{width}}" for number in range(first, last + 1)]
    else:
        words = [word.strip() for word in match[1].split(",")]
    for word in words:
        yield from expand_braces(text[: match.start()] + word + text[match.end() :])


def _of_path(text: str) -> list[DataSource]:
    path = Path(text).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        return [DataSource(path)]
    if any(character in text for character in "*?["):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise InputError(f"no file matches the pattern {text!r}; see what is there with: ls {str(path.parent)!r}")
        return [source for name in found for source in _of_path(str(name))]
    match = HUB_NAME.fullmatch(text)
    if match is not None and not is_data_file(path) and (text.startswith("hf://") or not path.parent.is_dir()):
        return _of_folder(_downloaded(match[1], match[2].strip("/")))
    return [DataSource(path)]  # which says that it is not there


def _of_folder(folder: Path) -> list[DataSource]:
    if (folder / "dataset_dict.json").is_file():
        return _of_folder(_train_split(folder))
    if (folder / "state.json").is_file():
        return _saved_to_disk(folder)
    if (folder / ".nv-meta").is_dir():
        return _energon(folder)
    files = [path for path in sorted(folder.rglob("*")) if is_data_file(path) and path.is_file()]
    files = [
        path
        for path in files
        if path.name not in _NO_SAMPLES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(
            f"cannot read the training data {str(folder)!r}: the folder holds no data files ({', '.join(known_suffixes())})"
        )
    names = {path: str(path.relative_to(folder)) for path in files}
    trained = [path for path in files if _TRAIN.search(names[path])]
    others = [path for path in files if _OTHER.search(names[path]) and path not in trained]
    if trained and others:
        logger.warning(
            "%s: %d files that are not for training are left out, %s first", folder, len(others), names[others[0]]
        )
        files = [path for path in files if path not in set(others)]
    return [DataSource(path, str(path.parent) if path.stem == "metadata" else None) for path in files]


# Folders of datasets.save_to_disk


def _train_split(folder: Path) -> Path:
    splits = _json(folder / "dataset_dict.json").get("splits")
    names = [str(name) for name in splits] if isinstance(splits, list) else []
    if "train" not in names and len(names) != 1:
        raise InputError(
            f"the data set {str(folder)!r} has the splits {', '.join(names)}, no 'train'; name the folder of one of them"
        )
    return folder / ("train" if "train" in names else names[0])


def _saved_to_disk(folder: Path) -> list[DataSource]:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise InputError(
            f"the data set {str(folder)!r} was saved with an order beside its rows; save it again with flatten_indices()"
        )
    files = state.get("_data_files")
    names = (
        [str(entry.get("filename")) for entry in files if isinstance(entry, Mapping)] if isinstance(files, list) else []
    )
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"the state.json of the data set {str(folder)!r} does not list its files; save it again")
    return [DataSource(folder / name) for name in names]


def _json(file: Path) -> Mapping[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {str(file)!r}: {error}") from error
    return content if isinstance(content, Mapping) else {}


# Folders of Megatron-Energon


def _energon(folder: Path) -> list[DataSource]:
    """The shards that the description gives to training; without a description all of them."""
    import yaml

    file = folder / ".nv-meta" / "split.yaml"
    shards = sorted(folder.rglob("*.tar"))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {str(file)!r}: {error}") from error
    parts = content.get("split_parts") if isinstance(content, Mapping) else None
    if isinstance(parts, Mapping):
        patterns = parts.get("train")
        if not isinstance(patterns, list):
            raise InputError(f"{str(file)!r} gives no shards to 'train' (its parts: {', '.join(map(str, parts))})")
        names = [name for pattern in patterns for name in expand_braces(str(pattern))]
        left_out = content.get("exclude") or []
        if any("/" in str(name) and not str(name).endswith(".tar") for name in left_out):
            raise InputError(f"{str(file)!r} excludes single samples, which is not read; make shards without them")
        shards = [folder / name for name in names if name not in left_out]
        outside = next((shard for shard in shards if not shard.resolve().is_relative_to(folder.resolve())), None)
        if outside is not None:
            raise InputError(f"{str(file)!r} names the shard {str(outside)!r}, which lies outside its folder")
    if not shards:
        raise InputError(f"the data set {str(folder)!r} holds no shards (.tar)")
    return [DataSource(shard) for shard in shards]


# Data sets of the hub


def _downloaded(repository: str, folder: str) -> Path:
    """The local copy of a data set, downloaded if need be; HF_HUB_OFFLINE and the library's other switches apply."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    suffixes = [f"*{suffix}" for suffix in known_suffixes()]
    patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in suffixes]
    logger.info("downloading the data set %s from the hub, unless a copy is there", repository)
    try:
        copy = Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"there is no training data {repository!r} on this disk, and the hub does not give a data set of that name: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    found = copy / folder
    if not found.is_dir():
        raise InputError(f"the data set {repository!r} of the hub has no data files in {folder!r}")
    return found
