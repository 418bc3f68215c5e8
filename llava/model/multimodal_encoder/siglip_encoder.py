"""The vision tower over transformers' SiglipVisionModel: CLIPVisionTower without a class feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class SigLipVisionTower(CLIPVisionTower):
    """A SigLIP image encoder; it has no class token, so `select_feature` can only be `patch`."""

    has_class_token = False

    def config_class(self) -> type[PreTrainedConfig]:
        from transformers import SiglipVisionConfig

        return SiglipVisionConfig

    def model_class(self) -> type[PreTrainedModel]:
        from transformers import SiglipVisionModel

        return SiglipVisionModel

    def input_modules(self) -> list[nn.Module]:
        return [self._vision_model().embeddings]
