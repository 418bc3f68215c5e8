"""Small helpers, most of them for outside code that imports them from here.

Module attributes that are imported at first use, messages of the web server, a logger that also writes to a file, and
the switch that skips torch's random initialisation.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from llava.constants import LOGDIR

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."


def lazy_exports(
    module: str, names_by_home: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` for a module that exports names of other modules without importing them.

    `module` is its `__name__`; each module in `names_by_home` is imported when one of its names is first used.
    """
    homes = {name: home for home, names in names_by_home.items() for name in names}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[module]), *homes})

    return get, names


def disable_torch_init() -> AbstractContextManager[None]:
    """Stop `nn.Linear` and `nn.LayerNorm` from drawing random weights, since loaded ones replace them.

    A plain call holds for the rest of the process. As `with disable_torch_init():` it ends with the block.
    """
    import torch

    layers: tuple[Any, ...] = (torch.nn.Linear, torch.nn.LayerNorm)
    originals = [layer.reset_parameters for layer in layers]
    for layer in layers:
        layer.reset_parameters = lambda self: None

    @contextmanager
    def until_block_ends() -> Iterator[None]:
        try:
            yield
        finally:
            for layer, original in zip(layers, originals, strict=True):
                layer.reset_parameters = original

    return until_block_ends()


def build_logger(logger_name: str, logger_filename: str = "") -> logging.Logger:
    """Make a logger that writes to stderr and, with a file name, to that file under LOGDIR, a new one every day (UTC)."""
    import logging.handlers  # which loads sockets

    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    if logger.handlers:  # built before
        return logger
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if logger_filename:
        folder = Path(LOGDIR)
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(
            logging.handlers.TimedRotatingFileHandler(folder / logger_filename, when="D", utc=True, encoding="utf-8")
        )
    line = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    for handler in handlers:
        handler.setFormatter(line)
        logger.addHandler(handler)
    logger.propagate = False  # the root logger would write every line again
    return logger
