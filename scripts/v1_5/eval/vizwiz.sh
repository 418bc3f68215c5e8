#!/usr/bin/env bash
# VizWiz, test: answers, and the upload for its server in answers_upload/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer model_vqa_loader "$DATA/vizwiz/answers/$CKPT.jsonl" \
    --question-file "$DATA/vizwiz/llava_test.jsonl" --image-folder "$DATA/vizwiz/test" --temperature 0
"$PYTHON" "$ROOT/scripts/convert_vizwiz_for_submission.py" \
    --annotation-file "$DATA/vizwiz/llava_test.jsonl" \
    --result-file "$DATA/vizwiz/answers/$CKPT.jsonl" \
    --result-upload-file "$DATA/vizwiz/answers_upload/$CKPT.json"
