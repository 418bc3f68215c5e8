"""Protocols for what the package works on: language model, LLaVA model, vision tower, vision arguments.

A function that takes such an object annotates it with the Protocol, so that our own classes, those of transformers and
models wrapped by PEFT all pass. Only what the package calls is listed. Nothing here imports torch. The tokenizer's
Protocol is in text/tokenization.py, the image processor's in images/image_processor.py.

    N tiles, P patches per tile, V width of the tower, D text width, B rows, T tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import GenerationConfig, PreTrainedConfig
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

    from llava.images.image_processor import ClipImageProcessor
    from llava.images.layout import ImagePolicy


class TorchModule(Protocol):
    """What the package calls of any `torch.nn.Module`."""

    training: bool

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def register_forward_hook(self, hook: object, **options: object) -> torch.utils.hooks.RemovableHandle: ...

    def register_forward_pre_hook(self, hook: object, **options: object) -> torch.utils.hooks.RemovableHandle: ...

    def state_dict(self, **options: object) -> dict[str, Tensor]: ...

    def to(self, *args: object, **kwargs: object) -> nn.Module: ...

    def eval(self) -> nn.Module: ...

    def train(self, mode: bool = True) -> nn.Module: ...

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


class LanguageModel(TorchModule, Protocol):
    """A causal language model of transformers, with or without LLaVA's part."""

    config: PreTrainedConfig
    generation_config: GenerationConfig
    name_or_path: str
    base_model_prefix: str  # the attribute that holds the inner model, `model` for LLaMA

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *args: object, **kwargs: object) -> CausalLMOutputWithPast: ...

    def generate(self, inputs: Tensor | None = None, **kwargs: object) -> Tensor: ...

    def get_input_embeddings(self) -> nn.Embedding: ...

    def get_output_embeddings(self) -> nn.Linear: ...

    def resize_token_embeddings(self, new_num_tokens: int, **options: object) -> nn.Embedding: ...

    def set_attn_implementation(self, attn_implementation: str) -> None: ...

    def enable_input_require_grads(self) -> None: ...

    def tie_weights(self) -> None: ...

    def save_pretrained(self, save_directory: str | Path, **options: object) -> None: ...


class VisionArguments(Protocol):
    """The training arguments by which vision modules and tokens are added to a language model."""

    vision_tower: str | None
    mm_vision_select_layer: int
    mm_vision_select_feature: str
    mm_patch_merge_type: str
    mm_projector_type: str | None
    mm_use_im_start_end: bool
    mm_use_im_patch_token: bool
    tune_mm_mlp_adapter: bool
    pretrain_mm_mlp_adapter: str | None


class VisionTower(TorchModule, Protocol):
    """An image encoder: pixels (N, 3, H, W) to the features (N, P, V) of one of its hidden states."""

    vision_tower_name: str  # the folder that its config was read from
    image_processor: ClipImageProcessor
    is_loaded: bool
    select_layer: int  # as the config has it, usually negative
    select_feature: str
    has_class_token: bool  # whether hidden states begin with one for the whole tile
    resamples_pixels: bool
    passes_once: bool

    def __call__(self, images: Tensor) -> Tensor: ...

    def load_model(self) -> None: ...

    def feature_select(self, image_forward_outs: object) -> Tensor: ...

    def input_modules(self) -> list[nn.Module]: ...

    def layers_used(self) -> list[nn.Module]: ...

    def modules_used(self) -> list[nn.Module]: ...

    @property
    def hidden_state_index(self) -> int: ...

    @property
    def trainable(self) -> bool: ...

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def tile_size(self) -> int: ...

    @property
    def num_patches(self) -> int: ...

    @property
    def num_patches_per_side(self) -> int: ...

    @property
    def has_class_feature(self) -> bool: ...


class InnerModel(TorchModule, Protocol):
    """The inner model of a LLaVA: embeddings and layers of the language model, and the vision modules."""

    config: PreTrainedConfig
    vision_tower: VisionTower | list[VisionTower]  # a list keeps it out of the module's own parameters
    mm_projector: nn.Module
    image_newline: nn.Parameter  # only where mm_patch_merge_type is spatial_unpad

    def __call__(self, **kwargs: object) -> BaseModelOutputWithPast: ...

    def get_vision_tower(self) -> VisionTower | None: ...

    def add_vision_modules(self) -> None: ...

    def post_init(self) -> None: ...


class LlavaModel(LanguageModel, Protocol):
    """A language model composed with a vision tower and a projector (`LlavaMetaForCausalLM`)."""

    def get_model(self) -> InnerModel: ...

    def get_vision_tower(self) -> VisionTower | None: ...

    def image_policy(self) -> ImagePolicy: ...

    def encode_images(self, images: Tensor) -> Tensor: ...

    def image_features(
        self, images: Tensor | Sequence[Tensor], image_sizes: Sequence[Sequence[int]] | None
    ) -> list[Tensor]: ...

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: object,
        labels: Tensor | None,
        images: Tensor | Sequence[Tensor] | None,
        image_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, object, Tensor | None, Tensor | None]: ...

    def check_packable(self) -> None: ...
