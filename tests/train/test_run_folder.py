"""The folder of a run: resumed by the same run only, never overwritten, and with what a reader needs beside the weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_data import HERE, golden
from train_kit import LLAVA, argv

from llava.__main__ import main as llava
from llava.errors import InputError
from llava.files import read_json
from llava.model.builder import load
from llava.train.run_folder.record import _check_partitions, open_run_folder
from llava.train.train import main, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def rates(folder: Path) -> dict[int, float]:
    history = read_json(folder / "trainer_state.json")["log_history"]
    return {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of four steps with a checkpoint at each second."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    before = Path.cwd()
    os.chdir(HERE)
    try:
        train(argv=argv(folder, **SETTINGS))
    finally:
        os.chdir(before)
    return folder


SETTINGS: dict[str, Any] = {
    "lora_enable": True,
    "lora_r": 4,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0,
    "learning_rate": "1e-3",
}


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lora_r": 8}, "lora_r 8 (before: 4)"),
        ({"seed": 1}, "seed 1 (before: 42)"),
        ({"version": "plain"}, "version 'plain' (before: 'v1')"),
        ({"per_device_train_batch_size": 1}, "samples_per_step 1 (before: 2)"),
        ({"data_path": "train_data/pretrain.json"}, "data_path 'train_data/pretrain.json'"),
        ({"model": "checkpoints/vicuna-tiny-base"}, "model_name_or_path 'checkpoints/vicuna-tiny-base'"),
        ({"max_steps": 4}, "is finished"),
        ({"max_steps": 2}, "the checkpoint is at step 4, and this run ends at step 2"),
    ],
)
def test_another_run_does_not_touch_the_folder(
    run: Path, changed: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def kept() -> dict[str, bytes]:
        return {name: content for name, content in snapshot(run).items() if name not in ("run.json", "train.log")}

    before = kept()
    assert main(argv(run, **{**SETTINGS, **changed})) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "Traceback" not in said
    assert kept() == before


def test_the_same_data_in_another_place_are_the_same_run(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.json"
    shutil.copy(golden("train_data/finetune.json"), moved)
    train(argv=argv(run, **{**SETTINGS, "max_steps": 6, "data_path": moved}))
    assert read_json(run / "trainer_state.json")["global_step"] == 6


def test_changed_data_under_the_same_name_are_another_run(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    rows = read_rows(golden("train_data/finetune.json"))
    data.write_text(json.dumps(rows))
    train(argv=argv(tmp_path / "run", **{**SETTINGS, "data_path": data}))
    rows[0]["conversations"][1]["value"] += "!"
    data.write_text(json.dumps(rows))
    with pytest.raises(InputError, match="with another content"):
        train(argv=argv(tmp_path / "run", **{**SETTINGS, "data_path": data, "max_steps": 6}))


def read_rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def test_a_new_rate_counts_when_a_run_goes_on(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(argv=argv(run, **{**SETTINGS, "max_steps": 8, "learning_rate": "1e-5", "weight_decay": 0.1}))
    assert "learning_rate 1e-05 (before: 0.001)" in caplog.text
    assert "weight_decay 0.1 (before: 0.0)" in caplog.text
    assert rates(run)[6] == pytest.approx(1e-5 * 3 / 8)  # the rate of the sixth of eight steps, falling to zero
    state = torch.load(run / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["param_groups"]} <= {0.1, 0.0}
    assert 0.1 in {group["weight_decay"] for group in state["param_groups"]}


def test_weights_without_the_optimizers_state_are_named_and_the_schedule_goes_on(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("optimizer.pt", "scheduler.pt"):
        (run / "checkpoint-4" / name).unlink()
    train(argv=argv(run, **{**SETTINGS, "max_steps": 8}))
    assert "checkpoint-4 holds no state of the optimizer" in caplog.text
    assert rates(run)[5] == pytest.approx(1e-3 * 4 / 8)


def test_a_rate_that_was_lowered_on_the_way_stays_lowered(tmp_path: Path) -> None:
    def settings(steps: int) -> list[str]:
        plateau = {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": '{"factor": 0.5, "patience": 0, "threshold": 10}',
        }
        validation = {"eval_data_path": "train_data/finetune.json", "evaluation_strategy": "steps", "eval_steps": 2}
        # No validation is ten times better than the best one, so each lowers the rate.
        return argv(tmp_path, **{**SETTINGS, **plateau, **validation, "learning_rate": "1e-3", "max_steps": steps})

    train(argv=settings(6))
    lowered = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"][0]["lr"]
    assert lowered < 1e-3
    train(argv=settings(8))
    assert rates(tmp_path)[7] == pytest.approx(lowered)


def test_a_result_of_something_else_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    assert main(argv(tmp_path)) == 2
    assert "holds another result already (model.safetensors)" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_a_run_that_failed_before_its_first_checkpoint_leaves_the_folder_free(tmp_path: Path) -> None:
    assert main(argv(tmp_path, data_path="train_data/nowhere.json")) == 2
    assert main(argv(tmp_path)) == 0


def _hold(folder: str, ready: Any, done: Any) -> None:
    from llava.train.arguments import parse_train_args

    with open_run_folder(*parse_train_args(argv(folder))):
        ready.set()
        done.wait(60)


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    other.start()
    try:
        assert ready.wait(60)
        assert main(argv(tmp_path)) == 2
        assert "another run is writing to" in capsys.readouterr().err
    finally:
        done.set()
        other.join()
    assert main(argv(tmp_path)) == 0
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("kind", ["lora", "projector", "model"])
def test_the_last_lines_name_commands_that_work(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"lora": {"lora_enable": True, "lora_r": 4}, "projector": {"tune_mm_mlp_adapter": True}, "model": {}}[kind]
    settings = {"eval_data_path": "train_data/finetune.json", "evaluation_strategy": "epoch", "max_steps": 2, **flags}
    assert main(argv(tmp_path / "result", **settings)) == 0
    lines = capsys.readouterr().out.splitlines()
    position = next(number for number, line in enumerate(lines) if line.startswith(str(tmp_path / "result")))
    assert "2 steps" in lines[position]
    commands = [shlex.split(line) for line in lines if line.startswith("  llava ")]
    assert [words[1] for words in commands] == ["chat", "serve", "merge" if kind == "lora" else "doctor"]
    for words in commands:
        if words[1] != "serve":  # which does not end
            status = llava(words[1:])
            assert status == 0 or words[1] == "doctor", words  # random weights have findings
    card = (tmp_path / "result" / "README.md").read_text()
    assert "| learning_rate | `0.002` |" in card
    assert (tmp_path / "result" / "loss.svg").read_text().startswith("<svg")
    assert "step 2/2" in (tmp_path / "result" / "train.log").read_text()


def test_bad_samples_that_were_passed_over_do_not_spoil_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last lines ask about a sample of the data: one that can be read."""
    rows: list[Any] = ["no sample", {"id": "gone", "image": "gone.png", "conversations": []}]
    lost = {"id": "lost", "image": "lost.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}] * 2}
    (tmp_path / "data.json").write_text(json.dumps([*rows, lost, *read_rows(golden("train_data/finetune.json"))]))
    run = argv(tmp_path / "result", data_path=tmp_path / "data.json", on_bad_sample="skip", max_steps=2)
    assert main(run) == 0
    (asked,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  llava chat ")]
    assert Path(shlex.split(asked)[4]).is_file()
    assert read_json(tmp_path / "result" / "run.json")["finished"]


def test_adapter_and_base_are_found_from_anywhere_and_when_they_move_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(golden(LLAVA), home / "base")
    shutil.copytree(golden("checkpoints/vision"), home / "checkpoints" / "vision")
    for name in ("train_data", "images"):
        (home / name).symlink_to(HERE / name)
    monkeypatch.chdir(home)
    train(argv=argv("outputs/adapter", model="base", lora_enable=True, lora_r=4))
    monkeypatch.chdir(HERE)
    before = load(home / "outputs" / "adapter", device="cpu").model
    (tmp_path / "elsewhere").mkdir()
    shutil.move(home / "base", tmp_path / "elsewhere" / "base")
    shutil.move(home / "outputs", tmp_path / "elsewhere" / "outputs")
    after = load(tmp_path / "elsewhere" / "outputs" / "adapter", device="cpu").model
    for (name, first), (_, second) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.slow
def test_machines_with_disks_of_their_own_agree_on_the_checkpoint_or_stop(finished: Path, tmp_path: Path) -> None:
    first, second = shutil.copytree(finished, tmp_path / "first"), tmp_path / "second"
    second.mkdir()
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from llava.train.train import main\n"
        f"folders = [{str(first)!r}, {str(second)!r}]\n"
        "sys.exit(main([*sys.argv[1:], '--output_dir', folders[int(os.environ['RANK'])]]))\n"
    )
    words = argv("unused", **{**SETTINGS, "max_steps": 6, "per_device_train_batch_size": 1})
    words = words[: words.index("--output_dir")] + words[words.index("--output_dir") + 2 :]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29577"]
    ended = subprocess.run(
        [*launch, str(program), *words], capture_output=True, text=True, timeout=240, cwd=HERE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode != 0
    assert re.search(r"the machines see different checkpoints .*checkpoint-4.*none", ended.stderr)


def test_partitions_of_another_number_of_processes_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2" / "global_step2"
    folder.mkdir(parents=True)
    for rank in range(2):
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    alone: Any = SimpleNamespace(deepspeed="zero3.json", world_size=1)
    with pytest.raises(InputError, match="was written by 2 processes, and this run has 1"):
        _check_partitions(folder.parent, alone)
    _check_partitions(folder.parent, SimpleNamespace(deepspeed="zero3.json", world_size=2))  # type: ignore[arg-type]
    _check_partitions(folder.parent, SimpleNamespace(deepspeed=None, world_size=1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--neftune_noise_alpha 5", "images and text are joined after the embedding layer"),
        ("--use_liger_kernel True", "liger-kernel"),
        ("--optim galore_adamw --optim_target_modules q_proj", "galore"),
        ("--optim schedule_free_adamw", "schedulefree"),
        ("--report_to mlflow", "'mlflow'"),
        ("--report_to swanlab", "'swanlab'"),
        ("--push_to_hub True --hub_model_id someone/something", "the hub cannot be used"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_sentence(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*argv(tmp_path / "run"), *words.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llava train: error:")
    assert said in error


def test_a_batch_that_does_not_fit_is_halved_where_the_user_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    monkeypatch.chdir(HERE)
    step, sizes = Trainer.training_step, []

    def short_of_memory(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", short_of_memory)
    words = argv(tmp_path, per_device_train_batch_size=8, auto_find_batch_size=True, max_steps=1)
    assert main(words) == 0
    assert sizes[0] == 8
    assert sizes[-1] <= 2
