#!/usr/bin/env bash
# ScienceQA: answers, and accuracy with and without images.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ANSWERS=$DATA/scienceqa/answers

answer model_vqa_science "$ANSWERS/$CKPT.jsonl" \
    --question-file "$DATA/scienceqa/llava_test_CQM-A.json" --image-folder "$DATA/scienceqa/images/test" \
    --single-pred-prompt --temperature 0
"$PYTHON" "$ROOT/llava/eval/eval_science_qa.py" --base-dir "$DATA/scienceqa" --result-file "$ANSWERS/$CKPT.jsonl" \
    --output-file "$ANSWERS/${CKPT}_output.jsonl" --output-result "$ANSWERS/${CKPT}_result.json"
