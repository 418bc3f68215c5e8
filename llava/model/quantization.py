"""4-bit and 8-bit weights with bitsandbytes, on a GPU or a CPU.

In: "4bit", "8bit" or None. Out: the config object that transformers' loader takes. The language model's linear layers are
quantized; the projector, the vision tower and the output layer are small and sensitive, and keep their numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from llava.errors import InputError, require

# Patterns over whole module names, whatever the language model calls its inner model.
KEEP_UNQUANTIZED = ("lm_head", r".*\.mm_projector", r".*\.vision_tower")

# 4 bits: normal-float, with the scales quantized once more; 8 bits: LLM.int8().
MODES: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


def quantization_config(mode: str, dtype: torch.dtype, **options_4bit: Any) -> Any:
    """What to hand to `from_pretrained(quantization_config=…)`; needs the packages of the extra `quant`.

    `options_4bit` take the place of those in the table.
    """
    if mode not in MODES:
        raise InputError(f"unknown quantization {mode!r}; known: {', '.join(MODES)}")
    require("bitsandbytes", extra="quant")
    require("accelerate", extra="quant")
    from transformers import BitsAndBytesConfig

    options = MODES[mode] | ({"bnb_4bit_compute_dtype": dtype, **options_4bit} if mode == "4bit" else {})
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=list(KEEP_UNQUANTIZED))
