"""Estimate the memory that a run needs on each GPU, before its first step.

In: the model as it will be trained, and the training arguments. Out: bytes for weights, gradients, optimizer, activations
and logits, as a table. Weights, gradients and optimizer states are counted. Activations are estimated from what the layers
of transformers' Llama family keep for the backward pass, eager or compiled (performance.py), for the longest possible
batches. benchmarks/results/train.md compares estimates with measured peaks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from llava.images.layout import ImagePolicy
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loss import CHUNK_VALUES
from llava.train.arguments import TrainingArguments
from llava.train.metrics import MATMULS, base_model, language_model, vision_tower

GIB = 2**30

# The share of image features in a packed sequence, in data like LLaVA's own.
_IMAGES = 0.6

# Parameters that ZeRO-3 keeps gathered at a time, unless its file says otherwise.
_ZERO3_LIVE = 10**9
_ZERO3_BUCKETS = ("stage3_prefetch_bucket_size", "reduce_bucket_size")

# Bytes of state per trained value, by the beginning of the optimizer's name; None: two states in the weight's precision.
_STATE_BYTES: dict[str, float | None] = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "adafactor": 0.02,
    "sgd": 0,
    "adamw": None,
    "paged_adamw": None,
}


@dataclass(frozen=True)
class TrainingShape:
    """What decides the size of activations: B sequences of T tokens through L layers of width D."""

    batch: int
    tokens: int
    layers: int
    width: int
    key_value_width: int
    mlp_width: int
    vocabulary: int
    compute_bytes: int
    stream_bytes: int  # of a number in the residual stream
    checkpointing: bool
    keep: float | None  # share of activations that compiled layers keep (performance.py); None if not compiled
    trains_layers: bool  # a frozen linear layer need not keep its input
    adapter_bytes: int  # kept by adapters, per token and layer
    fused_loss: bool  # logits are computed a chunk at a time (model/loss.py)
    trains_head: bool


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    copies: float  # of weights in the compute dtype: autocast keeps them for a step, sharding gathers them
    activations: float
    working: float  # activations and their gradients of the layer whose backward pass runs
    logits: float

    @property
    def peak(self) -> float:
        """The larger of the start of the backward pass, with all activations, and its end, with all gradients."""
        begin = self.copies + self.activations + max(self.logits, self.working / 2)
        end = self.copies + self.gradients + self.working
        return self.weights + self.optimizer + max(begin, end)

    def table(self) -> str:
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return "\n".join(f"  {name:<12}{value / GIB:10.2f} GiB" for name, value in [*rows, ("peak", self.peak)])

    def line(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.1f}" for field in fields(self))
        return f"about {self.peak / GIB:.1f} GiB per device ({parts})"


def estimate(model: nn.Module, args: TrainingArguments, shape: TrainingShape | None = None) -> MemoryEstimate:
    """Estimate for this model and these training arguments, whose shape may be replaced."""
    shape = shape or shape_of(model, args)
    stage, ranks = sharding(args)
    in_parameters = sum(_numel(p) * p.element_size() for p in model.parameters())
    in_buffers = sum(b.nbytes for b in model.buffers())  # a frozen tower's are among them under ZeRO-3 (performance.py)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_bytes = sum(_numel(p) * p.element_size() for p in trained)
    num_trained = sum(map(_numel, trained))
    name = str(getattr(args.optim, "value", args.optim))
    per_value = next((size for key, size in _STATE_BYTES.items() if name.startswith(key)), None)
    states = 2 * trained_bytes if per_value is None else per_value * num_trained
    if args.deepspeed:  # two states and a copy of the weights
        in_file = _deepspeed_config(args).get("bf16", {}).get("bf16_optimizer_states")
        states = (6 if in_file or args.trainable_dtype == "bfloat16" else 12) * num_trained
    return MemoryEstimate(
        weights=in_parameters / (ranks if stage >= 3 else 1) + in_buffers,
        gradients=trained_bytes / (ranks if stage >= 2 else 1),
        optimizer=states / (ranks if stage >= 1 else 1),
        copies=_copies(model, args, shape, stage),
        activations=_activations(shape) + _tower_activations(model, shape, packed=args.packing),
        working=shape.batch * shape.tokens * _working_bytes_per_token(shape),
        logits=_logits(shape),
    )


def _numel(weight: nn.Parameter) -> int:
    """Number of values of a whole weight, which ZeRO-3 may have partitioned."""
    return getattr(weight, "ds_numel", weight.numel())


def _copies(model: nn.Module, args: TrainingArguments, shape: TrainingShape, stage: int) -> float:
    if args.deepspeed and stage >= 3:
        zero = _deepspeed_config(args).get("zero_optimization", {})
        limit, *buckets = (zero.get(name) for name in ("stage3_max_live_parameters", *_ZERO3_BUCKETS))
        live = limit if isinstance(limit, int | float) else _ZERO3_LIVE
        gathered = min(live, sum(map(_numel, model.parameters()))) + _kept_gathered(model, shape)
        return shape.compute_bytes * (gathered + sum(size for size in buckets if isinstance(size, int | float)))
    if shape.compute_bytes >= 4:
        return 0
    cast = [m for m in model.modules() if isinstance(m, MATMULS) and m.weight.requires_grad and m.weight.itemsize == 4]
    copies = sum(_numel(m.weight) for m in cast) * shape.compute_bytes
    if args.fsdp and args.fsdp_config.get("reshard_after_forward", True):  # of one layer, and the next on its way
        return copies * min(1, 2 / shape.layers)
    return copies


def _kept_gathered(model: nn.Module, shape: TrainingShape) -> int:
    """With compiled layers, modules that are not compiled keep their weights gathered (performance.py)."""
    tower = vision_tower(model)
    if shape.keep is None:
        return 0
    uncompiled = tower is not None and tower.trainable and not tower.passes_once
    parts = ("mm_projector", "vision_tower") if uncompiled else ("mm_projector",)
    return sum(_numel(p) for name, p in model.named_parameters() if any(part in name for part in parts))


# Names of the inner width of an MLP in the configs of language models; where there is none it is four times the width.
_MLP_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def shape_of(model: nn.Module, args: TrainingArguments) -> TrainingShape:
    config, base = language_model(model).config, base_model(model)
    head = base.get_output_embeddings()
    heads = getattr(config, "num_attention_heads", None) or 1  # a state-space model has none
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    embeddings = base.get_input_embeddings()
    mlp_width = next((size for key in _MLP_WIDTHS if (size := getattr(config, key, None))), 4 * config.hidden_size)
    compute_bytes = args.compute_dtype.itemsize
    keep = 1.0 if args.keep_activations is None else args.keep_activations
    return TrainingShape(
        batch=args.per_device_train_batch_size,
        tokens=(args.pack_length or args.model_max_length) if args.packing else args.model_max_length,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        key_value_width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
        mlp_width=mlp_width,
        vocabulary=config.vocab_size,
        compute_bytes=compute_bytes,
        stream_bytes=max(embeddings.weight.element_size(), compute_bytes),
        checkpointing=bool(args.gradient_checkpointing),
        keep=keep if args.compile_layers else None,
        trains_layers=any(p.requires_grad for name, p in language_model(model).named_parameters() if _in_layer(name)),
        adapter_bytes=_adapter_bytes(args, config.hidden_size, mlp_width, compute_bytes) if args.lora_enable else 0,
        fused_loss=args.fused_loss and isinstance(base, LlavaMetaForCausalLM) and base.can_fuse_loss(),
        trains_head=head is not None and any(p.requires_grad for p in head.parameters()),
    )


def _in_layer(name: str) -> bool:
    """Whether this is a weight of a decoder layer: not of an adapter, and not of the tower."""
    return "layers." in name and "lora_" not in name and "vision_tower" not in name


def _adapter_bytes(args: TrainingArguments, width: int, mlp_width: int, compute_bytes: int) -> int:
    """Adapters on the seven linear layers of a decoder layer: their inputs; with dropout a copy of each, and a mask."""
    inputs = 6 * width + mlp_width
    if args.lora_dropout:
        return inputs * (compute_bytes + 1)
    return (2 * width + mlp_width) * compute_bytes


def _activations(shape: TrainingShape) -> float:
    """What the language model keeps for its backward pass."""
    tokens = shape.batch * shape.tokens
    last_norm = _norm_bytes_per_token(shape)
    layer_input = shape.width * shape.stream_bytes
    if shape.keep is not None:
        return tokens * (shape.layers * (layer_input + shape.keep * _compiled_bytes_per_token(shape)) + last_norm)
    if shape.checkpointing:
        return tokens * (shape.layers * layer_input + last_norm)
    return tokens * (shape.layers * (layer_bytes_per_token(shape) + shape.adapter_bytes) + last_norm)


def _working_bytes_per_token(shape: TrainingShape) -> float:
    """Gradients are about as large as the activations; with recomputation those are there as well."""
    if shape.keep is not None:
        return 2 * _compiled_bytes_per_token(shape)
    layer = layer_bytes_per_token(shape) + shape.adapter_bytes
    return 2 * layer if shape.checkpointing else layer


def _compiled_bytes_per_token(shape: TrainingShape) -> float:
    """For a compiled layer that recomputes only what is cheap (norms, rotary embeddings, the gate), without its input."""
    queries, key_values, output, middle = shape.width, 2 * shape.key_value_width, shape.width, shape.width
    kept = queries + key_values + output + middle + 2 * shape.mlp_width
    if shape.trains_layers:
        kept += 2 * shape.width + shape.mlp_width  # inputs of the linear layers
    return shape.compute_bytes * kept + shape.adapter_bytes


def layer_bytes_per_token(shape: TrainingShape) -> int:
    """For one eager layer of the Llama family, with an attention that keeps no T x T matrix."""
    compute, width, key_values = shape.compute_bytes, shape.width, shape.key_value_width
    attention = compute * (width + 2 * key_values + 2 * width)  # queries, keys, values, output in two layouts
    mlp = compute * 4 * shape.mlp_width  # gate before and after its activation, up, and their product
    casts = 2 * width * compute if compute < shape.stream_bytes else 0  # inputs of the linear layers
    return 2 * _norm_bytes_per_token(shape) + attention + mlp + casts


def _norm_bytes_per_token(shape: TrainingShape) -> int:
    """A norm computes in float32 and keeps its input and result in float32, and the result in its own dtype."""
    return (4 + (shape.compute_bytes + shape.stream_bytes if shape.stream_bytes < 4 else 4)) * shape.width


def _logits(shape: TrainingShape) -> float:
    """The logits, and in float32 their logarithms and two gradients; or the largest chunk of the fused loss."""
    values = shape.batch * shape.tokens * shape.vocabulary
    if not shape.fused_loss:
        return values * (12 + shape.compute_bytes)
    gradient = 4 * shape.vocabulary * shape.width if shape.trains_head else 0
    return min(CHUNK_VALUES, values) * (4 + shape.compute_bytes) + gradient


def _tower_activations(model: nn.Module, shape: TrainingShape, *, packed: bool) -> float:
    """For a trained tower of CLIP layers; a frozen one keeps nothing."""
    tower = vision_tower(model)
    if tower is None or not tower.trainable:
        return 0.0
    num_tiles = shape.batch * _tiles_per_sequence(base_model(model).image_policy(), shape, packed=packed)
    width, compute = tower.hidden_size, shape.compute_bytes
    inner = getattr(tower.config, "intermediate_size", 4 * width)
    layer_input = width * max(tower.dtype.itemsize, compute)
    # Two norms, queries, keys, values and output; before the activation of the MLP, and after it.
    products = compute * (6 * width + 2 * inner)
    if shape.keep is not None:
        per_token = layer_input + shape.keep * products
    elif shape.checkpointing:
        per_token = layer_input
    else:
        casts = 2 * width * compute if compute < tower.dtype.itemsize else 0  # for keys and values again
        per_token = 2 * layer_input + products + casts + compute * inner  # in the MLP's activation
    return num_tiles * (tower.num_patches + 1) * len(tower.layers_used()) * per_token


def _tiles_per_sequence(policy: ImagePolicy, shape: TrainingShape, *, packed: bool) -> int:
    """The largest number for a sample with one image; for a packed sequence, the usual number."""
    tiles = policy.max_image_tiles
    return max(tiles, round(_IMAGES * shape.tokens / policy.features_per_tile)) if packed else tiles


def sharding(args: TrainingArguments) -> tuple[int, int]:
    """Return the ZeRO stage (FSDP shards as stage 3 does) and the number of ranks to shard over."""
    if args.deepspeed:
        return int(_deepspeed_config(args).get("zero_optimization", {}).get("stage", 0)), args.world_size
    return (3, args.world_size) if args.fsdp else (0, 1)


def _deepspeed_config(args: TrainingArguments) -> dict[str, Any]:
    return args.deepspeed if isinstance(args.deepspeed, dict) else json.loads(Path(args.deepspeed).read_text())


@dataclass(frozen=True)
class Remedy:
    """A change of flags, and the bytes that it saves on each device."""

    flags: str
    saved: float


def remedies(model: nn.Module, args: TrainingArguments) -> list[Remedy]:
    """Changes that would make a run smaller, the most effective first."""
    shape = shape_of(model, args)
    estimated = estimate(model, args, shape)
    changed: list[tuple[str, TrainingShape]] = []
    if shape.keep:
        keep = round(shape.keep / 2, 2)
        changed.append((f"--keep_activations {keep}", replace(shape, keep=keep)))
    elif not shape.checkpointing and shape.keep is None:
        changed.append(("--gradient_checkpointing True", replace(shape, checkpointing=True)))
    if shape.batch > 1:
        half, steps = shape.batch // 2, 2 * args.gradient_accumulation_steps
        flags = f"--per_device_train_batch_size {half} --gradient_accumulation_steps {steps}"
        changed.append((flags, replace(shape, batch=half)))
    changed.append((f"--model_max_length {shape.tokens // 2}", replace(shape, tokens=shape.tokens // 2)))
    found = [Remedy(flags, estimated.peak - estimate(model, args, other).peak) for flags, other in changed]
    if not args.lora_enable and not getattr(args, "tune_mm_mlp_adapter", False):
        # Adapters train about a hundredth of the weights; the rest is held in the compute dtype.
        shrunk = estimated.weights * (1 - shape.compute_bytes / shape.stream_bytes)
        found.append(Remedy("--lora_enable True", estimated.optimizer + estimated.copies + shrunk))
        if sharding(args)[0] < 3:
            found.append(Remedy("--deepspeed scripts/zero3.json on several GPUs", estimated.optimizer / 2))
    elif args.bits == 16 and args.lora_enable:
        found.append(Remedy("--bits 4", estimated.weights * 0.7))
    return sorted((remedy for remedy in found if remedy.saved > 0), key=lambda remedy: -remedy.saved)
