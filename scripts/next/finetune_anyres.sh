#!/usr/bin/env bash
# LLaVA-NeXT with SigLIP and Qwen2 in one stage after pretrain.sh: images in up to five tiles of the best of five shapes.
# Variables are ../finetune.sh's; DATA is ./playground/data/llava_next.json by default.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-Qwen/Qwen2-7B-Instruct} OUT=${OUT:-./checkpoints/llava-next-qwen2-7b} PER_DEVICE=${PER_DEVICE:-4} \
PROJECTOR=${PROJECTOR-./checkpoints/llava-onevision-qwen2-7b-pretrain/mm_projector.bin} \
DATA=${DATA:-./playground/data/llava_next.json} exec bash "$here/finetune_si.sh" \
    --image_aspect_ratio anyres \
    --image_grid_pinpoints "[(384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)]" \
    --global_batch_size 128 \
    --save_steps 3000 \
    "$@"
