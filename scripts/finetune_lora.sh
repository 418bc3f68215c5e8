#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 by adapters: rank 128, the projector learns whole at its own rate. Variables are finetune.sh's;
# OUT is ./checkpoints/llava-v1.5-7b-lora by default. Load the result beside MODEL, or merge it: `llava merge --help`.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

OUT=${OUT:-./checkpoints/llava-v1.5-7b-lora} exec bash "$here/finetune.sh" \
    --lora_enable True --lora_r 128 --lora_alpha 256 --learning_rate 2e-4 --mm_projector_lr 2e-5 \
    "$@"
