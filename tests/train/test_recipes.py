"""The recipes in scripts/: each is started with a stand-in for its launcher, its command is read as the program reads it, and
run for a step on the recorded tiny checkpoints. Configuration files say the same as the recipes they are named after."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE
from train_kit import BASE, LLAVA, TOWER

from llava.errors import InputError
from llava.train.arguments import parse_train_args
from llava.train.config_file import expand_config
from llava.train.legacy_flags import parse_flags
from llava.train.train import train

ROOT = HERE.parents[1]
SCRIPTS = ROOT / "scripts"
RECIPES = sorted(
    str(path.relative_to(SCRIPTS))
    for path in [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("v1_*/*.sh"), *SCRIPTS.glob("next/*.sh")]
    if path.name != "common.sh"
)
STAGE_1 = {"global_batch_size": 256, "learning_rate": 1e-3, "tune_mm_mlp_adapter": True, "version": "plain"}
STAGE_2 = {
    "global_batch_size": 128,
    "learning_rate": 2e-5,
    "version": "v1",
    "image_aspect_ratio": "pad",
    "group_by_modality_length": True,
}
LORA = STAGE_2 | {"learning_rate": 2e-4, "mm_projector_lr": 2e-5, "lora_enable": True, "lora_r": 128, "lora_alpha": 256}
ALL = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "num_train_epochs": 1,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "model_max_length": 2048,
    "gradient_checkpointing": True,
    "bf16": True,
    "vision_tower": "openai/clip-vit-large-patch14-336",
}
NEXT = {"vision_tower": "google/siglip-so400m-patch14-384"}
ONEVISION = (
    STAGE_2
    | NEXT
    | {
        "version": "qwen_1_5",
        "global_batch_size": 256,
        "learning_rate": 1e-5,
        "mm_vision_tower_lr": 2e-6,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "image_aspect_ratio": "anyres_max_9",
        "mm_patch_merge_type": "spatial_unpad",
        "model_max_length": 32768,
    }
)
# What was published, or (1.6) is told in its announcement.
PUBLISHED: dict[str, dict[str, Any]] = {
    "pretrain.sh": STAGE_1,
    "pretrain_xformers.sh": STAGE_1 | {"bf16": False},  # and fp16, which a CPU refuses
    "finetune.sh": STAGE_2,
    "finetune_lora.sh": LORA,
    "finetune_qlora.sh": LORA | {"bits": 4, "quant_type": "nf4", "double_quant": True},
    "finetune_task.sh": STAGE_2 | {"pretrain_mm_mlp_adapter": None},
    "finetune_task_lora.sh": LORA | {"pretrain_mm_mlp_adapter": None},
    "finetune_sqa.sh": STAGE_2 | {"num_train_epochs": 12},
    "v1_6/finetune.sh": STAGE_2
    | {
        "learning_rate": 1e-5,
        "mm_vision_tower_lr": 2e-6,
        "unfreeze_mm_vision_tower": True,
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "model_max_length": 4096,
    },
    "next/pretrain.sh": STAGE_1 | NEXT | {"global_batch_size": 512, "model_max_length": 8192},
    "next/finetune_mid.sh": ONEVISION,
    "next/finetune_si.sh": ONEVISION,
    "next/finetune_ov.sh": ONEVISION | {"frames_upbound": 32},
    "next/finetune_video.sh": ONEVISION
    | {
        "frames_upbound": 110,
        "force_sample": True,
        "add_time_instruction": True,
        "mm_newline_position": "grid",
        "mm_spatial_pool_stride": 2,
    },
    "next/finetune_anyres.sh": ONEVISION | {"image_aspect_ratio": "anyres", "global_batch_size": 128},
} | {
    f"v1_5/{name}": case
    for name, case in {
        "pretrain.sh": STAGE_1,
        "finetune.sh": STAGE_2,
        "finetune_lora.sh": LORA,
        "finetune_task.sh": STAGE_2,
        "finetune_task_lora.sh": LORA,
    }.items()
}
CONFIGS = {
    "pretrain.yaml": "pretrain.sh",
    "finetune.yaml": "finetune.sh",
    "finetune_lora.yaml": "finetune_lora.sh",
    "finetune_qlora.yaml": "finetune_qlora.sh",
    "finetune_v1_6.yaml": "v1_6/finetune.sh",
}


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def started(recipe: str, folder: Path, *extra: str, has_deepspeed: bool = False, **variables: str) -> list[str]:
    """The command that a recipe starts, by programs that only write down how they were called."""
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    called = stubs / "called"
    for name, answers in (("python", f'[ "$1" = -c ] && exit {0 if has_deepspeed else 1}\n'), ("deepspeed", "")):
        if name == "deepspeed" and not has_deepspeed:
            continue
        (stubs / name).write_text(f"#!/bin/bash\n{answers}printf '%s\\n' {name} \"$@\" > '{called}'\n")
        (stubs / name).chmod(0o755)
    path = os.pathsep.join([str(stubs), "/usr/bin", "/bin"])
    done = subprocess.run(
        ["bash", str(SCRIPTS / recipe), *extra], capture_output=True, text=True, env={"PATH": path, **variables}
    )
    assert done.returncode == 0, done.stderr
    return called.read_text().splitlines()


def onevision(folder: Path) -> Path:
    """The recorded OneVision checkpoint with its tower's folder by a path of this machine."""
    shutil.copytree(HERE / "next/checkpoints/onevision-siglip28-qwen", folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(HERE / "next/checkpoints/vision/siglip-28-p4")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def flags_of(command: list[str]) -> list[str]:
    """What follows the training program."""
    position = next(index for index, word in enumerate(command) if re.search(r"llava/train/\w+\.py$", word))
    return command[position + 1 :]


def parsed(flags: list[str], *, on_cpu: tuple[str, ...] = ()) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in parse_train_args([*flags, *on_cpu]):
        values |= {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
    return values


def test_every_recipe_is_known_here() -> None:
    assert set(RECIPES) == set(PUBLISHED)


@pytest.mark.parametrize("recipe", [*RECIPES, "common.sh"])
def test_recipes_are_valid_shell(recipe: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / recipe)]).returncode == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_settings(recipe: str, tmp_path: Path) -> None:
    flags = flags_of(started(recipe, tmp_path, NUM_GPUS="8", SHARD="none"))
    settings = parsed(flags, on_cpu=("--use_cpu", "True", *(("--fp16", "False") if "xformers" in recipe else ())))
    for name, value in {**ALL, **PUBLISHED[recipe]}.items():
        assert settings[name] == value, name
    at_once = 8 * settings["per_device_train_batch_size"]
    assert settings["global_batch_size"] % at_once == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_every_recipe(recipe: str, tmp_path: Path) -> None:
    if "qlora" in recipe:
        pytest.importorskip("bitsandbytes")
    first_stage = "pretrain" in recipe
    is_llava = "task" in recipe
    variables = {
        "MODEL": LLAVA if is_llava else BASE,
        "TOWER": TOWER,
        "DATA": f"train_data/{'pretrain' if first_stage else 'finetune'}.json",
        "IMAGES": "images",
        "OUT": str(tmp_path / "out"),
        "NUM_GPUS": "1",
        "PER_DEVICE": "2",
        "SHARD": "none",
    }
    if not first_stage and not is_llava:
        variables["PROJECTOR"] = "checkpoints/llava-v1.5-tiny-pretrain/mm_projector.bin"
    small = ["--max_steps", "1", "--global_batch_size", "4", "--use_cpu", "True", "--bf16", "False", "--fp16", "False"]
    small += ["--disable_tqdm", "True", "--dataloader_num_workers", "0"]
    if recipe in ("next/finetune_si.sh", "next/finetune_ov.sh", "next/finetune_video.sh"):  # from the stage before
        variables |= {"MODEL": str(onevision(tmp_path / "before")), "PROJECTOR": ""}
    if recipe.startswith("next/"):
        variables["TOWER"] = str(HERE / "next/checkpoints/vision/siglip-28-p4")
        variables["VIDEOS"] = "images"
        if not first_stage:  # the recorded projector is for another tower
            variables["PROJECTOR"] = ""
    if recipe == "next/finetune_anyres.sh":
        small += ["--image_grid_pinpoints", "[(28, 56), (56, 28), (56, 56)]"]
    if "v1_6" in recipe:
        small += ["--image_grid_pinpoints", "[(56, 112), (112, 56), (112, 112)]"]
    flags = flags_of(started(recipe, tmp_path, *small, **variables))
    trainer = train(argv=flags)
    assert trainer.state.global_step == 1
    assert torch.isfinite(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])).all()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {"mm_projector.bin"} if first_stage else {"model.safetensors"}
    assert written >= ({"adapter_model.safetensors", "non_lora_trainables.bin"} if "lora" in recipe else wanted)


