"""LLaVA: models that look at images and answer, in one package.

The names below are imported from where they live when they are first used, so that `import llava` costs nothing and
needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "2.0.0"

if TYPE_CHECKING:
    from llava.conversation import Conversation, SeparatorStyle, conv_templates
    from llava.engine.engine import Engine, EngineConfig
    from llava.engine.hf_engine import Sampling, stream_answer
    from llava.engine.request import Request, SamplingParams, ScoreRequest
    from llava.errors import InputError
    from llava.images.io import ImageLimits, load_image
    from llava.model.builder import LoadedModel, load, load_pretrained_model
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.processor import Processor
    from llava.session import Session

# Public name -> the module that holds it.
_HOME = {
    "Conversation": "llava.conversation",
    "SeparatorStyle": "llava.conversation",
    "conv_templates": "llava.conversation",
    "Engine": "llava.engine.engine",
    "EngineConfig": "llava.engine.engine",
    "Request": "llava.engine.request",
    "SamplingParams": "llava.engine.request",
    "ScoreRequest": "llava.engine.request",
    "InputError": "llava.errors",
    "Sampling": "llava.engine.hf_engine",
    "stream_answer": "llava.engine.hf_engine",
    "ImageLimits": "llava.images.io",
    "trace": "llava.diagnose.tracer.hooks",
    "load_image": "llava.images.io",
    "LoadedModel": "llava.model.builder",
    "load": "llava.model.builder",
    "load_pretrained_model": "llava.model.builder",
    "LlavaLlamaForCausalLM": "llava.model.language_model.llava_llama",
    "Processor": "llava.processor",
    "Session": "llava.session",
}
__all__ = [
    "Conversation",
    "Engine",
    "EngineConfig",
    "ImageLimits",
    "InputError",
    "LlavaLlamaForCausalLM",
    "LoadedModel",
    "Processor",
    "Request",
    "Sampling",
    "SamplingParams",
    "ScoreRequest",
    "SeparatorStyle",
    "Session",
    "__version__",
    "conv_templates",
    "load",
    "load_image",
    "load_pretrained_model",
    "stream_answer",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
