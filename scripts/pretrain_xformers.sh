#!/usr/bin/env bash
# Stage 1 on GPUs without bfloat16 and FlashAttention (V100, T4): xformers' attention, fp16, small steps. Variables are
# pretrain.sh's; PER_DEVICE is 4 by default.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

ATTENTION=xformers PER_DEVICE=${PER_DEVICE:-4} exec bash "$here/pretrain.sh" \
    --bf16 False --fp16 True --tf32 False \
    "$@"
