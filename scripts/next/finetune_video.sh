#!/usr/bin/env bash
# LLaVA-Video: OneVision learns videos of 110 frames, each a grid of 14x14 features whose rows end with a line break, and is
# told their times. Variables are finetune_ov.sh's.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-lmms-lab/llava-onevision-qwen2-7b-ov} OUT=${OUT:-./checkpoints/llava-video-7b-qwen2} \
DATA=${DATA:-./playground/data/llava_video.yaml} exec bash "$here/finetune_ov.sh" \
    --frames_upbound 110 \
    --force_sample True \
    --add_time_instruction True \
    --mm_newline_position grid \
    --mm_spatial_pool_mode bilinear \
    --mm_spatial_pool_stride 2 \
    --save_steps 500 \
    "$@"
