"""Merge a LoRA adapter into the weights of its base model.

In: an adapter's tensors and its adapter_config.json. Out: `LoraMerge.apply(name, weight)`, the merged weight of one tensor,
computed in float32 whatever its dtype. Plain, rank-stabilised and DoRA adapters, on linear layers and embeddings; the peft
package is not needed. Adapters are trained in train/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.checkpoints.weight_files import TensorHeader, open_tensors

# `….q_proj.lora_A.weight`, with the adapter's name in between where the file came straight from a training process.
ADAPTER_NAME = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\..+)?"
)


@dataclass(frozen=True)
class LoraMerge:
    """An adapter that is merged tensor by tensor. `parts` and `scales` are keyed by the names of the base's weights."""

    parts: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    scales: Mapping[str, float] = field(repr=False)
    replaced: Mapping[str, Tensor] = field(repr=False)  # tensors that the adapter replaces (modules_to_save, biases)
    fan_in_fan_out: bool
    source: str

    @property
    def targets(self) -> set[str]:
        return {*self.parts, *self.replaced}

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """Merge the adapter into one weight of the base; a weight that it does not change is returned as it is."""
        if name in self.replaced:
            weight = self._checked(name, self.replaced[name], weight)
        if name not in self.parts:
            return weight
        part = {key: tensor.float() for key, tensor in self.parts[name].items()}
        is_embedding = "lora_embedding_A" in part
        kind = "lora_embedding" if is_embedding else "lora"
        a, b = part[f"{kind}_A"], part[f"{kind}_B"]
        delta = self._checked(name, (b @ a).T if is_embedding or self.fan_in_fan_out else b @ a, weight)
        merged = weight.float() + delta * self.scales[name]
        if "lora_magnitude_vector" in part:
            # DoRA: the direction is that of the merged weight, the norm of each output row is learned.
            axis = 0 if self.fan_in_fan_out else 1
            merged = merged * (part["lora_magnitude_vector"].flatten() / merged.norm(dim=axis)).unsqueeze(axis)
        return merged

    def _checked(self, name: str, tensor: Tensor, weight: Tensor) -> Tensor:
        if tensor.shape != weight.shape:
            raise InputError(
                f"the adapter {self.source} changes tensor {name!r} by a matrix of shape {list(tensor.shape)}, but the base "
                f"model has {list(weight.shape)} there; it was trained on another base model"
            )
        return tensor


def load_adapter(headers: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> LoraMerge:
    """Read an adapter's tensors, given by the names of the base's modules, and compute their scales.

    `config` is its adapter_config.json; an adapter that is no LoRA, or not complete, is an `InputError`.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"the adapter is of type {kind!r}; only LORA adapters can be merged")
    source = str(next(iter(headers.values())).file) if headers else "(empty)"
    parts: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for file in sorted({header.file for header in headers.values()}):
        with open_tensors(file) as tensors:
            for name, header in headers.items():
                if header.file != file:
                    continue
                match = ADAPTER_NAME.fullmatch(name)
                if match is None:
                    replaced[name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")] = (
                        tensors.get_tensor(header.name)
                    )
                else:
                    parts.setdefault(match["module"] + ".weight", {})[match["part"]] = tensors.get_tensor(header.name)
    for name, part in parts.items():
        if not ({"lora_A", "lora_B"} <= part.keys() or {"lora_embedding_A", "lora_embedding_B"} <= part.keys()):
            raise InputError(
                f"the adapter {source} holds only {', '.join(sorted(part))} for {name!r}; it is not complete"
            )
    return LoraMerge(
        parts=parts,
        scales={name: _scale(name.removesuffix(".weight"), config) for name in parts},
        replaced=replaced,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        source=source,
    )


def _scale(module: str, config: Mapping[str, Any]) -> float:
    rank = _by_pattern(module, config.get("rank_pattern"), config["r"])
    alpha = _by_pattern(module, config.get("alpha_pattern"), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(module: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """Look up a rank or alpha, whose keys are patterns for the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def merge_into(model: torch.nn.Module, merge: LoraMerge) -> None:
    """Merge an adapter into a loaded model, in place."""
    own = dict(model.named_parameters())
    absent = sorted(merge.targets - own.keys())
    if absent:
        raise InputError(f"the adapter {merge.source} changes tensor {absent[0]!r}, which the base model does not have")
    with torch.no_grad():
        for name in merge.targets:
            own[name].copy_(merge.apply(name, own[name]))
