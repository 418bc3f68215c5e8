#!/usr/bin/env bash
# MM-Vet: answers, and the file that its evaluator reads in results/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer model_vqa "$DATA/mm-vet/answers/$CKPT.jsonl" \
    --question-file "$DATA/mm-vet/llava-mm-vet.jsonl" --image-folder "$DATA/mm-vet/images" --temperature 0
mkdir -p "$DATA/mm-vet/results"
"$PYTHON" "$ROOT/scripts/convert_mmvet_for_eval.py" --src "$DATA/mm-vet/answers/$CKPT.jsonl" \
    --dst "$DATA/mm-vet/results/$CKPT.json"
