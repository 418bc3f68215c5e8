"""LLaVA: large multimodal models for images and text.

The names below are imported from their modules at first use, so that `import llava` is fast and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava.utils import lazy_exports

__version__ = "2.0.0"

if TYPE_CHECKING:
    from llava.conversation import Conversation, SeparatorStyle, conv_templates
    from llava.engine.config import EngineConfig
    from llava.engine.engine import Engine
    from llava.engine.request import EmbedRequest, Request, SamplingParams, ScoreRequest
    from llava.errors import InputError
    from llava.images.download import ImageLimits
    from llava.images.io import load_image
    from llava.model.builder import LoadedModel, load, load_pretrained_model
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.processor import Processor
    from llava.session import Session

# The public names, by the module that defines them.
EXPORTS = {
    "llava.conversation": ("Conversation", "SeparatorStyle", "conv_templates"),
    "llava.engine.config": ("EngineConfig",),
    "llava.engine.engine": ("Engine",),
    "llava.engine.request": ("EmbedRequest", "Request", "SamplingParams", "ScoreRequest"),
    "llava.errors": ("InputError",),
    "llava.images.io": ("load_image",),
    "llava.images.download": ("ImageLimits",),
    "llava.diagnose.tracer.hooks": ("trace",),
    "llava.model.builder": ("LoadedModel", "load", "load_pretrained_model"),
    "llava.model.language_model.llava_llama": ("LlavaLlamaForCausalLM",),
    "llava.processor": ("Processor",),
    "llava.session": ("Session",),
}
__all__ = [
    "Conversation",
    "EmbedRequest",
    "Engine",
    "EngineConfig",
    "ImageLimits",
    "InputError",
    "LlavaLlamaForCausalLM",
    "LoadedModel",
    "Processor",
    "Request",
    "SamplingParams",
    "ScoreRequest",
    "SeparatorStyle",
    "Session",
    "__version__",
    "conv_templates",
    "load",
    "load_image",
    "load_pretrained_model",
    "trace",
]

__getattr__, __dir__ = lazy_exports(__name__, EXPORTS)
