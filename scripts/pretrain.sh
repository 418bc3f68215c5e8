#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5: the projector learns to translate images, on 558,000 captions. Global batch 256.
#
#   MODEL   language model             (default: lmsys/vicuna-7b-v1.5)
#   TOWER   vision tower               (default: openai/clip-vit-large-patch14-336)
#   DATA    samples                    (default: ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json)
#   IMAGES  folder of their images   (default: ./playground/data/LLaVA-Pretrain/images)
#   OUT     where the result goes      (default: ./checkpoints/llava-v1.5-7b-pretrain)
#   NUM_GPUS, PER_DEVICE (32), SHARD (zero2), ATTENTION, LAUNCHER, PYTHON: see common.sh
#
# Further flags are passed on and win over those below: scripts/pretrain.sh --report_to wandb
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch 256 32 zero2 \
    --model_name_or_path "${MODEL:-lmsys/vicuna-7b-v1.5}" \
    --version plain \
    --data_path "${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
    --image_folder "${IMAGES:-./playground/data/LLaVA-Pretrain/images}" \
    --vision_tower "${TOWER:-openai/clip-vit-large-patch14-336}" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "${OUT:-./checkpoints/llava-v1.5-7b-pretrain}" \
    --num_train_epochs 1 \
    --eval_strategy no \
    --save_strategy steps \
    --save_steps 24000 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
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
