#!/usr/bin/env bash
# ScienceQA: twelve epochs on questions that are answered with a reasoning first. Variables are finetune.sh's, but for
#   DATA    converted questions       (default: ./playground/data/ScienceQA/data/scienceqa/llava_train_QCM-LEA.json)
#   IMAGES  folder of their images  (default: ./playground/data/ScienceQA/data/scienceqa/images/train)
#   OUT     where the result goes     (default: ./checkpoints/llava-v1.5-7b-sqa)
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
data=./playground/data/ScienceQA/data/scienceqa

DATA=${DATA:-$data/llava_train_QCM-LEA.json} IMAGES=${IMAGES:-$data/images/train} \
    OUT=${OUT:-./checkpoints/llava-v1.5-7b-sqa} exec bash "$here/finetune.sh" \
    --num_train_epochs 12 \
    "$@"
