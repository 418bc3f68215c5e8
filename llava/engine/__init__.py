"""The engine: requests in, results out.

The names below are imported when they are first used, so that importing this package needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.engine.base import BaseEngine
    from llava.engine.config import EngineConfig
    from llava.engine.engine import Engine
    from llava.engine.hf_engine import HFEngine
    from llava.engine.request import Request, Result, SamplingParams
    from llava.engine.selection import open_engine

_MODULES = {
    "BaseEngine": "base",
    "Engine": "engine",
    "EngineConfig": "config",
    "HFEngine": "hf_engine",
    "Request": "request",
    "Result": "request",
    "SamplingParams": "request",
    "open_engine": "selection",
}
__all__ = ["BaseEngine", "Engine", "EngineConfig", "HFEngine", "Request", "Result", "SamplingParams", "open_engine"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
