#!/usr/bin/env bash
# Go on from a finished LLaVA with your own samples, by adapters. Variables are finetune_task.sh's; OUT is
# ./checkpoints/llava-v1.5-7b-task-lora by default.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-liuhaotian/llava-v1.5-7b} PROJECTOR='' DATA=${DATA:-./playground/data/task.json} \
    OUT=${OUT:-./checkpoints/llava-v1.5-7b-task-lora} exec bash "$here/finetune_lora.sh" \
    "$@"
