"""Add low-rank adapters to a LLaVA's language model.

In: a model and the `lora_*` training arguments. Out: a PEFT model in which every linear layer of the language model has
an adapter, and neither tower nor projector has. run_folder/save.py decides which tensors are saved, and how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from llava.errors import InputError, require
from llava.model.config import language_model_type
from llava.model.protocols import LanguageModel
from llava.train.arguments import TrainingArguments

if TYPE_CHECKING:
    from peft import PeftModel


# Modules of a LLaVA without adapters: the projector is small enough to be trained whole.
MULTIMODAL_PARTS = ("mm_projector", "vision_tower", "vision_resampler")

# State-space layers whose kernels read the weights of their other linear layers without calling them.
CALLED_IN_STATE_SPACE = {kind: {"in_proj"} for kind in ("mamba", "mamba2", "falcon_mamba")}


def find_all_linear_names(model: nn.Module | LanguageModel) -> list[str]:
    """List the last name components of the language model's linear layers, without its output layer."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(part in name for part in MULTIMODAL_PARTS)
    }
    kind = language_model_type({"model_type": model.config.model_type}) if hasattr(model, "config") else ""
    return sorted((names - {"lm_head", "embed_out"}) & CALLED_IN_STATE_SPACE.get(kind, names))


def _target_modules(model: LanguageModel, named: str | None) -> list[str]:
    """The layers to adapt: those that `--lora_target_modules` names, or all linear ones."""
    known = find_all_linear_names(model)
    if named is None:
        return known
    wanted = [name.strip() for name in named.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise InputError(
            f"--lora_target_modules {named}: {unknown[0] if unknown else 'an empty list'!r} is no linear layer of this "
            f"language model; it has {', '.join(known)}"
        )
    return wanted


def add_lora(model: LanguageModel, training_args: TrainingArguments) -> PeftModel:
    """Wrap the model with adapters, and freeze everything else."""
    peft = require("peft", extra="train")
    if training_args.lora_r < 1:
        raise InputError(f"--lora_r {training_args.lora_r} is not a rank; give 1 or more")
    has_tower = any("vision_tower" in name for name, _ in model.named_parameters())
    config = peft.LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        target_modules=_target_modules(model, training_args.lora_target_modules),
        # Layers of a tower have the same names; one that is attached later gets no adapters.
        exclude_modules=rf".*\.({'|'.join(MULTIMODAL_PARTS)})(\..*)?" if has_tower else None,
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        use_dora=training_args.lora_use_dora,
        use_rslora=training_args.lora_use_rslora,
        # GPT-2's linear layers have their weights transposed, and only they do.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)
