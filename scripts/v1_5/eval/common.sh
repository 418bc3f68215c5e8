# What the evaluation recipes in this folder share; they read it with `source`. Set by environment variable, for all of them:
#
#   MODEL       folder or hub repository                         (default: liuhaotian/llava-v1.5-13b)
#   CKPT        what its answers are called                      (default: the last part of MODEL)
#   CONV_MODE   conversation template                            (default: vicuna_v1)
#   DATA        folder with the benchmarks' folders in it        (default: ./playground/data/eval)
#   DEVICE      auto, cuda or cpu                                (default: auto)
#   PYTHON      the interpreter                                  (default: python)
#
# `llava eval TASK` does the same in one command, resumes, and writes a report; these are for those who know the originals.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-liuhaotian/llava-v1.5-13b}
CKPT=${CKPT:-$(basename "$MODEL")}
CONV_MODE=${CONV_MODE:-vicuna_v1}
DATA=${DATA:-./playground/data/eval}
DEVICE=${DEVICE:-auto}

# answer MODULE ANSWERS_FILE FLAGS...: one process answers everything.
answer() {
    local module=$1 answers=$2
    shift 2
    "$PYTHON" -m "llava.eval.$module" --model-path "$MODEL" --answers-file "$answers" --device "$DEVICE" \
        --conv-mode "$CONV_MODE" "$@"
}

# answer_in_chunks FOLDER FLAGS...: a process for each GPU of CUDA_VISIBLE_DEVICES; FOLDER/merge.jsonl has all answers.
answer_in_chunks() {
    local folder=$1 chunks index gpus pids=() pid
    shift
    IFS=',' read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-0}"
    chunks=${#gpus[@]}
    for index in "${!gpus[@]}"; do
        CUDA_VISIBLE_DEVICES=${gpus[$index]} answer model_vqa_loader "$folder/${chunks}_$index.jsonl" \
            --num-chunks "$chunks" --chunk-idx "$index" --temperature 0 "$@" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" # a chunk that failed ends the recipe here, rather than with a merge of what there is
    done
    : > "$folder/merge.jsonl"
    for index in "${!gpus[@]}"; do
        cat "$folder/${chunks}_$index.jsonl" >> "$folder/merge.jsonl"
    done
}
