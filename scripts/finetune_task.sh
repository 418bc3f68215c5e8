#!/usr/bin/env bash
# Go on from a finished LLaVA with your own samples. Variables are finetune.sh's, but for
#   MODEL   a LLaVA                        (default: liuhaotian/llava-v1.5-7b)
#   DATA    your samples                   (default: ./playground/data/task.json)
#   OUT     where the result goes          (default: ./checkpoints/llava-v1.5-7b-task)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-liuhaotian/llava-v1.5-7b} PROJECTOR='' DATA=${DATA:-./playground/data/task.json} \
    OUT=${OUT:-./checkpoints/llava-v1.5-7b-task} exec bash "$here/finetune.sh" \
    "$@"
