"""The engine: requests in, results out. Importing this package needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava.utils import lazy_exports

if TYPE_CHECKING:
    from llava.engine.base import BaseEngine
    from llava.engine.config import EngineConfig
    from llava.engine.engine import Engine
    from llava.engine.hf_engine import HFEngine
    from llava.engine.request import Request, Result, SamplingParams
    from llava.engine.selection import open_engine

__all__ = ["BaseEngine", "Engine", "EngineConfig", "HFEngine", "Request", "Result", "SamplingParams", "open_engine"]

# The public names, by the module that defines them.
EXPORTS = {
    "llava.engine.base": ("BaseEngine",),
    "llava.engine.config": ("EngineConfig",),
    "llava.engine.engine": ("Engine",),
    "llava.engine.hf_engine": ("HFEngine",),
    "llava.engine.request": ("Request", "Result", "SamplingParams"),
    "llava.engine.selection": ("open_engine",),
}

__getattr__, __dir__ = lazy_exports(__name__, EXPORTS)