@pytest.mark.slow
def test_a_recipe_runs_as_it_is_typed(tmp_path: Path) -> None:
    """No stand-ins: the whole script, with this interpreter."""
    variables = {
        "MODEL": LLAVA,
        "TOWER": TOWER,
        "DATA": "train_data/finetune.json",
        "IMAGES": "images",
        "NUM_GPUS": "1",
    }
    variables |= {
        "OUT": str(tmp_path),
        "SHARD": "none",
        "PYTHON": sys.executable,
        "PER_DEVICE": "2",
        "OMP_NUM_THREADS": "1",
    }
    small = ["--max_steps", "1", "--global_batch_size", "2", "--use_cpu", "True", "--lora_r", "2"]
    command = ["bash", str(SCRIPTS / "v1_5" / "finetune_task_lora.sh"), *small]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **variables})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("variables", "has_deepspeed", "expected"),
    [
        ({"NUM_GPUS": "8"}, True, r"deepspeed --num_gpus 8 \S+/train\.py .*--deepspeed \S+/zero3\.json"),
        ({"NUM_GPUS": "8"}, False, r"python -m torch\.distributed\.run .*--nproc_per_node 8 .*--fsdp full_shard .*/fsdp2"),
        ({"NUM_GPUS": "1"}, False, r"python \S+/train\.py (?!.*(--deepspeed|--fsdp))"),
        ({"NUM_GPUS": "2", "SHARD": "zero3_offload"}, True, r"deepspeed --num_gpus 2 .*/zero3_offload\.json"),
        ({"NUM_GPUS": "2", "SHARD": "none"}, True, r"python -m torch\.distributed\.run (?!.*(--deepspeed|--fsdp))"),
        ({"SHARD": "zero2", "LAUNCHER": "torchrun", "NUM_GPUS": "2"}, True, r"python -m torch\.distributed\.run .*zero2\.json"),
        ({"ATTENTION": "flash", "NUM_GPUS": "1", "SHARD": "none"}, True, r"python \S+/train_mem\.py "),
        ({"ATTENTION": "xformers", "NUM_GPUS": "1", "SHARD": "none"}, True, r"python \S+/train_xformers\.py "),
    ],
)  # fmt: skip
def test_how_recipes_are_launched(
    variables: dict[str, str], has_deepspeed: bool, expected: str, tmp_path: Path
) -> None:
    command = started("finetune.sh", tmp_path, "--seed", "7", has_deepspeed=has_deepspeed, **variables)
    assert re.match(expected, " ".join(command)), command
    assert command[-2:] == ["--seed", "7"]
    for word in command:
        if word.startswith(str(SCRIPTS)):
            assert Path(word).exists(), word
    assert "xformers" in " ".join(started("pretrain_xformers.sh", tmp_path, NUM_GPUS="1"))


