"""The vision tower over transformers' SiglipVisionModel: CLIPVisionTower without a class feature."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

from torch import nn

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


class SigLipVisionTower(CLIPVisionTower):
    """A SigLIP image encoder; it has no class token, so `select_feature` can only be `patch`.

    LLaVA-NeXT takes the last layer and the head off the tower before training, whatever mm_vision_select_layer says, and
    reads the last hidden state that is left. Its checkpoints store the tower so.
    """

    config_class = "SiglipVisionConfig"
    model_class = "SiglipVisionModel"
    has_class_token = False

    def input_modules(self) -> list[nn.Module]:
        return [self._vision_model().embeddings]

    def config_to_build(self) -> PreTrainedConfig:
        if self.stored is None:
            return self.cfg_only
        config = copy.deepcopy(self.cfg_only)
        if not self.stored["head"]:
            config.vision_use_head = False
        if not self.stored["head"] and self.stored["layers"] == config.num_hidden_layers - 1:
            if not isinstance(self.select_layer, int):
                self.select_layer = tuple(self.hidden_state_indices)  # counted from the first one, with the last layer
                config.num_hidden_layers -= 1
                return config
            self._warn_of_other_layer(self.select_layer)
            config.num_hidden_layers -= 1
            self.select_layer = -1
        return config

    def select(self, layer: int | tuple[int, ...], feature: str) -> None:
        if self.is_loaded and self.num_layers < self.cfg_only.num_hidden_layers and isinstance(layer, int):
            self._warn_of_other_layer(layer)
            self.select_feature = feature
        else:
            super().select(layer, feature)

    def _warn_of_other_layer(self, layer: int) -> None:
        if layer not in (-2, self.cfg_only.num_hidden_layers - 1):
            logger.warning(
                "%s stores its vision tower without the last layer, as LLaVA-NeXT does, which reads the last hidden state "
                "left; mm_vision_select_layer %d is not used",
                self.vision_tower_name, layer,
            )  # fmt: skip
