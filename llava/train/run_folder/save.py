"""Write what a training run trained, and read it back to resume.

In: a trainer or the named parameters of its model. Out: `mm_projector.bin` (projector runs), `non_lora_trainables.bin`
beside the adapter (LoRA runs), or a complete checkpoint. File names and tensor names are those of published checkpoints.
A parameter that DeepSpeed has partitioned over ranks is gathered first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer

from llava.errors import InputError
from llava.model.checkpoints.inspect import EMBEDDING_TABLES
from llava.model.config import LEARNED_ENDS
from llava.model.protocols import LanguageModel, LlavaModel
from llava.text.tokenization import Tokenizer
from llava.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

Named = Iterable[tuple[str, Tensor]]

PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
PROJECTOR_KEYS = ("mm_projector", "vision_resampler", *LEARNED_ENDS)
# The embedding table, whose new rows are those of <im_start> and <im_end>.
EMBEDDING_KEYS = tuple(f".{name}.weight" for name in EMBEDDING_TABLES)


def maybe_zero_3(param: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """Copy a parameter to the CPU, gathered if DeepSpeed ZeRO-3 has partitioned it."""
    if not hasattr(param, "ds_id"):
        return param.detach().cpu().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.data.detach().cpu().clone()


def get_mm_adapter_state_maybe_zero_3(named_params: Named, keys_to_match: Sequence[str]) -> dict[str, Tensor]:
    """Copy the parameters whose names contain one of the keys."""
    return {name: maybe_zero_3(p) for name, p in named_params if any(key in name for key in keys_to_match)}


def get_peft_state_maybe_zero_3(named_params: Named, bias: str) -> dict[str, Tensor]:
    """Copy the LoRA parameters, and the biases that `lora_bias` trains: none, all, or those of layers with an adapter."""
    params = dict(named_params)
    lora = {name for name in params if "lora_" in name}
    adapted = {name.split("lora_")[0] for name in lora}
    biases = {name: name.removesuffix("bias").removesuffix("base_layer.") for name in params if name.endswith("bias")}
    trained = {
        "none": set[str](),
        "all": set(biases),
        "lora_only": {name for name, layer in biases.items() if layer in adapted},
    }
    if bias not in trained:
        raise InputError(f"--lora_bias is {bias!r}; known: none, all, lora_only")
    return {name: maybe_zero_3(p) for name, p in params.items() if name in lora | trained[bias]}


def get_peft_state_non_lora_maybe_zero_3(named_params: Named, require_grad_only: bool = True) -> dict[str, Tensor]:
    """Copy what a LoRA run trains besides its adapters: the projector."""
    return {
        name: maybe_zero_3(p)
        for name, p in named_params
        if "lora_" not in name and (p.requires_grad or not require_grad_only)
    }


def projector_keys(args: TrainingArguments) -> list[str]:
    """Name the tensors of a projector file; runs with `use_im_start_end` train rows of the embedding table too."""
    return [*PROJECTOR_KEYS, *(EMBEDDING_KEYS if getattr(args, "use_im_start_end", False) else ())]


def saves_projector_only(args: TrainingArguments) -> bool:
    """Whether a run trains nothing but the projector, so that its checkpoints hold nothing else."""
    return bool(getattr(args, "tune_mm_mlp_adapter", False)) and not getattr(args, "unfreeze_mm_vision_tower", False)


def gathered_projector(model: LlavaModel, args: TrainingArguments) -> dict[str, Tensor]:
    """Gather the tensors of a projector file. A collective call if they are partitioned."""
    return get_mm_adapter_state_maybe_zero_3(model.named_parameters(), projector_keys(args))


def save_projector(
    model: LlavaModel, args: TrainingArguments, file: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the projector's parameters to one file."""
    named = model.named_parameters() if state_dict is None else state_dict.items()
    weights = get_mm_adapter_state_maybe_zero_3(named, projector_keys(args))
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, file)


def save_non_lora(model: LlavaModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write what a LoRA run has besides its base and its adapters, and the model's config.

    Those are the trained parameters, the projector, which a plain base lacks though a run may freeze it, and a trained tower
    whole, with the layers behind the one that is read.
    """
    config = model.config
    parts = [*PROJECTOR_KEYS, *(("vision_tower",) if getattr(config, "unfreeze_mm_vision_tower", False) else ())]
    kept = {
        name for name, param in model.named_parameters() if param.requires_grad or any(part in name for part in parts)
    }
    named = model.named_parameters() if state_dict is None else state_dict.items()
    weights = {name: maybe_zero_3(p) for name, p in named if name in kept and "lora_" not in name}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / NON_LORA_FILE)
    model.config.save_pretrained(folder)


def load_trained(model: nn.Module | LlavaModel, file: Path) -> None:
    """Load a projector or non-LoRA file into the model that it was saved from."""
    if not file.is_file():
        raise InputError(f"cannot resume: {str(file)!r} is missing")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    params = dict(model.named_parameters())
    for name, tensor in weights.items():
        if name not in params:
            raise InputError(f"cannot resume: {str(file)!r} holds {name!r}, which this model does not have")
        if params[name].shape != tensor.shape:
            raise InputError(
                f"cannot resume: {name!r} has shape {tuple(tensor.shape)} in {str(file)!r} and "
                f"{tuple(params[name].shape)} in this model"
            )
        params[name].data.copy_(tensor)


def safe_save_model_for_hf_trainer(trainer: Trainer, output_dir: str) -> None:
    """Save the model at the end of a run: the projector alone if that is all it trained, else a complete checkpoint.

    For an `output_dir` named `checkpoint-N` a projector is written as `mm_projector/checkpoint-N.bin` beside that folder.
    """
    args, folder = trainer.args, Path(output_dir)
    if not saves_projector_only(args):
        trainer.save_model(output_dir)
        return
    weights = gathered_projector(trainer.model, args)  # every rank gathers, one writes
    if args.should_save:
        trainer.model.config.save_pretrained(output_dir)
        beside = folder.parent / "mm_projector" / f"{folder.name}.bin"
        file = beside if folder.name.startswith("checkpoint-") else folder / PROJECTOR_FILE
        save_projector(trainer.model, args, file, weights)


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: dict[str, str], tokenizer: Tokenizer, model: LanguageModel
) -> None:
    """Add special tokens; their rows in both embedding tables start as the mean of the existing rows."""
    num_new = tokenizer.add_special_tokens(special_tokens_dict)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if num_new == 0:
        return
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = table.weight.data
        rows[-num_new:] = rows[:-num_new].mean(dim=0, keepdim=True)
