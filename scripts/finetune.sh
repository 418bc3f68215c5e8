#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5: language model and projector learn to talk, on 665,000 conversations. Global batch 128.
#
#   MODEL      language model, or a LLaVA     (default: lmsys/vicuna-7b-v1.5)
#   PROJECTOR  mm_projector.bin of stage 1; set it empty for a MODEL that is a LLaVA already
#              (default: ./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin)
#   TOWER      vision tower                   (default: openai/clip-vit-large-patch14-336)
#   DATA       samples                        (default: ./playground/data/llava_v1_5_mix665k.json)
#   IMAGES     folder of their images       (default: ./playground/data)
#   OUT        where the result goes          (default: ./checkpoints/llava-v1.5-7b)
#   NUM_GPUS, PER_DEVICE (16), SHARD (zero3), ATTENTION, LAUNCHER, PYTHON: see common.sh
#
# Further flags are passed on and win over those below. The other finetune_*.sh are this one with other flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

projector=()
if [ -n "${PROJECTOR-./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}" ]; then
    projector=(--pretrain_mm_mlp_adapter "${PROJECTOR-./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}")
fi

launch 128 16 "${DEFAULT_SHARD:-zero3}" \
    --model_name_or_path "${MODEL:-lmsys/vicuna-7b-v1.5}" \
    --version v1 \
    --data_path "${DATA:-./playground/data/llava_v1_5_mix665k.json}" \
    --image_folder "${IMAGES:-./playground/data}" \
    --vision_tower "${TOWER:-openai/clip-vit-large-patch14-336}" \
    ${projector[@]+"${projector[@]}"} \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "${OUT:-./checkpoints/llava-v1.5-7b}" \
    --num_train_epochs 1 \
    --eval_strategy no \
    --save_strategy steps \
    --save_steps 50000 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to none \
    "$@"
