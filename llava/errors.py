"""The error type for a user's input, and the import of optional packages.

The message of an `InputError` is one sentence that names the value, the place and the remedy. Command-line programs print
it and exit with status 2; libraries catch it as a `ValueError`. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """A user's input cannot work; the message is one sentence that says what to do instead."""


class MissingPackageError(InputError, ImportError):
    """An optional package is absent; the message names the extra that installs it."""


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
            f"this needs the package {package!r}; install it with: pip install 'llava[{extra}]'"
        ) from error
