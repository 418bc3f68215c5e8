"""Projectors: the layers that map the vision tower's features to the language model's embeddings.

In: a config with `mm_projector_type`, `mm_hidden_size` (V, the tower's width) and `hidden_size` (D, the text width).
Out: a module from (..., V) to (..., D). The parameter names (`0.weight`, `2.weight`, …) are those of published weights.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava.errors import InputError


class IdentityMap(nn.Module):
    """Return features unchanged, for a tower that is as wide as the language model."""

    def forward(self, features: Tensor, *args: object, **kwargs: object) -> Tensor:
        return features

    @property
    def config(self) -> dict[str, str]:
        return {"mm_projector_type": "identity"}


class SimpleResBlock(nn.Module):
    """Two layers with a GELU between them, added to their normalised input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels)
        self.proj = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, features: Tensor) -> Tensor:
        normalised = self.pre_norm(features)
        return normalised + self.proj(normalised)


def mlp(vision_dim: int, text_dim: int, depth: int) -> nn.Sequential:
    """Build `depth` linear layers with a GELU between each two; the first changes the width."""
    layers: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
    return nn.Sequential(*layers)


def normalised_mlp(vision_dim: int, text_dim: int, depth: int) -> nn.Sequential:
    """Build an `mlp` after a LayerNorm of its input (ViP-LLaVA, Cai et al., 2024, arXiv:2312.00784)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(norm=nn.LayerNorm(vision_dim))
    layers.update(mlp(vision_dim, text_dim, depth).named_children())
    return nn.Sequential(layers)


def identity(vision_dim: int, text_dim: int) -> nn.Module:
    """Build an `IdentityMap`; unequal widths are an `InputError`."""
    if vision_dim != text_dim:
        raise InputError(
            f"mm_projector_type 'identity' needs a tower as wide as the language model, "
            f"but mm_hidden_size is {vision_dim} and hidden_size is {text_dim}; use 'linear' or 'mlp2x_gelu'"
        )
    return IdentityMap()


PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {"linear": nn.Linear, "identity": identity}

# A family of names beside the table: mlp1x_gelu, mlp2x_gelu, mlp3x_gelu, …, each also as norm_mlp2x_gelu.
# LLaVA-NeXT's mlp2x_res1x_gelu has residual blocks behind.
MLP_NAME = re.compile(r"(norm_)?mlp([1-9]\d?)x(?:_res([1-9]\d?)x)?_gelu")
MLP_NAMES = ("mlp<N>x_gelu", "norm_mlp<N>x_gelu", "mlp<N>x_res<M>x_gelu")


def check_projector_name(name: str) -> None:
    """Raise an `InputError` if there is no projector of a name."""
    if name not in PROJECTORS and MLP_NAME.fullmatch(name) is None:
        raise InputError(f"unknown mm_projector_type {name!r}; known: {', '.join([*PROJECTORS, *MLP_NAMES])}")


def build_vision_projector(config: PreTrainedConfig, delay_load: bool = False, **kwargs: object) -> nn.Module:
    """Build the projector that a config names; `delay_load` and other keywords of the original have no effect."""
    name = getattr(config, "mm_projector_type", None) or "linear"
    vision_dim, text_dim = getattr(config, "mm_hidden_size", None), config.hidden_size
    if vision_dim is None:
        raise InputError("the config has no mm_hidden_size (width of the vision tower), so no projector can be built")
    check_projector_name(name)
    match = MLP_NAME.fullmatch(name)
    if match is None:
        return PROJECTORS[name](vision_dim, text_dim)
    projector = (normalised_mlp if match[1] else mlp)(vision_dim, text_dim, depth=int(match[2]))
    projector.extend(SimpleResBlock(text_dim) for _ in range(int(match[3] or 0)))
    return projector
