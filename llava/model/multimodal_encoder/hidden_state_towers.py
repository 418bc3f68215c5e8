"""Vision towers over transformers' other vision models: DINOv2, DINOv3, AIMv2, MLCD, ConvNeXt, SigLIP 2 with patches.

In: pixels (N, 3, H, W), already normalised. Out: features (N, P, V) of one hidden state.
CLIP and SigLIP have classes of their own, which run no layer behind the hidden state that is used. A model here is run as
transformers runs it, whole, and one of its `hidden_states` is taken, so that a family is a class of a few lines.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, VisionModel

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling


class HiddenStateTower(CLIPVisionTower):
    """A vision model that returns `hidden_states`, (N, prefix + P, V) each.

    A subclass names transformers' classes, and what differs from the defaults below.
    """

    has_class_token = False
    input_names: tuple[str, ...] = ("embeddings",)  # modules before the layers
    layers_name = "encoder.layers"

    def read_image_processor(self, name: str) -> ClipImageProcessor:
        """Read the tower's processor, for images of the size that config.json gives: these models interpolate positions."""
        processor = super().read_image_processor(name)
        side = self.cfg_only.image_size
        same = processor.crop_size == {"height": side, "width": side}
        return processor if same else processor.with_side(side)

    def input_modules(self) -> list[nn.Module]:
        return [attrgetter(name)(self._vision_model()) for name in self.input_names]

    def layers_used(self) -> list[nn.Module]:
        return list(attrgetter(self.layers_name)(self._vision_model()))[: self.num_layers_used]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: a class token, and registers (Darcet et al., 2024, arXiv:2309.16588)."""
        return int(self.has_class_token) + (getattr(self.config, "num_register_tokens", 0) or 0)

    def _without_class_feature(self, features: Tensor) -> Tensor:
        patches = features[:, self.num_prefix_tokens :]
        if self.select_feature == "patch":
            return patches
        if self.select_feature == "cls_patch" and self.has_class_token:
            return torch.cat([features[:, :1], patches], dim=1)
        known = "patch, cls_patch" if self.has_class_token else "patch"
        raise InputError(f"unknown mm_vision_select_feature {self.select_feature!r} for this tower; known: {known}")

    def forward_feature(self, images: Tensor) -> Tensor:
        assert self.vision_tower is not None, "the tower's weights were not loaded"
        outputs = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
        return self.feature_select(outputs)


class Dinov2VisionTower(HiddenStateTower):
    """DINOv2 (Oquab et al., 2023, arXiv:2304.07193)."""

    config_class = "Dinov2Config"
    model_class = "Dinov2Model"
    has_class_token = True
    layers_name = "encoder.layer"


class Dinov2WithRegistersVisionTower(Dinov2VisionTower):
    """DINOv2 with register tokens, which are not features."""

    config_class = "Dinov2WithRegistersConfig"
    model_class = "Dinov2WithRegistersModel"


class Dinov3VisionTower(HiddenStateTower):
    """DINOv3 (Siméoni et al., 2025, arXiv:2508.10104)."""

    config_class = "DINOv3ViTConfig"
    model_class = "DINOv3ViTModel"
    has_class_token = True
    layers_name = "model.layer"


class Aimv2VisionTower(HiddenStateTower):
    """AIMv2 (Fini et al., 2024, arXiv:2411.14402)."""

    config_class = "Aimv2VisionConfig"
    model_class = "Aimv2VisionModel"


class MlcdVisionTower(HiddenStateTower):
    """MLCD (An et al., 2024, arXiv:2407.17331), with which LLaVA-OneVision-1.5's encoder begins."""

    config_class = "MLCDVisionConfig"
    model_class = "MLCDVisionModel"
    has_class_token = True
    input_names = ("embeddings", "pre_layrnorm")


class ConvNextVisionTower(HiddenStateTower):
    """ConvNeXt (Liu et al., 2022, arXiv:2201.03545): hidden states are maps (N, V, H, W), each stage half as fine."""

    config_class = "ConvNextConfig"
    model_class = "ConvNextModel"
    layers_name = "encoder.stages"

    def feature_select(self, image_forward_outs: BaseModelOutputWithPooling) -> Tensor:
        maps = image_forward_outs.hidden_states
        return self._joined({index: maps[index].flatten(2).transpose(1, 2) for index in self.hidden_state_indices})

    @property
    def _stage(self) -> int:
        """The stage whose map is used, from 0; hidden state 0 is the input of the first."""
        return max(self.num_layers_used - 1, 0)

    @property
    def num_layers(self) -> int:
        return len(self.config.hidden_sizes)

    @property
    def hidden_size(self) -> int:
        if not isinstance(self.select_layer, int):
            raise InputError(
                f"mm_vision_select_layer is {list(self.select_layer)}, but the hidden states of a ConvNeXt have different "
                "sizes and cannot be joined; name one"
            )
        return self.config.hidden_sizes[self._stage]

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // (self.config.patch_size * 2**self._stage)


class _PatchedVisionModel(VisionModel):
    """SigLIP 2's vision model takes patches (N, P, 3 * patch * patch), of any grid; here that of a square tile."""

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        (pixels,) = args
        patch = self.config.patch_size
        num_tiles, channels, height, width = pixels.shape
        rows, columns = height // patch, width // patch
        patches = pixels.reshape(num_tiles, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        return super().forward(
            patches.reshape(num_tiles, rows * columns, -1),
            pixel_attention_mask=pixels.new_ones(num_tiles, rows * columns, dtype=torch.int64),
            spatial_shapes=torch.tensor([[rows, columns]] * num_tiles, device=pixels.device),
            **kwargs,
        )


class Siglip2VisionTower(HiddenStateTower):
    """SigLIP 2 with patches of any grid (Tschannen et al., 2025, arXiv:2502.14786). Those of one size are of type siglip."""

    config_class = "Siglip2VisionConfig"
    model_class = "Siglip2VisionModel"
    module_class = _PatchedVisionModel

    def read_config(self, name: str, described: dict[str, Any] | None) -> Any:
        config = super().read_config(name, described)
        config.image_size = round(config.num_patches**0.5) * config.patch_size  # the tile that it was trained with
        return config
