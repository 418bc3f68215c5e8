#!/usr/bin/env bash
# POPE: answers, and five figures for each split.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer model_vqa_loader "$DATA/pope/answers/$CKPT.jsonl" \
    --question-file "$DATA/pope/llava_pope_test.jsonl" --image-folder "$DATA/pope/val2014" --temperature 0
"$PYTHON" "$ROOT/llava/eval/eval_pope.py" --annotation-dir "$DATA/pope/coco" \
    --question-file "$DATA/pope/llava_pope_test.jsonl" --result-file "$DATA/pope/answers/$CKPT.jsonl"