@pytest.mark.parametrize(
    "variables", [{"SHARD": "zero4"}, {"ATTENTION": "fast"}, {"LAUNCHER": "slurm", "SHARD": "none"}]
)
def test_recipes_refuse_unknown_choices(variables: dict[str, str]) -> None:
    environment = {"PATH": "/usr/bin:/bin", "NUM_GPUS": "1", "PYTHON": sys.executable, **variables}
    command = ["bash", str(SCRIPTS / "finetune.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    name, value = next(iter(variables.items()))
    assert f"finetune.sh: error: {name} is '{value}'; known: " in done.stderr


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload", "fsdp2"])
def test_sharding_files(name: str) -> None:
    values = json.loads((SCRIPTS / f"{name}.json").read_text())
    if name == "fsdp2":
        assert values["version"] == 2
        return
    zero = values["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_param" in zero) == name.endswith("offload")
    # Rates, batches and precision are the command line's.
    assert {"optimizer", "scheduler"}.isdisjoint(values)
    assert values["train_batch_size"] == values["bf16"]["enabled"] == values["gradient_clipping"] == "auto"
    assert name == "zero2" or zero["stage3_gather_16bit_weights_on_model_save"]


# Configuration files


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_say_what_the_recipes_say(name: str, tmp_path: Path) -> None:
    assert {path.name for path in (SCRIPTS / "configs").iterdir()} >= set(CONFIGS)
    recipe = parsed(flags_of(started(CONFIGS[name], tmp_path, NUM_GPUS="1", SHARD="none")))
    config = parsed([str(SCRIPTS / "configs" / name)])
    for settings in (recipe, config):  # only a default for old scripts; spelled as a list there
        settings["lazy_preprocess"] = None
        settings["image_grid_pinpoints"] = re.findall(r"\d+", settings["image_grid_pinpoints"] or "")
    assert config == recipe


def test_a_configuration_runs_and_the_command_line_wins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"model:\n  model_name_or_path: {LLAVA}\n  version: v1\ndata:\n  data_path: train_data/finetune.json\n"
        f"  image_folder: images\nlearning_rate: 2e-5\nsave_strategy: no\nreport_to: [none]\nmax_steps: 5\n"
        f"evaluation_strategy: no\nwarmup_ratio: 0.5\nlr_scheduler_kwargs: {{}}\noutput_dir: {tmp_path / 'out'}\n"
    )
    trainer = train(argv=[str(file), "max_steps=1", "--learning_rate", "1e-3", "warmup_steps=0", "use_cpu=true"])
    assert (trainer.args.max_steps, trainer.args.learning_rate, trainer.args.warmup_steps) == (1, 1e-3, 0)
    assert (trainer.args.save_strategy.value, trainer.args.report_to) == ("no", [])
    assert (tmp_path / "out" / "config.json").is_file()


def test_print_config_can_be_run_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [str(SCRIPTS / "configs" / "finetune_v1_6.yaml"), "seed=7", "run_name=a: b #c", "--print-config"]
    with pytest.raises(SystemExit) as stopped:
        parse_train_args(words)
    assert stopped.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again, before = parsed([str(printed)]), parsed(words[:-1])
    assert again == before
    assert (again["seed"], again["run_name"]) == (7, "a: b #c")
    assert "  # lora_r: 64  (Rank of the adapters.)" in printed.read_text()


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("learning_rte: 1", [], "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ("training:\n  lora_rank: 1", [], "unknown key 'training.lora_rank'; did you mean"),
        ("training:\n  lora_r: 1\nlora_r: 2", [], "'lora_r' is given twice"),
        ("- 1", [], "holds no settings"),
        ("a: [", [], "is not YAML"),
        ("extends: c.yaml", [], "extends itself"),
        ("extends: absent.yaml", [], "absent.yaml"),
        ("lora_r: 1", ["lora_rr=2"], "unknown key 'lora_rr'; did you mean 'lora_r'?"),
        ("lora_r: many", [], "many"),
        ("lora_r: 1", ["more.yaml"], "cannot use 'more.yaml'"),
        ("global_batch_size: 6\nper_device_train_batch_size: 4\nuse_cpu: true", [], "multiple of 4"),
        ("global_batch_size: 8\ngradient_accumulation_steps: 3\nper_device_train_batch_size: 4\nuse_cpu: true", [], "give one"),
    ],
)  # fmt: skip
def test_mistakes_in_a_configuration(text: str, words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        parse_train_args([str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path), *words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_without_a_file_stay_as_they_are() -> None:
    words = ["--data_path", "a=b.json", "--lora_r", "3"]
    assert expand_config(words, {"data_path", "lora_r"}) == words


def test_values_with_signs_and_lists(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "data_path: [x.json, y.json]\nfsdp_config: {version: 2}\ngrid: [[1, 2]]\nmany: [a, b]\n"
    )
    flags = parse_flags(
        expand_config(
            [str(tmp_path / "c.yaml"), "--name", "a=b"], {"data_path", "fsdp_config", "grid", "many", "name"}, {"many"}
        )
    )
    assert {flag.name: flag.values for flag in flags} == {
        "data_path": ("x.json,y.json",),
        "fsdp_config": ('{"version": 2}',),
        "grid": ("[[1, 2]]",),
        "many": ("a", "b"),
        "name": ("a=b",),
    }


def test_an_empty_value_takes_the_default_again_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("eval_data_path: a.json\nlora_r: 8\nlora_alpha: 3\nseed: 1\n")
    (tmp_path / "c.yaml").write_text("extends: base.yaml\nlora_r: null\n")
    known = {"eval_data_path", "lora_r", "lora_alpha", "seed"}
    words = ["eval_data_path=null", "--lora_alpha", "~", "seed=7", "seed="]
    assert expand_config([str(tmp_path / "c.yaml"), *words], known) == []
    assert expand_config([str(tmp_path / "c.yaml"), *words, "lora_r=2"], known) == ["--lora_r", "2"]


def test_bash_is_here() -> None:
    assert shutil.which("bash")
