"""Choose the engine for a model and a wish.

In: a loaded model, and whether beams are asked for. Out: an engine. Callers use its interface (base.py)
and do not need to know which it is.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llava.engine.config import EngineConfig
from llava.engine.decoder import unsupported_reason
from llava.engine.engine import Engine
from llava.engine.hf_engine import HFEngine

if TYPE_CHECKING:
    from llava.engine.base import BaseEngine
    from llava.model.builder import LoadedModel

logger = logging.getLogger(__name__)


def open_engine(loaded: LoadedModel, config: EngineConfig | None = None, *, num_beams: int = 1) -> BaseEngine:
    """The engine where it can run the model and one beam is searched, else `model.generate`, with the reason logged.

    Args:
        loaded: What `llava.load` returned.
        config: How the engine is set up.
        num_beams: The `SamplingParams.num_beams` that will be asked for.
    """
    reason = unsupported_reason(loaded.model) if num_beams == 1 else f"num_beams is {num_beams}"
    if reason is None:
        return Engine.from_loaded(loaded, config)
    logger.info("answering by model.generate: %s", reason)
    return HFEngine.from_loaded(loaded, config)
