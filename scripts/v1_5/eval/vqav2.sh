#!/usr/bin/env bash
# VQAv2, test-dev: answers, and the upload for its server in answers_upload/.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SPLIT=${SPLIT:-llava_vqav2_mscoco_test-dev2015}

answer_in_chunks "$DATA/vqav2/answers/$SPLIT/$CKPT" \
    --question-file "$DATA/vqav2/$SPLIT.jsonl" \
    --image-folder "$DATA/vqav2/test2015"
"$PYTHON" "$ROOT/scripts/convert_vqav2_for_submission.py" --dir "$DATA/vqav2" --split "$SPLIT" --ckpt "$CKPT"
