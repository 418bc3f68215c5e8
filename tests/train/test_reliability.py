"""Runs that are killed, stopped, starved of disk, or left with damaged checkpoints: what they end with is what counts.

Runs happen in child processes and are ended for real: by SIGKILL at any moment and in the middle of writing, by SIGTERM, by
a limit on file sizes, by a file system that is full.
"""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE
from safetensors.torch import load_file
from train_kit import argv

from llava.train.callbacks import ConsoleCallback
from llava.train.llava_trainer import LLaVATrainer
from llava.train.run_folder import checkpoints
from llava.train.run_folder.checkpoints import checkpoint_fault, latest_checkpoint, list_checkpoints
from llava.train.train import main

STEPS = 6
# An epoch has four steps, so that one ends inside the run; validation must not disturb it either.
FLAGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_data_path": "train_data/finetune.json",
    "evaluation_strategy": "steps",
    "eval_steps": 4,
}
PAUSE = 0.15  # seconds a step is made to take where a signal has to arrive in the middle of a run


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


class Child:
    """A run in a process of its own; what it prints is in `log`."""

    def __init__(self, words: list[str], log: Path, prepare: Callable[[], None] | None = None) -> None:
        self.log = log
        log.write_text("")
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
                sys.stdout = sys.stderr = log.open("a", buffering=1)
                torch.set_num_threads(1)
                if prepare is not None:
                    prepare()
                status = main(words)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), f"ended too early: {self.log.read_text()}"
            time.sleep(0.01)


