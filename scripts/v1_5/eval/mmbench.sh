#!/usr/bin/env bash
# MMBench, dev: answers, and the upload for its server in answers_upload/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SPLIT=${SPLIT:-mmbench_dev_20230712}

answer model_vqa_mmbench "$DATA/mmbench/answers/$SPLIT/$CKPT.jsonl" \
    --question-file "$DATA/mmbench/$SPLIT.tsv" --single-pred-prompt --temperature 0
"$PYTHON" "$ROOT/scripts/convert_mmbench_for_submission.py" --annotation-file "$DATA/mmbench/$SPLIT.tsv" \
    --result-dir "$DATA/mmbench/answers/$SPLIT" --upload-dir "$DATA/mmbench/answers_upload/$SPLIT" --experiment "$CKPT"
