#!/usr/bin/env bash
# The single-image stage of LLaVA-OneVision: an image in tiles of one of 36 shapes, reduced to the features of 9; language
# model, projector and tower learn, the tower at a fifth of the rate. Global batch 256. Variables are ../finetune.sh's, with other defaults:
#
#   MODEL      the result of finetune_mid.sh  (default: ./checkpoints/llava-onevision-qwen2-7b-mid)
#   PROJECTOR  for a MODEL that is a language model (default: empty)
#   TOWER      vision tower                   (default: google/siglip-so400m-patch14-384)
#   DATA       samples, or a mixture          (default: ./playground/data/onevision_si.yaml)
#   OUT        where the result goes          (default: ./checkpoints/llava-onevision-qwen2-7b-si)
#
# An image may take 7,290 tokens: PER_DEVICE is 1 by default.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-./checkpoints/llava-onevision-qwen2-7b-mid} PROJECTOR=${PROJECTOR-} PER_DEVICE=${PER_DEVICE:-1} \
TOWER=${TOWER:-google/siglip-so400m-patch14-384} DATA=${DATA:-./playground/data/onevision_si.yaml} \
OUT=${OUT:-./checkpoints/llava-onevision-qwen2-7b-si} exec bash "$here/../finetune.sh" \
    --version qwen_1_5 \
    --image_aspect_ratio anyres_max_9 \
    --image_grid_pinpoints "(1x1),...,(6x6)" \
    --mm_patch_merge_type spatial_unpad \
    --mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model \
    --mm_vision_tower_lr 2e-6 \
    --learning_rate 1e-5 \
    --global_batch_size 256 \
    --model_max_length 32768 \
    --save_steps 1000 \
    "$@"