def slow_steps() -> None:
    step = LLaVATrainer.training_step

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE)
        return step(self, *args, **kwargs)

    LLaVATrainer.training_step = slow  # type: ignore[method-assign]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder: Path, expected: Path) -> None:
    found, wanted = weights_in(folder), weights_in(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(("incomplete-", "deleted-"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("whole")
    # In a process like those of the runs it is compared with: sums come out differently with other numbers of threads.
    child = Child(argv(folder / "run", **FLAGS), folder / "log", lambda: os.chdir(HERE))
    assert child.wait() == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(whole: Path, tmp_path: Path) -> None:
    words, log = argv(tmp_path / "run", **FLAGS), tmp_path / "log"
    moment = random.Random()
    for step in (1, 3, 4):  # the last leaves the run more to do than the longest delay
        child = Child(words, log, slow_steps)
        child.wait_for((tmp_path / "run" / f"checkpoint-{step}").is_dir)
        delay = moment.uniform(0, 1.5 * PAUSE)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() in (-signal.SIGKILL, 0)  # a busy machine may let the run end before the signal is sent
    assert Child(words, log).wait() == 0, log.read_text()
    assert_same_weights(tmp_path / "run", whole)
    assert leftovers(tmp_path / "run") == []


@pytest.mark.parametrize("step", [3, 4, 5])
def test_going_on_inside_and_at_the_end_of_an_epoch(step: int, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert Child(argv(tmp_path, **FLAGS), tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    assert_same_weights(tmp_path, whole)


def test_packed_rows_are_the_same_after_a_stop(tmp_path: Path) -> None:
    flags = FLAGS | {"packing": True, "model_max_length": 256, "per_device_train_batch_size": 1}
    runs = tmp_path / "whole", tmp_path / "resumed"
    assert Child(argv(runs[0], **flags), tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    shutil.copytree(runs[0] / "checkpoint-2", runs[1] / "checkpoint-2")
    assert Child(argv(runs[1], **flags), tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    assert_same_weights(*runs)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(name: str, step: int) -> Callable[[], None]:
    """Half of a file of `checkpoint-<step>` reaches the disk, then the process is gone."""

    def prepare() -> None:
        save = torch.save

        def half(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(value, file, *args, **kwargs)
            if Path(file).name == name and Path(file).parent.name == f"checkpoint-{step}":
                os.truncate(file, Path(file).stat().st_size // 2)
                die()

        torch.save = half

    return prepare


def die_before_rename(name: str) -> Callable[[], None]:
    def prepare() -> None:
        rename = os.rename

        def watched(source: Any, target: Any) -> None:
            if Path(target).name == name:
                die()
            rename(source, target)

        checkpoints.os.rename = watched  # type: ignore[attr-defined]

    return prepare


def die_while_deleting(name: str) -> Callable[[], None]:
    def prepare() -> None:
        remove = shutil.rmtree

        def half(folder: Any, *args: Any, **kwargs: Any) -> None:
            if Path(folder).name == name and Path(folder).is_dir():
                (Path(folder) / "trainer_state.json").unlink()
                die()
            remove(folder, *args, **kwargs)

        checkpoints.shutil.rmtree = half  # type: ignore[attr-defined]

    return prepare


@pytest.mark.parametrize(
    ("prepare", "newest"),
    [
        (die_while_writing("optimizer.pt", 3), 2),
        (die_before_rename("checkpoint-3"), 2),
        (die_while_deleting("deleted-checkpoint-2"), 3),
    ],
    ids=["writing", "renaming", "deleting"],
)
def test_killed_while_saving(prepare: Callable[[], None], newest: int, whole: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = argv(run, **FLAGS, save_total_limit=1)
    assert Child(words, log, prepare).wait() == -signal.SIGKILL
    assert [folder.name for folder in list_checkpoints(run)] == [f"checkpoint-{newest}"]
    assert len(leftovers(run)) == 1
    assert latest_checkpoint(run) == run / f"checkpoint-{newest}"
    assert Child(words, log).wait() == 0, log.read_text()
    assert leftovers(run) == []
    assert_same_weights(run, whole)
    assert [folder.name for folder in list_checkpoints(run)] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_ends(number: int, status: int, whole: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = argv(run, **FLAGS | {"save_strategy": "no"})
    child = Child(words, log, slow_steps)
    child.wait_for(lambda: "step 2/" in log.read_text())
    os.kill(child.pid, number)
    assert child.wait() == status, log.read_text()
    (saved,) = list_checkpoints(run)
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith(f"llava train: stopped by {signal.Signals(number).name} after step ")
    assert saved.name in last
    assert not (run / "model.safetensors").exists()  # the result of half a run is none
    assert Child(words, log).wait() == 0, log.read_text()
    assert_same_weights(run, whole)


def test_a_run_under_nohup_is_not_stopped_by_the_end_of_its_terminal(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"

    def ignore_and_slow() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        slow_steps()

    child = Child(argv(run, **FLAGS | {"save_strategy": "no"}), log, ignore_and_slow)
    child.wait_for(lambda: "step 2/" in log.read_text())
    os.kill(child.pid, signal.SIGHUP)
    assert child.wait() == 0, log.read_text()
    assert (run / "model.safetensors").is_file()


def test_lines_for_a_terminal_that_is_gone_do_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    ConsoleCallback(bar=False).write("step 1/2")


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The limit lets small files pass; the error comes from whichever library writes the first large one."""
    run, log = tmp_path / "run", tmp_path / "log"
    assert Child(argv(run, **FLAGS | {"max_steps": 1}), log).wait() == 0

    def limit() -> None:
        size = (run / "checkpoint-1" / "model.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    assert Child(argv(run, **FLAGS | {"max_steps": 2}, save_total_limit=1), log, limit).wait() == 2
    error = log.read_text().strip().splitlines()[-1]
    assert error.startswith("llava train: error: cannot write checkpoint-2: the disk of ")
    assert "checkpoint-1 is complete" in error
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-1"]
    assert leftovers(run) == []
    assert latest_checkpoint(run) is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


def test_a_full_disk(whole: Path, small_disk: Path, tmp_path: Path) -> None:
    log, run = tmp_path / "log", small_disk / "run"
    size = sum(file.stat().st_size for file in (whole / "checkpoint-1").iterdir())
    subprocess.run(["mount", "-o", f"remount,size={int(1.6 * size)}", str(small_disk)], check=True)
    words = argv(run, **FLAGS, save_total_limit=1)
    assert Child(words, log).wait() == 2, log.read_text()
    error = log.read_text().strip().splitlines()[-1]
    assert error.startswith("llava train: error: cannot write checkpoint-2: the disk of ")
    assert latest_checkpoint(run) == run / "checkpoint-1"
    assert leftovers(run) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert Child(words, log).wait() == 0, log.read_text()
    assert_same_weights(run, whole)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("model.safetensors", cut, "model.safetensors is cut off"),
        ("model.safetensors", Path.unlink, "no weights"),
        ("optimizer.pt", cut, "optimizer.pt is cut off"),
        ("scheduler.pt", cut, "scheduler.pt is cut off"),
        ("rng_state.pth", cut, "rng_state.pth is cut off"),
        ("trainer_state.json", cut, "trainer_state.json cannot be read"),
        ("trainer_state.json", Path.unlink, "no trainer_state.json"),
    ],
)
def test_damaged_checkpoints_are_passed_over(
    name: str, damage: Callable[[Path], None], fault: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 3):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert checkpoint_fault(tmp_path / "checkpoint-3") is None
    damage(tmp_path / "checkpoint-3" / name)
    assert fault in str(checkpoint_fault(tmp_path / "checkpoint-3"))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-3" in caplog.text
    assert fault in caplog.text


def test_a_missing_shard_is_noticed(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(whole / "checkpoint-2", folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model-00002-of-00002.safetensors is missing" in str(checkpoint_fault(folder))


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(whole / "checkpoint-3", folder)
    cut(folder / "optimizer.pt")
    for named in (folder, True):
        assert main(argv(tmp_path, **FLAGS, resume_from_checkpoint=named)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "optimizer.pt is cut off" in error or "holds no complete checkpoint" in error
