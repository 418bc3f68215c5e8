#!/usr/bin/env bash
# Stage 2 of LLaVA-1.6: images in tiles of the best shape, and the vision tower learns too, at a fifth of the rate. Stage 1
# is ../pretrain.sh. Variables are ../finetune.sh's; OUT is ./checkpoints/llava-v1.6-7b by default.
#
# Five tiles are 2,880 image tokens, so sequences are longer and PER_DEVICE is 4 by default.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

PER_DEVICE=${PER_DEVICE:-4} OUT=${OUT:-./checkpoints/llava-v1.6-7b} exec bash "$here/../finetune.sh" \
    --image_aspect_ratio anyres \
    --image_grid_pinpoints "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]" \
    --mm_patch_merge_type spatial_unpad \
    --unfreeze_mm_vision_tower True \
    --mm_vision_tower_lr 2e-6 \
    --learning_rate 1e-5 \
    --model_max_length 4096 \
    "$@"
