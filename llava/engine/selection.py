"""Choose the engine for a model and a wish.

In: a loaded model, and whether beams are asked for. Out: an engine. Callers use its interface (base.py)
and do not need to know which it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llava.engine.config import EngineConfig
from llava.engine.decoder import unsupported_reason
from llava.engine.engine import Engine
from llava.engine.hf_engine import HFEngine
from llava.errors import InputError

if TYPE_CHECKING:
    from llava.engine.base import BaseEngine
    from llava.model.builder import LoadedModel
    from llava.model.protocols import LanguageModel

logger = logging.getLogger(__name__)

# Settings of a generation_config that change an answer and that the engine does not have; 0, 1.0 and None change nothing.
GENERATE_ONLY = (
    "bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
    "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale",
    "min_length", "min_new_tokens", "no_repeat_ngram_size", "sequence_bias", "suppress_tokens", "typical_p",
)  # fmt: skip


def open_engine(
    loaded: LoadedModel,
    config: EngineConfig | None = None,
    *,
    num_beams: int = 1,
    adapters: Mapping[str, str] | None = None,
) -> BaseEngine:
    """Open the engine where it can run the model as its generation_config says, and one beam is searched.

    Else open `model.generate` behind the same interface, and log the reason.

    Args:
        loaded: What `llava.load` returned.
        config: How the engine is set up.
        num_beams: The `SamplingParams.num_beams` that will be asked for.
        adapters: LoRA adapters to load, name and folder, which requests may name.
    """
    reason = f"num_beams is {num_beams}" if num_beams > 1 else _unsupported_setting(loaded.model)
    reason = reason or unsupported_reason(loaded.model)
    if reason is None:
        engine = Engine.from_loaded(loaded, config)
        try:
            for name, path in (adapters or {}).items():
                engine.adapters.load(name, path)
        except BaseException:
            engine.close()
            raise
        return engine
    if adapters:
        raise InputError(f"adapters need the engine, and model.generate answers for this model: {reason}")
    logger.info("answering by model.generate: %s", reason)
    return HFEngine.from_loaded(loaded, config)


def _unsupported_setting(model: LanguageModel) -> str | None:
    """The first setting of a model's generation_config that only `generate` obeys."""
    for name in GENERATE_ONLY:
        value = getattr(model.generation_config, name, None)
        if value and value != 1.0:
            return f"the model's generation_config has {name} {value!r}"
    return None
