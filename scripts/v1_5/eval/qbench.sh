#!/usr/bin/env bash
# Q-Bench, split dev or test (the first argument, default dev): each question with the model's response.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SPLIT=${1:-dev}

answer model_vqa_qbench "$DATA/qbench/llvisionqa_${SPLIT}_answers.jsonl" --lang en \
    --image-folder "$DATA/qbench/images_llvisionqa/" --questions-file "$DATA/qbench/llvisionqa_$SPLIT.json"
