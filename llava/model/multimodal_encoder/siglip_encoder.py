"""The vision tower over transformers' SiglipVisionModel: CLIPVisionTower without a class feature."""

from __future__ import annotations

from torch import nn

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


class SigLipVisionTower(CLIPVisionTower):
    """A SigLIP image encoder; it has no class token, so `select_feature` can only be `patch`."""

    config_class = "SiglipVisionConfig"
    model_class = "SiglipVisionModel"
    has_class_token = False

    def input_modules(self) -> list[nn.Module]:
        return [self._vision_model().embeddings]
