"""Small helpers that outside code imports from here by name; this package itself needs little of them.

Messages of the web server, a logger that also writes to a file, and the switch that skips torch's random
initialisation.
"""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from llava.constants import LOGDIR

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."


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
    """A logger that writes to stderr and, with a file name, to that file under LOGDIR, a new one every day (UTC)."""
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
    logger.propagate = False  # or the root logger would say it twice
    return logger
