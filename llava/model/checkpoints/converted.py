"""Weights that transformers stores in another form than it computes with: experts one by one, in memory stacked.

In: stored tensors that a model does not have, and the model. Out: a header for each tensor of the model that transformers
makes of them, under the model's name, which reads and combines the stored ones. transformers converts them in
`from_pretrained` by the language model's class; here the same conversions, which model/transformers_internals.py finds,
serve the LLaVA over it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llava.errors import InputError
from llava.model.checkpoints.weight_files import TORCH_DTYPES, TensorHeader, Tensors, read_tensor
from llava.model.transformers_internals import conversions


@dataclass(frozen=True)
class ConvertedHeader(TensorHeader):
    """A tensor that is made of stored ones; `name` is that of the result, `file` the first one's."""

    parts: Mapping[str, TensorHeader] = field(default_factory=dict, compare=False, repr=False)
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def stored(self) -> tuple[TensorHeader, ...]:
        return tuple(stored for part in self.parts.values() for stored in part.stored)

    def read_from(self, tensors: Tensors) -> Tensor:
        """Read and convert; the parts may be in other files than the open one."""
        assert self.convert is not None
        return self.convert({name: read_tensor(part) for name, part in self.parts.items()})[self.name]


def convert_headers(
    model: nn.Module, headers: Mapping[str, TensorHeader], unknown: Collection[str]
) -> dict[str, TensorHeader]:
    """Replace stored tensors that a model does not have by those that transformers makes of them.

    Args:
        model: A language model, or a LLaVA over one.
        headers: Stored tensors by name.
        unknown: Of their names, those that are none of the model's.

    Raises:
        InputError: Tensors that are one in the model do not fit together.
    """
    result = dict(headers)
    for names, convert in conversions(model, unknown):
        parts = {name: headers[name] for name in names}
        first = parts[names[0]]
        on_meta = {
            name: torch.empty(part.shape, dtype=getattr(torch, TORCH_DTYPES[part.dtype]), device="meta")
            for name, part in parts.items()
        }
        try:
            made = convert(on_meta)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{first.file}: tensor {first.name!r} and {len(names) - 1} others, which are one tensor of the model, do not "
                f"fit together, or one of them is missing ({' '.join(str(error).split())})"
            ) from error
        for name in names:
            del result[name]
        for name, tensor in made.items():
            result[name] = ConvertedHeader(first.file, name, first.dtype, tuple(tensor.shape), None, parts, convert)
    return result
