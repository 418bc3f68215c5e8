#!/usr/bin/env bash
# Stage 1.5 of LLaVA-OneVision: all parts learn, on a few million detailed descriptions, documents and charts. It is
# finetune_si.sh from a language model and the projector of pretrain.sh. Variables are ../finetune.sh's.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-Qwen/Qwen2-7B-Instruct} OUT=${OUT:-./checkpoints/llava-onevision-qwen2-7b-mid} \
PROJECTOR=${PROJECTOR-./checkpoints/llava-onevision-qwen2-7b-pretrain/mm_projector.bin} \
DATA=${DATA:-./playground/data/onevision_mid.yaml} exec bash "$here/finetune_si.sh" "$@"
