"""Vision tower over transformers' SiglipVisionModel: as CLIPVisionTower, without a class feature."""

from __future__ import annotations

from typing import Any

from torch import nn

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


class SigLipVisionTower(CLIPVisionTower):
    """A SigLIP image encoder; every hidden state is a patch, so `select_feature` can only be `patch`."""

    has_class_token = False

    def config_class(self) -> Any:
        from transformers import SiglipVisionConfig

        return SiglipVisionConfig

    def model_class(self) -> Any:
        from transformers import SiglipVisionModel

        return SiglipVisionModel

    def input_modules(self) -> list[nn.Module]:
        return [self._vision_model().embeddings]
