"""Load a pretrained projector, which a pretraining run saved as mm_projector.bin, into a model.

In: a .bin or .safetensors file and a model with a projector. Out: the same model with the weights of its projector (and of
learned newlines, and of the embeddings of added tokens) loaded. Saving is in train/run_folder/save.py;
whole checkpoints are loaded by model/builder.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llava.errors import InputError
from llava.model.checkpoints.inspect import EMBEDDING_TABLES
from llava.model.checkpoints.weight_files import open_tensors, read_headers
from llava.model.config import LEARNED_ENDS
from llava.model.protocols import InnerModel


def load_projector(model: InnerModel, path: str) -> None:
    """Load `model.mm_projector` and those of `LEARNED_ENDS` that the file has; all shapes must match."""
    wanted = {f"mm_projector.{name}": tensor for name, tensor in model.mm_projector.named_parameters()}
    saved = read_projector_weights(path)
    for name in LEARNED_ENDS:
        end = getattr(model, name, None)
        if end is not None and any(stored.endswith(name) for stored in saved):
            wanted[name] = end
    for name, tensor in wanted.items():
        # Saved names begin with the path of the module: model.mm_projector.0.weight, base_model.model.model.….
        found = next((value for key, value in saved.items() if key == name or key.endswith("." + name)), None)
        if found is None:
            raise InputError(f"{path!r} has no tensor {name!r}, which the projector of this model needs")
        if found.shape != tensor.shape:
            raise InputError(f"{path!r}: tensor {name!r} has shape {list(found.shape)}, expected {list(tensor.shape)}")
        with torch.no_grad():
            tensor.copy_(found)


def load_new_token_embeddings(table: Tensor, path: str, num_new: int) -> None:
    """Load the last `num_new` rows of the embedding `table` (vocabulary, D) from a projector file.

    The file holds these rows alone or a whole table.
    """
    tables = tuple(f"{table}.weight" for table in EMBEDDING_TABLES)
    found = {name: rows for name, rows in read_projector_weights(path).items() if name.endswith(tables)}
    if not found:
        raise InputError(
            f"{path!r} has no embedding table (embed_tokens.weight), which mm_use_im_start_end takes its new rows from"
        )
    name, saved = next(iter(found.items()))
    if saved.shape not in (table.shape, (num_new, table.shape[1])):
        raise InputError(
            f"{path!r}: {name} has shape {list(saved.shape)}, expected "
            f"{list(table.shape)} or {[num_new, table.shape[1]]}"
        )
    table.data[-num_new:] = saved[-num_new:].to(table)


def read_projector_weights(path: str) -> dict[str, Tensor]:
    """Read the tensors of a projector file, by name."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no file {path!r} to take the projector from (pretrain_mm_mlp_adapter)")
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in read_headers(file)}
