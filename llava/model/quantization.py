"""4-bit and 8-bit weights with bitsandbytes, on a GPU or a CPU.

In: "4bit" or "8bit". Out: the config object for transformers' loader. The linear layers of the language model are quantized;
the projector, the vision tower and the output layer are small and sensitive, and keep their dtype.
"""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

from llava.errors import InputError, require

# Patterns over full module names, for any language model.
KEEP_UNQUANTIZED = ("lm_head", r".*\.mm_projector", r".*\.vision_tower")

# 4 bits: NF4 with double quantization; 8 bits: LLM.int8().
MODES: dict[str, dict[str, object]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


def quantization_config(mode: str, dtype: torch.dtype, **options_4bit: object) -> BitsAndBytesConfig:
    """Build the config for `from_pretrained(quantization_config=…)`; needs the packages of the extra `quant`.

    `mode` is a key of `MODES`. For 4 bits, `dtype` is the one to compute in, and options replace those of the table.
    """
    if mode not in MODES:
        raise InputError(f"unknown quantization {mode!r}; known: {', '.join(MODES)}")
    require("bitsandbytes", extra="quant")
    require("accelerate", extra="quant")
    options = MODES[mode] | ({"bnb_4bit_compute_dtype": dtype, **options_4bit} if mode == "4bit" else {})
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=list(KEEP_UNQUANTIZED))
