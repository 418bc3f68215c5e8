#!/usr/bin/env bash
# Q-Bench in Chinese, split dev or test (the first argument, default dev): each question with the model's response.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SPLIT=${1:-dev}
[ "$SPLIT" = dev ] && QUESTIONS=质衡-问答-验证集 || QUESTIONS=质衡-问答-测试集

answer model_vqa_qbench "$DATA/qbench/llvisionqa_zh_${SPLIT}_answers.jsonl" --lang zh \
    --image-folder "$DATA/qbench/images_llvisionqa/" --questions-file "$DATA/qbench/$QUESTIONS.json"
