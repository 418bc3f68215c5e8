"""Record model, questions, settings and versions of a run, so that runs can be compared and repeated.

In: the model's folder, the questions. Out: parts of manifest.json. Its `settings` hold what decides the answers: a run is
continued only where they are the same. The rest says where and with which versions it was computed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava.eval.types import JsonRow, Question

PACKAGES = ("torch", "transformers", "numpy", "pillow", "sentencepiece", "tokenizers")
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "tokenizer.model")
PER_TASK = ("prompts", "questions")  # settings that each task has its own of
WHOLE_BYTES = 64 * 2**20  # larger files are hashed by their ends and their size
END_BYTES = 4 * 2**20


def model_hash(folder: Path) -> str:
    """Hash the files in a model folder: small ones whole, of large ones the size and both ends."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in WEIGHTS for file in folder.rglob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}\0{size}\0".encode())
        with file.open("rb") as data:
            if size <= WHOLE_BYTES:
                digest.update(data.read())
            else:
                digest.update(data.read(END_BYTES))
                data.seek(size - END_BYTES)
                digest.update(data.read())
    return digest.hexdigest()


def prompts_hash(questions: Sequence[Question]) -> str:
    """Hash the questions as the model gets them, with the names of their images."""
    digest = hashlib.sha256()
    for question in questions:
        images = [hashlib.sha256(i).hexdigest() if isinstance(i, bytes) else i.name for i in question.images]
        row = [str(question.id), question.round, question.prompt, images]
        digest.update(json.dumps(row, ensure_ascii=False).encode())
    return digest.hexdigest()


def environment() -> JsonRow:
    """Return versions, machine, and the revision of this package's repository, where it is in one."""
    import llava

    versions = {"python": platform.python_version(), "llava": llava.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "git_revision": git_revision(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_revision() -> str | None:
    """Return the package's commit, with "+changes" where files were changed since; None outside of a repository."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """List what differs between the settings of two runs, with both values; of tasks, those that both have."""
    before, after = ({key: value for key, value in run.items() if key not in PER_TASK} for run in (first, second))
    found = _differences(before, after)
    for task, prompts in first["prompts"].items():
        if second["prompts"].get(task, prompts) == prompts:
            continue
        counts = [run.get("questions", {}).get(task, "?") for run in (first, second)]
        if counts[0] == counts[1]:
            found.append(f"{task}: its questions or prompts differ")
        else:
            found.append(f"{task}: {counts[0]} and {counts[1]} questions")
    return found


def _differences(first: Mapping[str, object], second: Mapping[str, object], prefix: str = "") -> list[str]:
    found = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a!r} and {b!r}")
    return found
