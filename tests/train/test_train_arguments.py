"""The command line of training: published flags and defaults, old spellings, refusals."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
from train_kit import argv, recording

from llava.errors import InputError
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_train_args

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PUBLISHED = recording("train_dataclasses.json")
CLASSES = {"ModelArguments": ModelArguments, "DataArguments": DataArguments, "TrainingArguments": TrainingArguments}

# Values that an old command line may give for flags whose default says nothing about their type.
EXAMPLES = {
    "deepspeed": None,  # wants its package
    "fsdp": None,  # wants a distributed run
    "fsdp_config": None,
    "report_to": "none",
    "torchdynamo": None,
    "tf32": "False",
    "lr_scheduler_kwargs": "{}",
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "debug": None,
    "eval_steps": "5",
    "half_precision_backend": "auto",
    "load_best_model_at_end": "False",
    "output_dir": None,
    "local_rank": "0",
    "ddp_backend": None,  # wants a distributed run
    "_n_gpu": "1",
}


@pytest.mark.parametrize("name", CLASSES)
def test_published_fields_and_defaults(name: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(CLASSES[name])}
    for published in PUBLISHED[name]:
        assert fields[published["name"]].default == published["default"], published["name"]


def test_every_field_of_ours_has_help() -> None:
    library = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for kind in CLASSES.values():
        for field in dataclasses.fields(kind):
            if field.init and (field.name not in library or kind is not TrainingArguments):
                assert field.metadata.get("help"), field.name


@pytest.mark.parametrize("name", PUBLISHED["hf_training_arguments_defaults_4.37.2"])
def test_every_old_library_flag_is_accepted(name: str, tmp_path: Path) -> None:
    default = PUBLISHED["hf_training_arguments_defaults_4.37.2"][name]
    if name in EXAMPLES and EXAMPLES[name] is None:
        pytest.skip("needs a package or a setting that is not here")
    value = EXAMPLES.get(name, default)
    if value in (None, "", "<factory {}>"):
        value = "none"
        if name in ("eval_accumulation_steps", "save_total_limit", "data_seed", "ddp_bucket_cap_mb", "tpu_num_cores"):
            value = "1"
        elif name.startswith("per_gpu"):
            value = "2"
        elif name in ("disable_tqdm", "greater_is_better", "dispatch_batches") or name.startswith("ddp_"):
            value = "None" if name == "dispatch_batches" else "False"
        elif name == "neftune_noise_alpha":
            pytest.skip("refused, which test_run_folder.py tests")
        elif name in ("torch_compile_backend", "torch_compile_mode"):
            pytest.skip("would turn the compiler on")
    parse_train_args(["--output_dir", str(tmp_path), f"--{name}", str(value)])


def test_old_spellings_mean_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llava"):
        _, _, args = parse_train_args(
            f"--output_dir {tmp_path} --no_cuda True --evaluation_strategy no --warmup_ratio 0.03 --group_by_length True "
            "--per_gpu_train_batch_size=3 --save_safetensors True --adafactor True --logging-dir logs --overwrite_output_dir "
            "--gradient_checkpointing --fsdp_min_num_params 0 --split_batches False --mpt_attn_impl triton".split()
        )
    assert (args.use_cpu, args.eval_strategy.value, args.warmup_steps) == (True, "no", 0.03)
    assert (args.train_sampling_strategy, args.per_device_train_batch_size) == ("group_by_length", 3)
    assert (args.optim.value, args.logging_dir, args.gradient_checkpointing) == ("adafactor", "logs", True)
    lines = [record.getMessage() for record in caplog.records]
    for flag in (
        "no_cuda",
        "evaluation_strategy",
        "warmup_ratio",
        "group_by_length",
        "overwrite_output_dir",
        "mpt_attn_impl",
    ):
        assert sum(f"--{flag} " in line for line in lines) == 1, flag


def test_gpu_settings_of_recipes_on_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llava"):
        _, _, args = parse_train_args(argv(tmp_path, bf16=True, tf32=True))
    assert args.bf16
    assert args.tf32 is None
    assert "--tf32 has no effect on a CPU" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rte 1", "unknown flag --learning_rte; did you mean --learning_rate?"),
        ("--vision_towr x", "did you mean --vision_tower?"),
        ("--learning-rte=1", "unknown flag --learning-rte; did you mean --learning-rate?"),
        ("--model_name x", "unknown flag --model_name; did you mean --model_name_or_path?"),
        ("--learning_rate abc", "'abc'"),
        ("--bits 4", "--bits 4"),
        ("--bits 5", "known: 4, 8, 16"),
        ("--lora_bias some", "known: none, all, lora_only"),
        ("--warmup_ratio 3", "--warmup_ratio takes a number from 0 to below 1, not 3"),
        ("--warmup_ratio x", "--warmup_ratio"),
        ("--eval_strategy no --evaluation_strategy no", "old name"),
        ("--save_safetensors False", "safetensors"),
        ("--fp16 True", "--fp16 needs a GPU"),
        ("--lr_scheduler_type cosin", "cosin"),
        ("--group_by_length maybe", "takes True or False, not 'maybe'"),
        ("--report_to trackio", "trackio"),
    ],
)
def test_refusals_name_the_flag(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        parse_train_args([*words.split(), "--output_dir", str(tmp_path), "--use_cpu", "True"])
    assert message in str(error.value)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    ("stage", "compiled", "in_file", "expected"),
    [
        (3, True, {}, False),
        (3, False, {}, None),
        (2, True, {}, None),
        (3, True, {"memory_efficient_linear": False}, False),
    ],
)
def test_compiled_layers_keep_torch_s_product_under_zero3(
    stage: int, compiled: bool, in_file: dict[str, bool], expected: bool | None, tmp_path: Path
) -> None:
    *_, training = parse_train_args(deepspeed_argv(tmp_path, stage, compiled, in_file))
    for settings in (training.hf_deepspeed_config.config, training.deepspeed_plugin.deepspeed_config):
        assert settings["zero_optimization"].get("memory_efficient_linear") is expected


def test_compiled_layers_refuse_deepspeed_s_product(tmp_path: Path) -> None:
    words = deepspeed_argv(tmp_path, 3, True, {"memory_efficient_linear": True})
    with pytest.raises(InputError, match="memory_efficient_linear: true in --deepspeed's file and --compile_layers"):
        parse_train_args(words)


def test_deepspeed_is_told_to_hold_bfloat16(tmp_path: Path) -> None:
    words = [*deepspeed_argv(tmp_path, 3, False, {}), "--bf16", "True", "--trainable_dtype"]
    for dtype, expected in ("bfloat16", True), ("auto", None), ("float32", None):
        *_, training = parse_train_args([*words, dtype])
        told = training.deepspeed_plugin.deepspeed_config["bf16"]
        assert told["enabled"] is True
        assert told.get("bf16_master_weights_and_grads") is expected
        assert told.get("bf16_optimizer_states") is expected


@pytest.mark.parametrize(
    ("stage", "in_file", "words", "message"),
    [
        (
            3,
            {},
            "--bf16 True --trainable_dtype float16",
            "--trainable_dtype float16 and --deepspeed exclude each other",
        ),
        (3, {}, "--trainable_dtype bfloat16", "needs --bf16 True"),
        (2, {"stage": 1}, "--bf16 True --trainable_dtype bfloat16", "needs ZeRO stage 2 or 3"),
        (
            3,
            {"offload_optimizer": {"device": "cpu"}},
            "--bf16 True --trainable_dtype bfloat16",
            "offloading in --deepspeed's file",
        ),
    ],
)
def test_what_deepspeed_cannot_hold_is_refused(
    stage: int, in_file: dict[str, Any], words: str, message: str, tmp_path: Path
) -> None:
    argv = [*deepspeed_argv(tmp_path, stage, False, in_file), *words.split()]
    with pytest.raises(InputError, match=message):
        parse_train_args(argv)


def deepspeed_argv(folder: Path, stage: int, compiled: bool, in_file: dict[str, Any]) -> list[str]:
    pytest.importorskip("deepspeed")
    values = json.loads((SCRIPTS / f"zero{stage}.json").read_text())
    values["zero_optimization"].update(in_file)
    (folder / "zero.json").write_text(json.dumps(values))
    words = ["--output_dir", str(folder), "--use_cpu", "True", "--deepspeed", str(folder / "zero.json")]
    return [*words, "--compile_layers", str(compiled), "--report_to", "none"]


def test_a_result_needs_a_place() -> None:
    with pytest.raises(InputError, match="--output_dir"):
        parse_train_args(["--use_cpu", "True"])


def test_a_word_without_a_flag() -> None:
    with pytest.raises(InputError, match=r"cannot read the configuration 'config\.yaml'"):
        parse_train_args(["config.yaml"])
