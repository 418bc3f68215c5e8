#!/usr/bin/env bash
# Stage 1 of LLaVA-OneVision: the projector learns to translate SigLIP's images for Qwen2. Global batch 512. Variables are
# ../pretrain.sh's; MODEL, TOWER and OUT have the defaults below.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-Qwen/Qwen2-7B-Instruct} TOWER=${TOWER:-google/siglip-so400m-patch14-384} PER_DEVICE=${PER_DEVICE:-16} \
OUT=${OUT:-./checkpoints/llava-onevision-qwen2-7b-pretrain} exec bash "$here/../pretrain.sh" \
    --global_batch_size 512 \
    --model_max_length 8192 \
    "$@"
