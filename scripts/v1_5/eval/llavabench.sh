#!/usr/bin/env bash
# LLaVA-Bench-in-the-Wild: answers, a judge's reviews (OPENAI_API_KEY, or OPENAI_BASE_URL for another server), their summary.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
BENCH=$DATA/llava-bench-in-the-wild

answer model_vqa "$BENCH/answers/$CKPT.jsonl" \
    --question-file "$BENCH/questions.jsonl" --image-folder "$BENCH/images" --temperature 0
mkdir -p "$BENCH/reviews"
"$PYTHON" "$ROOT/llava/eval/eval_gpt_review_bench.py" --question "$BENCH/questions.jsonl" \
    --context "$BENCH/context.jsonl" --rule "$ROOT/llava/eval/table/rule.json" \
    --answer-list "$BENCH/answers_gpt4.jsonl" "$BENCH/answers/$CKPT.jsonl" --output "$BENCH/reviews/$CKPT.jsonl"
"$PYTHON" "$ROOT/llava/eval/summarize_gpt_review.py" -f "$BENCH/reviews/$CKPT.jsonl"
