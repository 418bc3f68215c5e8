# What the recipes in this folder share; they read it with `source`. Set by environment variable, for all of them:
#
#   NUM_GPUS    GPUs of this machine to use                                (default: those that nvidia-smi lists, else 1)
#   PER_DEVICE  samples per GPU and step; the global batch stays as published            (default: the recipe's)
#   SHARD       zero2, zero3, zero3_offload, fsdp2 or none                 (default: the recipe's if DeepSpeed is installed)
#   ATTENTION   sdpa (torch's own), flash (the package flash-attn) or xformers                 (default: sdpa)
#   LAUNCHER    deepspeed, torchrun or python                              (default: by SHARD, NUM_GPUS and what is installed)
#   PYTHON      the interpreter                                            (default: python)

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$SCRIPTS/..${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python}
ATTENTION=${ATTENTION:-sdpa}

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

count_gpus() {
    local found=0
    if command -v nvidia-smi > /dev/null; then
        found=$(nvidia-smi --list-gpus | wc -l)
    fi
    echo $((found > 0 ? found : 1))
}

has_deepspeed() {
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)'
}

# launch GLOBAL_BATCH PER_DEVICE SHARD FLAGS...: start the training program with the two batch flags and the sharding ones.
launch() {
    local global_batch=$1 per_device=${PER_DEVICE:-$2} shard=${SHARD:-} module train
    local default_shard=$3
    shift 3
    NUM_GPUS=${NUM_GPUS:-$(count_gpus)}
    if [ -z "$shard" ]; then
        shard=$default_shard
        if ! has_deepspeed; then
            shard=$([ "$NUM_GPUS" -gt 1 ] && echo fsdp2 || echo none)
            echo "$(basename "$0"): DeepSpeed is not installed; using SHARD=$shard instead of $default_shard" >&2
        fi
    fi
    case $ATTENTION in
        sdpa) module=train ;;
        flash) module=train_mem ;;
        xformers) module=train_xformers ;;
        *) fail "ATTENTION is '$ATTENTION'; known: sdpa, flash, xformers" ;;
    esac
    train=("$SCRIPTS/../llava/train/$module.py"
        --global_batch_size "$global_batch" --per_device_train_batch_size "$per_device")
    case $shard in
        zero2 | zero3 | zero3_offload) train+=(--deepspeed "$SCRIPTS/$shard.json") ;;
        fsdp2) train+=(--fsdp full_shard --fsdp_config "$SCRIPTS/fsdp2.json") ;;
        none) ;;
        *) fail "SHARD is '$shard'; known: zero2, zero3, zero3_offload, fsdp2, none" ;;
    esac
    if [ -z "${LAUNCHER:-}" ]; then
        LAUNCHER=python
        if [[ $shard == zero* ]] && command -v deepspeed > /dev/null; then
            LAUNCHER=deepspeed
        elif [ "$NUM_GPUS" -gt 1 ] || [ "$shard" != none ]; then
            LAUNCHER=torchrun
        fi
    fi
    case $LAUNCHER in
        deepspeed) exec deepspeed --num_gpus "$NUM_GPUS" "${train[@]}" "$@" ;;
        torchrun) exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS" "${train[@]}" "$@" ;;
        python) exec "$PYTHON" "${train[@]}" "$@" ;;
        *) fail "LAUNCHER is '$LAUNCHER'; known: deepspeed, torchrun, python" ;;
    esac
}
