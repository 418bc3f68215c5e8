"""Define what a training run can be told: three dataclasses, and the command line that fills them.

In: an argument list, in the current spelling or in that of scripts for transformers 4. Out: ModelArguments, DataArguments,
TrainingArguments (transformers' own, plus what a LLaVA needs). legacy_flags.py translates old spellings, config_file.py
reads configuration files; the values are used in run.py, model_setup.py, data.py and llava_trainer.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
import transformers
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations

from llava.errors import InputError, install_command, require
from llava.images.layout import ImagePolicy
from llava.images.video_layout import VideoPolicy
from llava.train.config_file import as_yaml, expand_config
from llava.train.distributed import import_collectives, program_name
from llava.train.legacy_flags import parse_flags, translate

logger = logging.getLogger(__name__)

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
PRINT_CONFIG = ("--print-config", "--print_config")


# The parts of a model by the names of LLaVA-NeXT.
LANGUAGE_MODEL, PROJECTOR, TOWER, RESAMPLER = TUNABLE_PARTS = (
    "mm_language_model", "mm_mlp_adapter", "mm_vision_tower", "mm_vision_resampler",
)  # fmt: skip


def _opt(default: object, help: str) -> Any:
    return field(default=default, metadata={"help": help})


class _Given:
    """Which settings the user gave: those of the command line and the configuration file, else all that are not defaults."""

    given: frozenset[str] | None = None

    def is_given(self, name: str) -> bool:
        if self.given is not None:
            return name in self.given
        default = next(entry.default for entry in dataclasses.fields(cast(Any, self)) if entry.name == name)
        return bool(getattr(self, name) != default)


@dataclass
class ModelArguments(_Given):
    """Which language model, vision tower and projector are combined, and which of them are trained."""

    model_name_or_path: str | None = _opt(
        "facebook/opt-125m", "Folder or hub name of the language model, or of a LLaVA checkpoint to continue from."
    )
    attn_implementation: str | None = _opt(
        None,
        f"Attention of the language model: {', '.join(ATTENTION)}; by default what the program or the model chooses.",
    )
    version: str | None = _opt(
        "v0", "Conversation template: plain (projector pretraining), v1, llava_llama_2, mpt, ... (see conversation.py)."
    )
    freeze_backbone: bool = _opt(False, "Do not train the language model's body (its output layer still is).")
    tune_mm_mlp_adapter: bool = _opt(False, "Train only the projector, and save it as mm_projector.bin.")
    vision_tower: str | None = _opt(None, "Folder or hub name of the vision tower; without it the run is text only.")
    mm_vision_select_layer: int = _opt(-1, "Hidden layer of the tower that the projector reads (-2 in v1.5).")
    pretrain_mm_mlp_adapter: str | None = _opt(None, "A mm_projector.bin to start the projector from.")
    mm_projector_type: str | None = _opt("linear", "Projector: linear, mlp2x_gelu (any depth), identity.")
    mm_use_im_start_end: bool = _opt(False, "Put <im_start> and <im_end> around every image.")
    mm_use_im_patch_token: bool = _opt(True, "Add the token <im_patch> to the vocabulary, as in the first models.")
    mm_patch_merge_type: str = _opt(
        "flat", "How tiles are joined: flat, spatial, spatial_unpad; also with _maxpool2x2, _nobase."
    )
    mm_vision_select_feature: str = _opt("patch", "Tower features to use: patch, or cls_patch.")
    unfreeze_mm_vision_tower: bool = _opt(False, "Train the vision tower too; its weights go into the checkpoint.")
    mm_tunable_parts: str | None = _opt(
        None,
        "Train these parts and no others, joined by commas: mm_language_model, mm_mlp_adapter (the projector), "
        "mm_vision_tower, mm_vision_resampler.",
    )
    mm_spatial_pool_mode: str | None = _opt(None, "How a video's frames are reduced: average, max, bilinear.")
    mm_spatial_pool_stride: int | None = _opt(None, "By what factor, in both directions.")
    mm_newline_position: str | None = _opt(
        None, "Where a video has the learned line break: grid (after each row), frame, one_token, no_token."
    )
    add_faster_video: bool | None = _opt(None, "Reduce most frames of a video twice as much as every few others.")
    faster_token_stride: int | None = _opt(None, "With --add_faster_video: every so many frames one keeps its detail.")

    def __post_init__(self) -> None:
        if self.attn_implementation is not None and self.attn_implementation not in ATTENTION:
            raise InputError(f"--attn_implementation is {self.attn_implementation!r}; known: {', '.join(ATTENTION)}")
        if self.mm_tunable_parts is None:
            return
        names = [name.strip() for name in self.mm_tunable_parts.split(",") if name.strip()]
        for name in names:
            if name not in TUNABLE_PARTS:
                raise InputError(f"--mm_tunable_parts names {name!r}; known: {', '.join(TUNABLE_PARTS)}")
        if not names:
            raise InputError("--mm_tunable_parts is empty; name the parts to train, or leave the flag out")
        self.mm_tunable_parts = ",".join(dict.fromkeys(names))  # as checkpoints say it
        for flag, contradicts in (
            ("freeze_backbone", LANGUAGE_MODEL in names),
            ("tune_mm_mlp_adapter", names != [PROJECTOR]),
            ("unfreeze_mm_vision_tower", TOWER not in names),
        ):
            if getattr(self, flag) and contradicts:
                raise InputError(
                    f"--{flag} and --mm_tunable_parts {self.mm_tunable_parts} contradict each other; give one"
                )
        self.unfreeze_mm_vision_tower = TOWER in names
        self.tune_mm_mlp_adapter = names == [PROJECTOR]

    def trains(self, part: str) -> bool | None:
        """Whether `--mm_tunable_parts` names a part; None where it is not given."""
        return None if self.mm_tunable_parts is None else part in self.mm_tunable_parts.split(",")


@dataclass
class DataArguments(_Given):
    """Where the samples are and how their images are prepared."""

    data_path: str | None = _opt(
        None,
        "Training samples: a file, folder, pattern or hub name (docs/data.md); several joined by commas; or a mixture, .yaml.",
    )
    data_weights: str | None = _opt(None, "With several files in --data_path: their shares of an epoch, e.g. '2,1'.")
    on_bad_sample: str = _opt(
        "stop", "An unusable sample: stop the run, or skip it, draw another, and list it at the end."
    )
    lazy_preprocess: bool = _opt(False, "Kept for old scripts; samples are always prepared when they are drawn.")
    is_multimodal: bool = _opt(False, "Set by the program: true if there is a vision tower.")
    image_folder: str | None = _opt(None, "Folder that the samples' image paths are relative to and confined to.")
    image_urls: bool = _opt(
        False, "Download images that the samples name by http(s) addresses, each time they are drawn."
    )
    image_aspect_ratio: str = _opt(
        "square",
        "How an image is fitted to the tower's square: square (crop), pad; or cut: anyres, anyres_max_N, highres, crop_split.",
    )
    image_grid_pinpoints: str | None = _opt(
        None,
        "anyres: resolutions to choose from: a list of (width, height), e.g. '[(336, 672), (672, 336)]', or a range of tiles, "
        "e.g. '(1x1),...,(6x6)'. highres: sides of squares, e.g. '336,672'.",
    )
    image_crop_resolution: int | None = _opt(None, "crop_split: side in pixels of the middle that is cut out.")
    image_split_resolution: int | None = _opt(None, "crop_split: side in pixels of the squares that it is split into.")
    video_folder: str | None = _opt(None, "Folder of the samples' videos, if it is not --image_folder.")
    video_fps: float = _opt(1.0, "Frames of a video per second, where there is no --frames_upbound or fewer than it.")
    frames_upbound: int = _opt(0, "At most so many frames of a video, with equal distances; 0: no limit.")
    force_sample: bool = _opt(False, "Take --frames_upbound frames of shorter videos too.")
    add_time_instruction: bool = _opt(False, "Begin a video's question with its length and the times of its frames.")
    eval_data_path: str | None = _opt(None, "Validation samples; --eval_strategy sets how often they are used.")
    eval_image_folder: str | None = _opt(None, "Image folder of the validation samples, if it is not --image_folder.")

    # Set by the program when the model is loaded.
    image_processor: Any = field(default=None, init=False)
    pixel_dtype: torch.dtype = field(default=torch.float32, init=False)
    image_policy: ImagePolicy | None = field(default=None, init=False)
    video_policy: VideoPolicy | None = field(default=None, init=False)
    mm_use_im_start_end: bool = field(default=False, init=False)
    ends_with_newline: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ("stop", "skip"):
            raise InputError(f"--on_bad_sample is {self.on_bad_sample!r}; known: stop, skip")
        if not 0 < self.video_fps < math.inf:
            raise InputError(f"--video_fps is {self.video_fps}; frames per second are a number above 0")
        if self.frames_upbound < 0 or (self.force_sample and not self.frames_upbound):
            reason = "force_sample takes a number of frames from it" if not self.frames_upbound else "0 means no limit"
            raise InputError(f"--frames_upbound is {self.frames_upbound}; {reason}")


@dataclass
class TrainingArguments(_Given, transformers.TrainingArguments):
    """transformers' training arguments and those of LLaVA runs."""

    cache_dir: str | None = _opt(None, "Where downloaded models are kept.")
    remove_unused_columns: bool = _opt(False, "Must stay False: samples carry images besides the model's inputs.")
    freeze_mm_mlp_adapter: bool = _opt(False, "Do not train the projector.")
    mpt_attn_impl: str | None = _opt("triton", "Kept for old scripts; MPT models use torch's attention.")
    model_max_length: int = _opt(512, "Longest sequence in tokens, images included; longer ones are truncated.")
    double_quant: bool = _opt(True, "With --bits 4: quantize the quantization constants too.")
    quant_type: str = _opt("nf4", "With --bits 4: nf4 or fp4.")
    bits: int = _opt(16, "Bits per weight of the frozen language model: 16, 8 or 4; 8 and 4 need --lora_enable.")
    lora_enable: bool = _opt(False, "Train low-rank adapters of the language model's linear layers.")
    lora_r: int = _opt(64, "Rank of the adapters.")
    lora_alpha: int = _opt(16, "Scale of the adapters; their output is multiplied by alpha / r.")
    lora_dropout: float = _opt(0.05, "Dropout before the adapters.")
    lora_target_modules: str | None = _opt(
        None,
        "Last names of the layers to adapt, joined by commas, e.g. 'q_proj,v_proj'; by default every linear layer.",
    )
    lora_weight_path: str = _opt("", "Kept for old scripts; it has no effect.")
    lora_bias: str = _opt("none", "Biases to train besides the adapters: none, all, lora_only.")
    lora_use_dora: bool = _opt(False, "DoRA: learn the magnitude of each weight row separately from its direction.")
    lora_use_rslora: bool = _opt(False, "Rank-stabilised LoRA: multiply by alpha / sqrt(r) instead of alpha / r.")
    mm_projector_lr: float | None = _opt(None, "The projector's own learning rate.")
    mm_vision_tower_lr: float | None = _opt(None, "The vision tower's own learning rate, when it is trained.")
    group_by_modality_length: bool = _opt(False, "Make batches of one modality and of similar lengths.")
    packing: bool = _opt(False, "Pack samples into sequences without padding; batch sizes then count packed sequences.")
    pack_length: int | None = _opt(None, "With --packing: tokens of a packed sequence; by default --model_max_length.")
    compile_layers: bool = _opt(
        False, "Compile the layers of the language model, and of a trained tower; needs a GPU or a C++ compiler."
    )
    keep_activations: float | None = _opt(
        None, "With --compile_layers, instead of --gradient_checkpointing: share of activations to keep, 0 to 1."
    )
    fused_loss: bool = _opt(True, "Compute the loss without all logits in memory; the result is the same.")
    loss_average: str = _opt(
        "tokens",
        "What has the same weight in the loss of a step: tokens, samples, or micro_batches (of each rank, as in published "
        "runs). With tokens and samples a step is the same however it is split; see --average_tokens_across_devices.",
    )
    global_batch_size: int | None = _opt(None, "Samples per step over all GPUs; sets --gradient_accumulation_steps.")
    trainable_dtype: str = _opt(
        "auto", "Dtype of trained weights: auto (float32; with DeepSpeed its float32 copy), float32, bfloat16, float16."
    )
    logging_dir: str | None = _opt(None, "Folder for tensorboard's files.")
    eval_generate: int = _opt(
        0, "Generate answers to the first N validation samples at each validation, for the log and eval_answers.jsonl."
    )
    early_stopping_patience: int | None = _opt(
        None, "End the run after so many validations without a better --metric_for_best_model (the validation loss)."
    )
    eval_max_new_tokens: int = _opt(64, "Longest such answer in tokens.")
    verify_saved: bool = _opt(
        True, "At the end, load what was saved and compare its loss on a small batch with that of the trained model."
    )
    estimate_memory: bool = _opt(False, "Print how much memory the run would need, and exit.")

    # Copied from ModelArguments by the program, for the trainer and the code that saves.
    tune_mm_mlp_adapter: bool = field(default=False, init=False)
    use_im_start_end: bool = field(default=False, init=False)
    unfreeze_mm_vision_tower: bool = field(default=False, init=False)
    adds_stop: bool = field(
        default=False, init=False
    )  # whether generation stops at a token that the base does not stop at

    def __post_init__(self) -> None:
        require("accelerate", extra="train")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(str(choice) for choice in choices)
                raise InputError(f"--{name} is {getattr(self, name)!r}; known: {known}")
        if self.bits != 16 and not self.lora_enable:
            raise InputError(
                f"--bits {self.bits} quantizes the language model, whose weights then cannot be trained; add --lora_enable "
                "True to train adapters over it"
            )
        if self.bits != 16 and self.fsdp:
            raise InputError(
                f"--bits {self.bits} and --fsdp exclude each other: quantized weights cannot be sharded; every GPU holds "
                "them whole, with DeepSpeed ZeRO-2 or without it"
            )
        if self.deepspeed and not importlib.util.find_spec("deepspeed"):
            raise InputError("--deepspeed needs the package 'deepspeed'; install it with: pip install deepspeed")
        self._refuse_unusable()
        if not torch.accelerator.is_available() and not self.use_cpu:  # type: ignore[has-type]
            self.use_cpu = True
            logger.warning("no GPU found: training on the CPU")
        if self.use_cpu:
            self._fit_to_cpu()
        if self.global_batch_size is not None:
            self._split_global_batch(self.global_batch_size)
        import_collectives()
        super().__post_init__()  # begins the process group of a distributed run
        if self.keep_activations is not None:
            self._check_keep_activations()
        if self.uses_zero3 and self.bits != 16:
            raise InputError(f"--bits {self.bits} and DeepSpeed ZeRO-3 exclude each other; take scripts/zero2.json")
        if self.deepspeed and self.trainable_dtype in ("bfloat16", "float16"):
            self._check_deepspeed_precision()
            # Hold trained weights and optimizer states in bfloat16, without a float32 copy.
            settings = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
            self.hf_deepspeed_config.config["bf16"] = settings
        if self.uses_zero3 and self.compile_layers:  # before DeepSpeed first reads it, when a model is loaded
            disable_memory_efficient_linear(self.hf_deepspeed_config.config)

    def _refuse_unusable(self) -> None:
        """Refuse settings of transformers that cannot have their effect here, or whose package is absent."""
        for name, reason in _UNUSABLE.items():
            if getattr(self, name):
                raise InputError(f"--{name} {getattr(self, name)} cannot be used: {reason}; leave it out")
        if self.ddp_backend is not None and "WORLD_SIZE" not in os.environ:  # type: ignore[has-type]
            logger.warning("--ddp_backend %s has no effect: a single process needs no backend", self.ddp_backend)  # type: ignore[has-type]
            self.ddp_backend = None
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise InputError(f"--early_stopping_patience is {self.early_stopping_patience}; give 1 or more")
        if self.use_liger_kernel and not importlib.util.find_spec("liger_kernel"):
            raise InputError("--use_liger_kernel needs the package 'liger-kernel'; install it, or leave the flag out")
        available = {"none", "all", *get_available_reporting_integrations()}
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to or []:
            if name not in available:
                package = _REPORTERS.get(name, name)
                extra = _REPORTER_EXTRAS.get(name)
                how = "install it" if extra is None else f"install it with: {install_command(extra)}"
                raise InputError(f"--report_to {name} needs the package {package!r}; {how}, or report to none")

    def _split_global_batch(self, global_batch: int) -> None:
        num_processes = int(os.environ.get("WORLD_SIZE", "0"))
        num_devices = num_processes or (1 if self.use_cpu else max(1, torch.cuda.device_count()))
        at_once = num_devices * self.per_device_train_batch_size  # type: ignore[has-type]
        if global_batch < 1 or global_batch % at_once:
            raise InputError(
                f"--global_batch_size {global_batch} cannot be split over {num_devices} device(s) with "
                f"--per_device_train_batch_size {self.per_device_train_batch_size}; it has to be a multiple of {at_once}"
            )
        given: int = self.gradient_accumulation_steps  # type: ignore[has-type]
        needed = global_batch // at_once
        if given not in (1, needed):
            raise InputError(
                f"--global_batch_size {global_batch} means --gradient_accumulation_steps {needed} here, not {given}; give "
                "one of the two"
            )
        self.gradient_accumulation_steps = needed

    def _check_keep_activations(self) -> None:
        if not 0 <= self.keep_activations <= 1:  # type: ignore[operator]
            raise InputError(f"--keep_activations is {self.keep_activations}; it must be between 0 and 1")
        if not self.compile_layers or self.gradient_checkpointing:
            raise InputError("--keep_activations needs --compile_layers True and --gradient_checkpointing False")

    def _check_deepspeed_precision(self) -> None:
        if self.trainable_dtype == "float16":
            raise InputError(
                "--trainable_dtype float16 and --deepspeed exclude each other; take bfloat16, or leave it out"
            )
        if not self.bf16:
            raise InputError("--trainable_dtype bfloat16 under --deepspeed needs --bf16 True")
        if not self.hf_deepspeed_config.is_zero2() and not self.hf_deepspeed_config.is_zero3():
            raise InputError(
                "--trainable_dtype bfloat16 under --deepspeed needs ZeRO stage 2 or 3; take scripts/zero2.json or "
                "scripts/zero3.json"
            )
        if self.hf_deepspeed_config.is_offload():
            raise InputError(
                "--trainable_dtype bfloat16 and offloading in --deepspeed's file exclude each other: an offloaded "
                "optimizer keeps float32; take scripts/zero3.json, or leave the flag out"
            )

    def _fit_to_cpu(self) -> None:
        if self.fp16:
            raise InputError("--fp16 needs a GPU; on a CPU use --bf16 True, or neither")
        if self.tf32:  # type: ignore[has-type]
            self.tf32 = None
            logger.warning("--tf32 has no effect on a CPU")

    @property
    def uses_zero3(self) -> bool:
        return bool(self.deepspeed) and self.hf_deepspeed_config.is_zero3()

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products and of frozen weights."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of trained weights.

        By default float32: small updates of bfloat16 weights round to zero, and float16 gradients cannot be unscaled.
        DeepSpeed keeps a float32 copy of its own.
        """
        if self.trainable_dtype != "auto":
            return getattr(torch, self.trainable_dtype)
        return self.compute_dtype if self.deepspeed else torch.float32


def disable_memory_efficient_linear(deepspeed_config: dict[str, Any]) -> None:
    """Have DeepSpeed keep torch's linear function, for a run whose layers are compiled.

    A compiled layer gathers a weight again for its backward pass. An eager layer would keep the gathered weight, so this
    is for compiled layers only.
    """
    zero = deepspeed_config["zero_optimization"]
    if zero.get("memory_efficient_linear"):
        raise InputError(
            "memory_efficient_linear: true in --deepspeed's file and --compile_layers exclude each other, since layers with "
            "that function cannot share a compiled program; take it out of the file, or leave the layers uncompiled"
        )
    zero["memory_efficient_linear"] = False


_CHOICES: dict[str, tuple[object, ...]] = {
    "lora_bias": ("none", "all", "lora_only"),
    "quant_type": ("nf4", "fp4"),
    "bits": (4, 8, 16),
    "trainable_dtype": ("auto", "float32", "bfloat16", "float16"),
    "loss_average": ("tokens", "samples", "micro_batches"),
}


# Packages of trackers that are named otherwise, and the extras that bring them.
_REPORTERS = {"dvclive": "dvclive", "azure_ml": "azureml-core", "comet_ml": "comet_ml"}
_REPORTER_EXTRAS = {"wandb": "report", "tensorboard": "train", "trackio": "report"}

# Settings of transformers that the forward pass of a LLaVA has no place for.
_UNUSABLE = {
    "neftune_noise_alpha": "images and text are joined after the embedding layer, whose output it would change",
}


def parse_train_args(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse a command line (by default `sys.argv`), which may begin with a configuration file (config_file.py).

    Old spellings are translated, one logged line each. `--help` and `--print-config` print and exit.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    print_only = any(word in PRINT_CONFIG for word in argv)
    argv = [word for word in argv if word not in PRINT_CONFIG]
    typed = {word.partition("=")[0] for word in argv if word.startswith("--")}
    parser = build_parser()
    known = {option[2:].replace("-", "_") for action in parser._actions for option in action.option_strings}
    if not any(word in ("-h", "--help") for word in argv):
        argv = expand_config(argv, known, {action.dest for action in parser._actions if action.nargs in ("+", "*")})
        if print_only:
            print(as_yaml(parse_flags(argv), _own_settings()), end="")
            raise SystemExit(0)
        # transformers deprecates this name, but all recipes use it.
        if "activation_checkpointing" in known:
            argv = [word.replace("--gradient_checkpointing", "--activation_checkpointing", 1) for word in argv]
        argv, notes = translate(argv, known, _booleans_that_need_a_value(parser))
        for note in notes:
            logger.warning(note)
        flags = parse_flags(argv)
        for flag in flags:
            if flag.name not in known:
                as_typed = next((word for word in typed if word[2:].replace("-", "_") == flag.name), f"--{flag.name}")
                raise InputError(f"unknown flag {as_typed}{_closest(as_typed, known)}")
        if not any(flag.name == "output_dir" for flag in flags):
            raise InputError("say where the result goes with --output_dir")
    try:
        model, data, training, extra = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (InputError, ImportError):
        raise
    except ValueError as error:  # a value that transformers' own checks refuse
        raise InputError(str(error)) from error
    if extra:
        raise InputError(f"cannot use {' '.join(extra)!r} on the command line; --help lists every flag")
    model.given = data.given = training.given = frozenset(flag.name for flag in parse_flags(argv))
    return model, data, training


def build_parser() -> HfArgumentParser:
    """Return the parser of all flags, those of transformers too."""
    return _Parser((ModelArguments, DataArguments, TrainingArguments), prog=program_name(), allow_abbrev=False)


def _own_settings() -> dict[str, dict[str, tuple[object, str]]]:
    """List the settings that LLaVA adds to transformers', by the groups of a configuration file."""
    library = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments)}
    kinds = {"model": ModelArguments, "data": DataArguments, "training": TrainingArguments}
    return {
        group: {
            entry.name: (entry.default, entry.metadata["help"])
            for entry in dataclasses.fields(kind)
            if entry.init and entry.name not in library
        }
        for group, kind in kinds.items()
    }


class _Parser(HfArgumentParser):
    """Raise `InputError` where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _booleans_that_need_a_value(parser: HfArgumentParser) -> set[str]:
    fields = [entry for kind in parser.dataclass_types for entry in dataclasses.fields(kind)]
    return {entry.name for entry in fields if entry.type == bool | None and entry.default is None}


def _closest(flag: str, known: set[str]) -> str:
    """Suggest a flag in the spelling that was typed, with underscores or with dashes."""
    match = difflib.get_close_matches(flag[2:].replace("-", "_"), sorted(known), n=1)
    if not match:
        return "; --help lists every flag"
    name = match[0].replace("_", "-") if "-" in flag[2:] else match[0]
    return f"; did you mean --{name}?"
