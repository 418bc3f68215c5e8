"""Merge a LoRA adapter into the weights of its base model.

In: an adapter's tensors and its adapter_config.json. Out: `LoraMerge.apply(name, weight)`, the merged weight of one tensor,
computed in float32 whatever its dtype. Plain, rank-stabilised and DoRA adapters, on linear layers, convolutions and
embeddings, with modules saved whole and new rows of embeddings; the peft package is not needed. Adapters are trained in
train/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.checkpoints.hf_layout import comparable_name
from llava.model.checkpoints.inspect import VOCABULARY
from llava.model.checkpoints.weight_files import TensorHeader, open_tensors

# `….q_proj.lora_A.weight`, with the adapter's name in between where the file came straight from a training process.
ADAPTER_NAME = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|"
    r"(?:token_adapter\.)?trainable_tokens_delta)(?P<rest>\..+)?"
)


@dataclass(frozen=True)
class LoraMerge:
    """An adapter that is merged tensor by tensor. All mappings are keyed by `comparable_name` of the base's weights."""

    parts: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    scales: Mapping[str, float] = field(repr=False)
    replaced: Mapping[str, Tensor] = field(repr=False)  # tensors that the adapter replaces (modules_to_save, biases)
    rows: Mapping[str, tuple[list[int], Tensor]] = field(repr=False)  # rows of embeddings that it replaces
    fan_in_fan_out: bool
    source: str
    after: LoraMerge | None = None  # an adapter to merge before this one

    @property
    def targets(self) -> set[str]:
        """The tensors that change, by `comparable_name`."""
        return {*self.parts, *self.replaced, *self.rows, *(self.after.targets if self.after is not None else ())}

    def changes(self, name: str) -> bool:
        return comparable_name(name) in self.targets

    def check_targets(self, stored: Iterable[str], names: Iterable[str]) -> None:
        """Raise an `InputError` if a tensor that the adapter changes is not the base model's, or is another one of its own.

        Args:
            stored: The names of the model's tensors that are read from files; of tied ones, one.
            names: All names of the model's tensors.
        """
        absent = sorted(self.targets - {comparable_name(name) for name in stored})
        if not absent:
            return
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        if absent[0] in map(comparable_name, names):
            raise InputError(
                f"the adapter {self.source} changes tensor {absent[0]!r}{more}, which the base model has in common with its "
                "embeddings (tie_word_embeddings); it cannot be merged into one of them alone"
            )
        raise InputError(
            f"the adapter {self.source} changes tensor {absent[0]!r}{more}, which the base model does not have; it was "
            "trained on another base model"
        )

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """Merge the adapter into one weight of the base; a weight that it does not change is returned as it is."""
        if self.after is not None:
            weight = self.after.apply(name, weight)
        key = comparable_name(name)
        if key in self.replaced:
            weight = self._replacing(name, self.replaced[key], weight)
        if key in self.rows:
            indices, rows = self.rows[key]
            weight = weight.float().index_copy(0, torch.tensor(indices), rows.float())
        if key not in self.parts:
            return weight
        part = {what: tensor.float() for what, tensor in self.parts[key].items()}
        if "lora_B.bias" in part:
            return weight.float() + self._checked(name, part["lora_B.bias"], weight) * self.scales[key]
        is_embedding = "lora_embedding_A" in part
        delta = self._checked(name, _product(part, transposed=is_embedding or self.fan_in_fan_out), weight)
        merged = weight.float() + delta * self.scales[key]
        if "lora_magnitude_vector" in part:
            # DoRA: the direction is that of the merged weight, the norm for each output is learned.
            axis = 1 if is_embedding or self.fan_in_fan_out else 0
            others = [dim for dim in range(merged.dim()) if dim != axis]
            norms = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
            merged = merged * (part["lora_magnitude_vector"].reshape(norms.shape) / norms)
        return merged

    def _replacing(self, name: str, tensor: Tensor, weight: Tensor) -> Tensor:
        """A stored tensor in place of the base's; a vocabulary may have more rows, for tokens that were added."""
        grown = VOCABULARY.search(name) is not None and tensor.shape[0] > weight.shape[0]
        self._checked(name, tensor[: weight.shape[0]] if grown else tensor, weight)
        return tensor

    def _checked(self, name: str, tensor: Tensor, weight: Tensor) -> Tensor:
        if tensor.shape != weight.shape:
            raise InputError(
                f"the adapter {self.source} changes tensor {name!r} by a matrix of shape {list(tensor.shape)}, but the base "
                f"model has {list(weight.shape)} there; it was trained on another base model"
            )
        return tensor


def load_adapter(
    headers: Mapping[str, TensorHeader], config: Mapping[str, Any], *, after: LoraMerge | None = None
) -> LoraMerge:
    """Read an adapter's tensors and compute their scales.

    Args:
        headers: Its tensors by the published names of the base's modules.
        config: Its adapter_config.json, which `inspect` has checked.
        after: An adapter that is merged before it.

    Raises:
        InputError: The adapter is not complete.
    """
    source = str(next(iter(headers.values())).file) if headers else "(empty)"
    parts: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    replaced: dict[str, Tensor] = {}
    rows: dict[str, tuple[list[int], Tensor]] = {}
    for file in sorted({header.file for header in headers.values()}):
        with open_tensors(file) as tensors:
            for name, header in headers.items():
                if header.file != file:
                    continue
                tensor = header.read_from(tensors)
                match = ADAPTER_NAME.fullmatch(name)
                if match is None:
                    replaced[comparable_name(name)] = tensor
                    continue
                what, weight = match["part"], comparable_name(match["module"]) + ".weight"
                if what.endswith("trainable_tokens_delta"):
                    rows[weight] = (_row_indices(match["module"], config, source), tensor)
                    continue
                if what == "lora_B" and str(match["rest"]).endswith(".bias"):  # `lora_bias`: added to the layer's bias
                    what, weight = "lora_B.bias", weight.removesuffix("weight") + "bias"
                parts.setdefault(weight, {})[what] = tensor
                scales[weight] = _scale(_trained_module(header.name), config)
    for name, part in parts.items():
        needed = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}, {"lora_B.bias"})
        if not any(names <= part.keys() for names in needed):
            raise InputError(
                f"the adapter {source} holds only {', '.join(sorted(part))} for {name!r}; it is not complete"
            )
    return LoraMerge(parts, scales, replaced, rows, bool(config.get("fan_in_fan_out")), source, after)


def _product(part: Mapping[str, Tensor], *, transposed: bool) -> Tensor:
    """The change of a weight, before it is scaled, from the adapter's two matrices."""
    if "lora_embedding_A" in part:
        product = part["lora_embedding_B"] @ part["lora_embedding_A"]
    elif part["lora_A"].dim() > 2:  # a convolution to `r` channels and one of single pixels
        return torch.einsum("or,ri...->oi...", part["lora_B"].flatten(1), part["lora_A"])
    else:
        product = part["lora_B"] @ part["lora_A"]
    return product.T if transposed else product


def _trained_module(name: str) -> str:
    """The name of a module in the model that was trained, which the patterns of adapter_config.json match."""
    match = ADAPTER_NAME.fullmatch(name)
    assert match is not None
    return match["module"]


def _row_indices(module: str, config: Mapping[str, Any], source: str) -> list[int]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(indices, list):
        raise InputError(f"the adapter {source} has rows for {module!r}, but no trainable_token_indices say which")
    return indices


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
    merge.check_targets(own, own)
    with torch.no_grad():
        for name in merge.targets:
            own[name].copy_(merge.apply(name, own[name]))
