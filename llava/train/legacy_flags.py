"""Translate command lines written for older libraries.

In: an argument list of an old script. Out: the list that the current parser reads, and one sentence per change. The tables
below are complete: what was renamed, what changed its form, what has no effect any more. The dataclasses are in
arguments.py. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from llava.errors import InputError

TRUE_WORDS = frozenset({"true", "yes", "y", "t", "1"})
FALSE_WORDS = frozenset({"false", "no", "n", "f", "0"})


@dataclass(frozen=True)
class Flag:
    """One `--name value ...` of a command line; `name` is spelled with underscores and without dashes."""

    name: str
    values: tuple[str, ...]

    @property
    def value(self) -> str:
        if len(self.values) != 1:
            raise InputError(f"--{self.name} takes one value, not {len(self.values)}")
        return self.values[0]

    @property
    def is_true(self) -> bool:
        """A boolean flag: without a value it is true."""
        word = self.values[0].lower() if self.values else "true"
        if len(self.values) > 1 or word not in TRUE_WORDS | FALSE_WORDS:
            raise InputError(f"--{self.name} takes True or False, not {' '.join(self.values)!r}")
        return word in TRUE_WORDS

    def as_argv(self) -> list[str]:
        return [f"--{self.name}", *self.values]


# Same meaning, another name.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "torchdynamo": "torch_compile_backend",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}

_DROPPED = "the libraries dropped it"

# Accepted because old scripts have them; each with the reason why it has no effect.
WITHOUT_MEANING = {
    "overwrite_output_dir": "an earlier result is never removed; a run continues from its last checkpoint",
    "use_mps_device": "a Mac's GPU is used whenever it is there",
    "push_to_hub_organization": "write the organization into --hub_model_id",
    "include_tokens_per_second": f"{_DROPPED}; see --include_num_input_tokens_seen",
    "_n_gpu": "the number of GPUs is what the machine shows",
    "delay_load": "a tower is read when it is needed",
    "model_class_name": "the files of --model_name_or_path say the class",
    "verbose_logging": "what a run does is logged",
    **dict.fromkeys(("fp16_opt_level", "half_precision_backend", "fp16_backend"), "mixed precision is torch's own"),
    **dict.fromkeys(("jit_mode_eval", "use_ipex", "tpu_num_cores", "tpu_metrics_debug", "past_index"), _DROPPED),
    **dict.fromkeys(("use_legacy_prediction_loop", "mp_parameters", "ray_scope"), _DROPPED),
}

# Still flags here, but without an effect.
KEPT_WITHOUT_MEANING = {
    "overwrite_output_dir": "an earlier result is never removed; a run continues from its last checkpoint",
    "lazy_preprocess": ("False", "samples are always prepared when they are drawn"),
    "mpt_attn_impl": ("", "MPT models use the attention that torch has"),
    "lora_weight_path": ("", "it never had a use; --model_name_or_path may name a merged checkpoint"),
}


def parse_flags(argv: Sequence[str]) -> list[Flag]:
    """Split an argument list at its `--names`; `--name=value` and `--na-me` are accepted."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise InputError(f"expected a flag that begins with --, found {word!r}")
    return [Flag(name, tuple(values)) for name, values in flags]


def translate(
    argv: Sequence[str], known: Collection[str], bare_booleans: Collection[str]
) -> tuple[list[str], list[str]]:
    """Translate an argument list; return the current one, and one sentence per flag that was changed or ignored.

    Flags in `known`, which the current parser reads, stay as they are. Of these, `bare_booleans` require a value: a bare one
    gets `True`.
    """
    flags = parse_flags(argv)
    given = {flag.name for flag in flags}
    result: list[str] = []
    notes: list[str] = []
    for flag in flags:
        if flag.name in known:
            result += flag.as_argv() + (["True"] if flag.name in bare_booleans and not flag.values else [])
            unused, reason = KEPT_WITHOUT_MEANING.get(flag.name, (None, ""))
            if unused == "" or (unused is not None and not flag.is_true):
                notes.append(f"--{flag.name} {' '.join(flag.values)} has no effect: {reason}")
            continue
        new, note = _replacement(flag, given)
        result += new
        if note:
            notes.append(note)
    return result, notes


