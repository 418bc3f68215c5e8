"""The one error type for what a user gave, and the one way to ask for an optional package.

`InputError` carries a single sentence that names the value, the place and the remedy. Command-line programs print that
sentence and exit with status 2; libraries catch it as the `ValueError` that it is. Anything else that escapes is our bug
and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """Something a user gave cannot work; the message is one complete sentence that says what to do instead."""


class MissingPackageError(InputError, ImportError):
    """An optional package is absent; the message names the extra that installs it."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module, or raise `MissingPackageError` naming the extra that brings it.

    A package that is present but broken keeps its own error: only its absence is translated.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise MissingPackageError(
            f"this needs the package {package!r}; install it with: pip install 'llava[{extra}]'"
        ) from error
