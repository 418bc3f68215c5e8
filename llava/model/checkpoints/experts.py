"""Join the experts of a layer, which checkpoints store one by one and transformers keeps in one tensor.

In: the headers of stored tensors by published name. Out: headers under the names of today's modules, which read the experts
and stack them. Mixtral and Qwen2-MoE were published with a tensor for each expert and product.

    E experts, I their width, D the layer's width
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.model.checkpoints.packed import PackedHeader, Parts
from llava.model.checkpoints.weight_files import TensorHeader

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = re.compile(r"(.*\.)(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
PRODUCTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names -> those of the others


def join_experts(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The headers with those of experts joined: `…mlp.experts.gate_up_proj` (E, 2 I, D) and `…mlp.experts.down_proj` (E, D, I).

    Headers of models without experts are returned as they are.
    """
    joined: dict[str, TensorHeader] = {}
    experts: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            joined[name.replace(".block_sparse_moe.gate.", ".mlp.gate.")] = header
        else:
            experts[f"{match[1]}mlp.experts."][f"{int(match[2])}.{PRODUCTS.get(match[3], match[3])}"] = header
    for prefix, parts in experts.items():
        count = 1 + max(int(key.split(".")[0]) for key in parts)
        for target, products in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            names = [f"{expert}.{product}" for expert in range(count) for product in products]
            missing = next((name for name in names if name not in parts), None)
            if missing is not None:
                raise InputError(
                    f"tensor {f'{prefix}{missing}.weight'!r} is in no weight file, though other experts of its layer are; the "
                    "checkpoint is not complete"
                )
            own = {name: parts[name] for name in names}
            joined[prefix + target] = _joined(own, count, prefix + target)
    return joined


def _joined(parts: Mapping[str, TensorHeader], count: int, name: str) -> PackedHeader:
    first = next(iter(parts.values()))
    other = next((header for header in parts.values() if header.shape != first.shape), None)
    if other is not None or len(first.shape) != 2:
        wrong = other or first
        raise InputError(
            f"{wrong.file}: tensor {wrong.name!r} has shape {list(wrong.shape)}, and another expert of its layer "
            f"{list(first.shape)}"
        )
    rows, columns = first.shape
    shape = (count, len(parts) // count * rows, columns)
    return PackedHeader(
        first.file, first.name, first.dtype, shape, parts=dict(parts), unpack=partial(_stacked, count=count)
    )


def _stacked(parts: Parts, *, count: int) -> Tensor:
    import torch

    tensors = list(parts.values())
    each = len(tensors) // count
    return torch.stack([torch.cat(tensors[start : start + each]) for start in range(0, len(tensors), each)])
