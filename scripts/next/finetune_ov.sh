#!/usr/bin/env bash
# The OneVision stage of LLaVA-OneVision: single images, several images and videos of up to 32 frames, from the result of
# finetune_si.sh. Variables are its, and:
#
#   VIDEOS  folder of the samples' videos  (default: ./playground/data)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-./checkpoints/llava-onevision-qwen2-7b-si} OUT=${OUT:-./checkpoints/llava-onevision-qwen2-7b-ov} \
DATA=${DATA:-./playground/data/onevision_ov.yaml} exec bash "$here/finetune_si.sh" \
    --video_folder "${VIDEOS:-./playground/data}" \
    --frames_upbound 32 \
    "$@"
