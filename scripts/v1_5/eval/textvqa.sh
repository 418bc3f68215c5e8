#!/usr/bin/env bash
# TextVQA, validation: answers and accuracy.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

answer model_vqa_loader "$DATA/textvqa/answers/$CKPT.jsonl" \
    --question-file "$DATA/textvqa/llava_textvqa_val_v051_ocr.jsonl" --image-folder "$DATA/textvqa/train_images" \
    --temperature 0
"$PYTHON" -m llava.eval.eval_textvqa --annotation-file "$DATA/textvqa/TextVQA_0.5.1_val.json" \
    --result-file "$DATA/textvqa/answers/$CKPT.jsonl"
