#!/usr/bin/env bash
# GQA, balanced test-dev: answers, its file of predictions, and the accuracy.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SPLIT=${SPLIT:-llava_gqa_testdev_balanced}
ANSWERS=$DATA/gqa/answers/$SPLIT/$CKPT

answer_in_chunks "$ANSWERS" --question-file "$DATA/gqa/$SPLIT.jsonl" --image-folder "$DATA/gqa/data/images"
"$PYTHON" "$ROOT/scripts/convert_gqa_for_eval.py" --src "$ANSWERS/merge.jsonl" \
    --dst "$DATA/gqa/data/testdev_balanced_predictions.json"
"$PYTHON" -m llava eval score gqa --answers "$ANSWERS/merge.jsonl" --data-dir "$DATA"
