"""vLLM's LLaVA classes for checkpoints in the original layout. Imported by vLLM alone (see plugin.py).

In: vLLM's configuration of a server. Out: its own models, which get the tensors of a conversion made on the fly, and the
processor of the checkpoint's companion folder with Pillow's pixels, as in training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoImageProcessor, AutoVideoProcessor, ProcessorMixin
from transformers.models.llava import LlavaProcessor
from transformers.models.llava_next import LlavaNextProcessor
from transformers.models.llava_onevision import LlavaOnevisionProcessor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers.hf import CachedHfTokenizer

from llava.convert.vllm.plugin import companion, converted_tensors, is_original
from llava.files import read_json

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.processing import InputProcessingContext


class CompanionTokenizer(CachedHfTokenizer):
    """vLLM's own tokenizer, read from the companion folder where the model is in the original layout."""

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, *args: Any, **kwargs: Any) -> CachedHfTokenizer:
        place = companion(path_or_repo_id) if is_original(path_or_repo_id) else path_or_repo_id
        return super().from_pretrained(place, *args, **kwargs)


class CompanionProcessor:
    """Mixin for vLLM's processing info classes: the processor of the companion folder."""

    processor_class: type[ProcessorMixin] = LlavaProcessor
    ctx: InputProcessingContext

    def get_hf_processor(self, **_: object) -> ProcessorMixin:
        if not hasattr(self, "_processor"):
            folder = companion(self.ctx.model_config.model)
            values = read_json(folder / "processor_config.json")
            values.pop("processor_class")
            if "video_token" in values:
                values["video_processor"] = AutoVideoProcessor.from_pretrained(folder)
            self._processor = self.processor_class(
                image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
                tokenizer=self.ctx.tokenizer,
                chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
                **values,
            )
        return self._processor


class OriginalLlavaInfo(CompanionProcessor, LlavaProcessingInfo):
    pass


class OriginalLlavaNextInfo(CompanionProcessor, LlavaNextProcessingInfo):
    processor_class = LlavaNextProcessor


class OriginalLlavaOnevisionInfo(CompanionProcessor, LlavaOnevisionProcessingInfo):
    processor_class = LlavaOnevisionProcessor


class FromOriginal:
    """Mixin for vLLM's models: load the converted tensors in place of the original ones that vLLM reads."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._checkpoint = vllm_config.model_config.model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        next(iter(weights), None)  # vLLM's timer for its log starts with the first tensor that is read
        return super().load_weights(converted_tensors(self._checkpoint))  # type: ignore[misc]


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=OriginalLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class OriginalLlava(FromOriginal, LlavaForConditionalGeneration):
    """LLaVA-1.5 and older ones with its projector."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=OriginalLlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class OriginalLlavaNext(FromOriginal, LlavaNextForConditionalGeneration):
    """LLaVA-1.6."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionMultiModalProcessor,
    info=OriginalLlavaOnevisionInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class OriginalLlavaOnevision(FromOriginal, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision, with images and videos."""
