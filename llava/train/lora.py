"""Low-rank adapters of a LLaVA's language model.

In: a model and the `lora_*` training arguments. Out: a PEFT model in which every linear layer of the language model has
an adapter, and neither tower nor projector has. Which of its tensors are saved, and how, is in save.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from llava.errors import InputError, require

# Parts of a LLaVA that adapters leave alone: the projector is small enough to be trained whole.
MULTIMODAL_PARTS = ("mm_projector", "vision_tower", "vision_resampler")


def find_all_linear_names(model: nn.Module) -> list[str]:
    """Last name components of the language model's linear layers, without its output layer."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in MULTIMODAL_PARTS)
    }
    return sorted(names - {"lm_head", "embed_out"})


def add_lora(model: Any, training_args: Any) -> Any:
    """The model with adapters, everything but them frozen."""
    peft = require("peft", extra="train")
    if training_args.lora_r < 1:
        raise InputError(f"--lora_r {training_args.lora_r} is not a rank; give 1 or more")
    has_tower = any("vision_tower" in name for name, _ in model.named_parameters())
    config = peft.LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        target_modules=find_all_linear_names(model),
        # Layers of a tower go by the same names; one that joins later is safe.
        exclude_modules=rf".*\.({'|'.join(MULTIMODAL_PARTS)})(\..*)?" if has_tower else None,
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        use_dora=training_args.lora_use_dora,
        use_rslora=training_args.lora_use_rslora,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)
