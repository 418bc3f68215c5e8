#!/usr/bin/env bash
# SEED-Bench: answers, accuracy by question type, and the upload for its leaderboard.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ANSWERS=$DATA/seed_bench/answers/$CKPT

answer_in_chunks "$ANSWERS" --question-file "$DATA/seed_bench/llava-seed-bench.jsonl" --image-folder "$DATA/seed_bench"
"$PYTHON" "$ROOT/scripts/convert_seed_for_submission.py" --annotation-file "$DATA/seed_bench/SEED-Bench.json" \
    --result-file "$ANSWERS/merge.jsonl" --result-upload-file "$DATA/seed_bench/answers_upload/$CKPT.jsonl"