def _replacement(flag: Flag, given: Collection[str]) -> tuple[list[str], str]:
    if flag.name in RENAMED:
        new = Flag(RENAMED[flag.name], flag.values)
        if new.name in given:
            raise InputError(f"--{flag.name} is the old name of --{new.name}; give one of them")
        return new.as_argv(), f"--{flag.name} is now --{new.name}"
    if flag.name in WITHOUT_MEANING:
        return [], f"--{flag.name} has no effect: {WITHOUT_MEANING[flag.name]}"
    if flag.name in REWRITTEN:
        new_argv = REWRITTEN[flag.name](flag, given)
        given_words = f"--{' '.join((flag.name, *flag.values))}"
        return (
            new_argv,
            f"{given_words} is now {' '.join(new_argv)}" if new_argv else f"{given_words} needs no flag any more",
        )
    return flag.as_argv(), ""  # unknown: the parser reports it, with the closest known name


def _warmup_ratio(flag: Flag, given: Collection[str]) -> list[str]:
    """A share of all steps; `warmup_steps` now takes shares below 1 as well as counts."""
    try:
        ratio = float(flag.value)
    except ValueError:
        raise InputError(f"--warmup_ratio takes a number from 0 to below 1, not {flag.value!r}") from None
    if not 0.0 <= ratio < 1.0:
        raise InputError(f"--warmup_ratio takes a number from 0 to below 1, not {flag.value}")
    return [] if "warmup_steps" in given else ["--warmup_steps", flag.value]


def _if_true(*argv: str) -> Callable[[Flag, Collection[str]], list[str]]:
    return lambda flag, given: list(argv) if flag.is_true else []


def _save_safetensors(flag: Flag, given: Collection[str]) -> list[str]:
    if not flag.is_true:
        raise InputError("--save_safetensors False is not possible any more: checkpoints are written as safetensors")
    return []


def _in_json(option: str, key: str, convert: Callable[[Flag], object]) -> Callable[[Flag, Collection[str]], list[str]]:
    """Flags that became one key of a JSON-valued flag."""

    def rewrite(flag: Flag, given: Collection[str]) -> list[str]:
        value = convert(flag)
        if value in (None, 0, False):
            return []
        if option in given:
            raise InputError(f"--{flag.name} is now the key {key!r} of --{option}, which is given too; write it there")
        return [f"--{option}", json.dumps({key: value})]

    return rewrite


# Same meaning, another form.
REWRITTEN: dict[str, Callable[[Flag, Collection[str]], list[str]]] = {
    "warmup_ratio": _warmup_ratio,
    "group_by_length": _if_true("--train_sampling_strategy", "group_by_length"),
    "group_by_varlen": _if_true("--train_sampling_strategy", "group_by_length"),
    "group_by_modality_length_auto": _if_true("--group_by_modality_length", "True"),
    "adafactor": _if_true("--optim", "adafactor"),
    "include_inputs_for_metrics": _if_true("--include_for_metrics", "inputs"),
    "save_safetensors": _save_safetensors,
    "fsdp_min_num_params": _in_json("fsdp_config", "min_num_params", lambda flag: int(flag.value)),
    "fsdp_transformer_layer_cls_to_wrap": _in_json(
        "fsdp_config", "transformer_layer_cls_to_wrap", lambda flag: [flag.value]
    ),
    "split_batches": _in_json("accelerator_config", "split_batches", lambda flag: flag.is_true),
    "dispatch_batches": _in_json(
        "accelerator_config", "dispatch_batches", lambda flag: flag.values != ("None",) and flag.is_true
    ),
}
