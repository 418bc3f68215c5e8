"""Vision towers over transformers' CLIPVisionModel, with one scale (CLIPVisionTower) or several (CLIPVisionTowerS2).

In: pixels (N, 3, H, W), already normalised. Out: features (N, P, V) of one hidden state, or of several.
The image processor is in images/image_processor.py; builder.py decides which tower a checkpoint has.

    N tiles, P patches per tile, V width of the tower, S scales
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from llava.errors import InputError
from llava.files import read_json
from llava.images.image_processor import ClipImageProcessor
from llava.model.config import LlavaSettings, check_types, described_by
from llava.model.transformers_internals import eager_attention, forget_implementations, set_attention

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedConfig
    from transformers.modeling_outputs import BaseModelOutputWithPooling


class VisionModel(nn.Module):
    """A transformers vision model under the parameter names of published LLaVA weights.

    Those have a level `vision_model.` that transformers 5 dropped from its classes.
    """

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    @property
    def config(self) -> PreTrainedConfig:
        return self.vision_model.config

    @property
    def dtype(self) -> torch.dtype:
        return self._some_weight().dtype

    @property
    def device(self) -> torch.device:
        return self._some_weight().device

    def _some_weight(self) -> Tensor:
        """A parameter, or a buffer, which frozen weights are under ZeRO-3 (train/performance.py)."""
        return next(value for value in chain(self.parameters(), self.buffers()) if value.is_floating_point())

    def set_attn_implementation(self, attn_implementation: str) -> None:
        self.vision_model.set_attn_implementation(attn_implementation)

    def forward(self, *args: Any, output_attentions: bool = False, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Run the whole model; with `output_attentions`, by eager attention, which alone gives the weights."""
        with eager_attention(self.config) if output_attentions else nullcontext():
            return self.vision_model(*args, output_attentions=output_attentions, **kwargs)


