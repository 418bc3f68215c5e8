#!/usr/bin/env bash
# The same adapters over a language model in 4 bits (package bitsandbytes), a quarter of its memory. Variables are
# finetune.sh's; OUT is ./checkpoints/llava-v1.5-7b-qlora by default. `--bits 8` for 8 bits, `--quant_type fp4` for the other
# 4-bit format. Packed weights cannot be sharded, so every GPU holds them whole (ZeRO-2).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

OUT=${OUT:-./checkpoints/llava-v1.5-7b-qlora} DEFAULT_SHARD=zero2 exec bash "$here/finetune_lora.sh" \
    --bits 4 --quant_type nf4 --double_quant True \
    "$@"
