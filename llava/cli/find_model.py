"""Which model a command line means, found out before anything slow is imported.

In: the path that was given, or None. Out: the path to load. A folder that cannot be loaded is refused here, in a moment,
by its files; loading itself is model/builder.py's.
"""

from __future__ import annotations

from pathlib import Path

from llava.model.checkpoints.hub import looks_like_repository
from llava.model.checkpoints.inspect import inspect


def find_model(path: str | None) -> str:
    """The given folder or hub repository, or the folder of the model in the package."""
    if path is None:
        from llava.assets import embedded_model_path

        return str(embedded_model_path())
    if Path(path).expanduser().exists() or not looks_like_repository(path):
        inspect(path)
    return path