class CLIPVisionTower(nn.Module):
    """A CLIP image encoder, of which one hidden state is used, or the features of several concatenated.

    Args:
        vision_tower: A folder with config.json and preprocessor_config.json.
        args: A model's config or training arguments, with `mm_vision_select_layer` and `mm_vision_select_feature`.
        delay_load: Read the configs only. `load_model()` reads the weights later, or `build_model()` makes the module
            without reading weights, for a checkpoint that holds them.
        described: The tower's config, where `vision_tower` is a checkpoint whose config.json holds it.
        attn_implementation: As transformers names it; None: transformers' default.
    """

    # transformers' classes by name, which imports them when a tower is built.
    config_class = "CLIPVisionConfig"
    model_class = "CLIPVisionModel"
    module_class = VisionModel
    has_class_token = True  # whether hidden states begin with a class token
    resamples_pixels = False  # whether pixels are resampled before the first layer casts them to its dtype
    passes_once = True  # whether a batch of images runs through the layers once, or once for each scale

    def __init__(
        self,
        vision_tower: str,
        args: object,
        delay_load: bool = False,
        described: dict[str, Any] | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        settings = LlavaSettings.from_hf(args).vision
        self.vision_tower_name = vision_tower
        self.select_layer = settings.select_layer
        self.select_feature = settings.select_feature
        self.stored: Mapping[str, int] | None = getattr(args, "stored_tower", None)
        file = Path(vision_tower) / "config.json"
        with described_by(file):
            self.cfg_only = self.read_config(vision_tower, described)
        check_types(self.cfg_only.to_dict(), file)
        forget_implementations(self.cfg_only)
        if attn_implementation is not None:
            set_attention(self.cfg_only, attn_implementation)
        for key in ("image_size", "patch_size"):
            if not getattr(self.cfg_only, key):
                raise InputError(f"{file} has no {key}, which says how a vision tower cuts its images")
        if self.cfg_only.patch_size > self.cfg_only.image_size:
            raise InputError(
                f"{file} has patch_size {self.cfg_only.patch_size} and image_size {self.cfg_only.image_size}; a patch is "
                "larger than an image"
            )
        self.image_processor = self.read_image_processor(vision_tower)
        self.is_loaded = False
        self.vision_tower: VisionModel | None = None
        if not delay_load:
            self.load_model()

    # Overridden by other families of towers.

    def read_config(self, name: str, described: dict[str, Any] | None) -> PreTrainedConfig:
        config_class: type[PreTrainedConfig] = getattr(transformers, self.config_class)
        if not described:
            check_types(read_json(Path(name) / "config.json"), Path(name) / "config.json")
        return config_class.from_dict(described) if described else config_class.from_pretrained(name)

    def read_image_processor(self, name: str) -> ClipImageProcessor:
        return ClipImageProcessor.from_pretrained(name, vision_config=self.cfg_only)

    def input_modules(self) -> list[nn.Module]:
        """The modules that compute the first hidden state from pixels, in order."""
        vision_model = self._vision_model()
        return [vision_model.embeddings, vision_model.pre_layrnorm]

    def config_to_build(self) -> PreTrainedConfig:
        """The config of the module, which differs from the tower's own where a checkpoint stores a part of the tower."""
        return self.cfg_only

    # Common to all.

    def load_model(self, device_map: str | torch.device | None = None) -> None:
        """Load the tower's own weights, once; `device_map` may name the device to move it to."""
        if self.is_loaded:
            return
        from llava.model.checkpoints.loading import check_tower_structure, load_tower_weights

        self.stored = None  # the tower's own folder holds all of it
        check_tower_structure(self._new_module, Path(self.vision_tower_name))
        self.build_model()
        load_tower_weights(self, Path(self.vision_tower_name))
        if device_map is not None and device_map != "auto":
            self.to(device_map)

    def build_model(self) -> None:
        """Build the module on the default device with uninitialised weights, to be loaded afterwards."""
        if self.is_loaded:
            return
        from transformers.initialization import no_init_weights

        with no_init_weights():
            self.vision_tower = self._new_module()
        self.vision_tower.requires_grad_(False)
        self.vision_tower.eval()
        self.is_loaded = True

    def _new_module(self) -> VisionModel:
        return self.module_class(getattr(transformers, self.model_class)(self.config_to_build()))

    def _vision_model(self) -> nn.Module:
        assert self.vision_tower is not None, "the tower's weights were not loaded"
        return self.vision_tower.vision_model

    def select(self, layer: int | tuple[int, ...], feature: str) -> None:
        """Read another hidden state, or other features of it; `layer` counts the layers of the whole tower."""
        self.select_layer, self.select_feature = layer, feature

    @property
    def hidden_state_indices(self) -> list[int]:
        """Indices of the hidden states that the projector reads, in its order; 0 is the input of the first layer."""
        num_states = self.num_layers + 1
        layers = [self.select_layer] if isinstance(self.select_layer, int) else list(self.select_layer)
        if not all(-num_states <= layer < num_states for layer in layers):
            raise InputError(
                f"mm_vision_select_layer is {self.select_layer}, but the tower has {num_states} hidden states "
                f"(-{num_states} to {num_states - 1})"
            )
        return [layer % num_states for layer in layers]

    @property
    def num_layers_used(self) -> int:
        """How many layers are run: those before the last hidden state that is used."""
        return max(self.hidden_state_indices)

    def layers_used(self) -> list[nn.Module]:
        """The layers that compute the hidden states that are used."""
        return list(islice(self._vision_model().encoder.layers, self.num_layers_used))

    def modules_used(self) -> list[nn.Module]:
        """The modules that compute features from pixels, in order, without the layers behind the hidden state used."""
        return [*self.input_modules(), *self.layers_used()]

    def feature_select(self, image_forward_outs: BaseModelOutputWithPooling) -> Tensor:
        """Select the features from the output of the whole model, called with `output_hidden_states=True`."""
        return self._joined(image_forward_outs.hidden_states)

    def _joined(self, hidden_states: Mapping[int, Tensor] | Sequence[Tensor]) -> Tensor:
        """Concatenate the features of the hidden states that are used: (N, P, V)."""
        chosen = [self._without_class_feature(hidden_states[index]) for index in self.hidden_state_indices]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def _without_class_feature(self, features: Tensor) -> Tensor:
        """Drop the class feature of (N, 1 + P, V), if the family has one and `select_feature` is "patch"."""
        if self.select_feature == "patch":
            return features[:, 1:] if self.has_class_token else features
        if self.select_feature == "cls_patch" and self.has_class_token:
            return features
        known = "patch, cls_patch" if self.has_class_token else "patch"
        raise InputError(f"unknown mm_vision_select_feature {self.select_feature!r} for this tower; known: {known}")

    def forward_feature(self, images: Tensor) -> Tensor:
        """Compute the features of one batch of tiles, (N, 3, H, W) -> (N, P, V).

        Layers behind the last hidden state that is used are not run, and hidden states that are not used are freed, unlike
        in transformers' own forward pass with `output_hidden_states=True`.
        """
        states = images.to(device=self.device, dtype=self.dtype)
        for module in self.input_modules():
            states = module(states)
        wanted = set(self.hidden_state_indices)
        kept = {0: states} if 0 in wanted else {}
        for index, layer in enumerate(self.layers_used(), start=1):
            states = layer(states, None)  # no attention mask
            if index in wanted:
                kept[index] = states
        return self._joined(kept)

    def forward(
        self, images: Tensor | list[Tensor], output_attentions: bool = False
    ) -> Tensor | list[Tensor] | tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the features of a batch; a list of single images gives a list, as in the original.

        With `output_attentions`, of a batch, also the attention weights of every layer of the tower, those behind the
        hidden state that is used too: a tuple of (N, heads, positions, positions), after the features.
        """
        # A frozen tower keeps no activations, whatever the caller's gradient mode is, unless pixels are to get gradients.
        needs_grad = self.trainable or any(image.requires_grad for image in images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad):
            if output_attentions:
                return self._features_and_attentions(images)
            if isinstance(images, list):
                return [self.forward_feature(image.unsqueeze(0)) for image in images]
            return self.forward_feature(images)

    def _features_and_attentions(self, images: Tensor | list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not isinstance(images, Tensor) or not self.passes_once:
            raise InputError("a tower gives its attention weights for one batch of images at one scale")
        assert self.vision_tower is not None, "the tower's weights were not loaded"
        pixels = images.to(device=self.device, dtype=self.dtype)
        outputs = self.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        attentions = getattr(outputs, "attentions", None)
        if attentions is None:
            raise InputError(
                f"a tower of type {self.config.model_type!r} has no attention, and so no attention weights"
            )
        return self.feature_select(outputs), attentions

    @property
    def trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def config(self) -> PreTrainedConfig:
        return self.vision_tower.config if self.vision_tower is not None else self.cfg_only

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype if self.vision_tower is not None else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device if self.vision_tower is not None else torch.device("cpu")

    @property
    def hidden_size(self) -> int:
        """The width of the features."""
        num_states = 1 if isinstance(self.select_layer, int) else len(self.select_layer)
        return self.config.hidden_size * num_states

    @property
    def tile_size(self) -> int:
        """Pixels per side of a tile."""
        return self.config.image_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def image_size(self) -> int:
        """The name of `tile_size` in outside code."""
        return self.tile_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    @property
    def has_class_feature(self) -> bool:
        """Whether the features begin with the class feature."""
        return self.select_feature == "cls_patch"

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


class CLIPVisionTowerS2(CLIPVisionTower):
    """The same encoder at several scales, whose features are concatenated: (N, P, S * V).

    Scaling on Scales (Shi et al., 2024, arXiv:2403.13043): the image at each larger scale is cut into pieces of the
    smallest scale's size; the feature maps of the pieces are put together and averaged to the smallest scale's grid.
    """

    resamples_pixels = True
    passes_once = False

    def __init__(self, vision_tower: str, args: object, *rest: Any, **kwargs: Any) -> None:
        self.s2_scales = LlavaSettings.from_hf(args).vision.s2_scales
        super().__init__(vision_tower, args, *rest, **kwargs)
        if self.s2_scales[0] != self.cfg_only.image_size:
            raise InputError(
                f"s2_scales begins with {self.s2_scales[0]} pixels, but the tower {vision_tower!r} takes "
                f"{self.cfg_only.image_size}"
            )

    def read_image_processor(self, name: str) -> ClipImageProcessor:
        return super().read_image_processor(name).with_side(self.s2_scales[-1])

    def forward_feature(self, images: Tensor) -> Tensor:
        if self.select_feature != "patch":
            raise InputError("a multi-scale tower has no class feature; use mm_vision_select_feature 'patch'")
        return torch.cat([self._features_at(images, scale) for scale in self.s2_scales], dim=-1)

    def _features_at(self, images: Tensor, scale: int) -> Tensor:
        """Compute features (N, P, V) on the smallest scale's grid from (N, 3, H, W) at one scale."""
        piece, pieces = self.s2_scales[0], scale // self.s2_scales[0]
        side = self.num_patches_per_side
        # Resampled in float32: bicubic weights in half precision change features noticeably.
        pixels = F.interpolate(images.float(), size=(scale, scale), mode="bicubic").to(images.dtype)
        num_images = pixels.shape[0]
        pixels = pixels.reshape(num_images, 3, pieces, piece, pieces, piece).permute(2, 4, 0, 1, 3, 5)
        features = super().forward_feature(pixels.reshape(-1, 3, piece, piece))  # (pieces² N, P, V)
        grid = features.reshape(pieces, pieces, num_images, side, side, -1).permute(2, 5, 0, 3, 1, 4)
        grid = grid.reshape(num_images, -1, pieces * side, pieces * side)  # (N, V, rows, cols)
        grid = F.interpolate(grid.float(), size=(side, side), mode="area").to(features.dtype)
        return grid.flatten(2).transpose(1, 2)

    @property
    def hidden_size(self) -> int:
        return super().hidden_size * len(self.s2_scales)

    @property
    def tile_size(self) -> int:
        return self.s2_scales[-1]
