#!/usr/bin/env bash
# MME: answers, and scores of perception and cognition.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer model_vqa_loader "$DATA/MME/answers/$CKPT.jsonl" \
    --question-file "$DATA/MME/llava_mme.jsonl" --image-folder "$DATA/MME/MME_Benchmark_release_version" --temperature 0
"$PYTHON" -m llava eval score mme --answers "$DATA/MME/answers/$CKPT.jsonl" --data-dir "$DATA"
