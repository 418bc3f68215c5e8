"""The stages of the embedded model's recipe (recipes/tiny): their commands, their order, and the GPUs that they share."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import build
import dataset
import photos
import presets
import pytest
from PIL import Image
from samples import Source
from tokenizer import build_tokenizer

from llava.conversation import conv_templates
from llava.images.layout import ImagePolicy
from llava.text.tokenization import load_tokenizer
from llava.train.arguments import parse_train_args
from llava.train.data import LazySupervisedDataset
from llava.train.packing import measured_lengths


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_command_of_the_recipe_parses(name: str) -> None:
    stages = build.plan_stages(presets.PRESETS[name], Path("/work"), Path("/fonts"), Path("/cifar"), 4)
    places = {stage.name: place for place, stage in enumerate(stages)}
    for stage in stages:
        assert all(places[need] < places[stage.name] for need in stage.needs)
        _, *words = stage.command
        if words[:2] == ["-m", "llava.train.train"]:
            on_cpu = words[2:]
            for flag in ("--bf16", "--tf32"):  # refused where there is no GPU for them
                if flag in on_cpu:
                    on_cpu[on_cpu.index(flag) + 1] = "False"
            model, data, training = parse_train_args(on_cpu)
            assert data.image_aspect_ratio == "pad"
            assert model.mm_vision_select_layer == -2
            assert training.packing
            assert model.tune_mm_mlp_adapter == (stage.name == "stage1")
        else:
            known = set(re.findall(r'"(--[a-z0-9-]+)"', Path(words[0]).read_text()))
            assert {word for word in words if word.startswith("--")} <= known, stage.name


@pytest.fixture(scope="module")
def stage_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few samples of each training stage, of the kinds and in the shares of the preset "full"."""
    folder = tmp_path_factory.mktemp("stages")
    for number, name in enumerate(photos.FOLDERS):
        (folder / "train" / name).mkdir(parents=True)
        Image.new("RGB", (photos.SIDE, photos.SIDE)).save(folder / "train" / name / f"{number}.png")
    words = (*presets.PRESETS["full"].dataset, *presets.PRESETS["full"].second)
    counts = {}
    for stage in ("pretrain", "finetune", "second"):
        full = dataset.parse_counts(words[words.index(f"--{stage}") + 1])
        counts[stage] = {kind: -(-number * 100 // sum(full.values())) for kind, number in full.items()}
    dataset.write_data(folder, counts, dataset.Options(None, folder, None, ".bmp"), workers=2)
    return folder


@pytest.fixture(scope="module")
def new_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, Source(None, photos.blank_photos()), num_samples=30)
    return folder


@pytest.mark.parametrize(
    ("stage", "data", "full"), [("stage1", "pretrain", 271), ("stage2", "finetune", 453), ("stage3", "second", 474)]
)
def test_a_packed_batch_holds_as_many_samples_as_the_learning_rates_were_chosen_for(
    stage: str, data: str, full: int, stage_data: Path, new_tokenizer: Path
) -> None:
    tokenizer = load_tokenizer(new_tokenizer, model_max_length=1024)
    tokenizer.pad_token = tokenizer.unk_token
    settings = SimpleNamespace(image_folder=str(stage_data / "images"), is_multimodal=True, mm_use_im_start_end=False)
    conv = conv_templates["plain" if stage == "stage1" else "v1"]
    samples = LazySupervisedDataset(str(stage_data / f"{data}.json"), tokenizer, settings, conv=conv)
    lengths = measured_lengths(samples, ImagePolicy("pad", tile_size=112, patch_size=14), stage_data / stage)
    per_row = 0.97 * 1024 / (sum(lengths) / len(lengths))  # so full are rows of a large set
    for name, wanted, within in (("full", full, 0.1), ("trial", 258, 0.1), ("check", 63, 0.2)):
        words = getattr(presets.PRESETS[name], stage)
        rows = int(words[words.index("--per_device_train_batch_size") + 1])
        assert rows * per_row == pytest.approx(wanted, rel=within)


def test_stages_run_as_soon_as_they_can_and_a_broken_run_goes_on(tmp_path: Path) -> None:
    """Two of them each wait until the other has begun; a third needs both and fails once."""

    def stage(name: str, program: str, *needs: str, side: bool = False) -> build.Stage:
        finish = f"(here / '{name}').write_text('done')"
        begin = "import pathlib, sys, time; here = pathlib.Path(sys.argv[1])"
        return build.Stage(
            name, [sys.executable, "-c", f"{begin}\n{program}\n{finish}", str(tmp_path)], tmp_path / name, needs, side
        )

    meet = "(here / '{}.begun').touch()\nwhile not (here / '{}.begun').exists(): time.sleep(0.01)"
    print_one = 'print(\'{"stage": "last"}\')'
    stages = [
        stage("first", "", side=True),
        stage("beside", meet.format("beside", "main"), "first", side=True),
        stage("main", meet.format("main", "beside")),
        stage("last", "assert (here / 'main').exists() and (here / 'beside').exists()\nsys.exit(3)", "main", "beside"),
        stage("never", "", "last"),
    ]
    log = tmp_path / "log.jsonl"
    assert build.run(stages, log, ("0",)) == 3
    assert not (tmp_path / "never").exists()
    for name in ("first", "beside", "main"):  # which would fail if they ran again
        stages[[each.name for each in stages].index(name)] = stage(name, "sys.exit(1)")
    stages[3] = stage("last", print_one, "main", "beside")
    assert build.run(stages, log, ("0",)) == 0
    assert (tmp_path / "never").exists()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"stage": "last"} in lines
    assert [line["stage"] for line in lines if "seconds" in line][-2:] == ["last", "never"]


def test_stages_share_the_gpus_and_training_takes_all_of_them(tmp_path: Path) -> None:
    """Two wait until the other has begun, and a third, for which there is no GPU, finds the results of both."""
    gpus = "import os; gpus = os.environ['CUDA_VISIBLE_DEVICES']"
    wait = f"""
import pathlib, sys, time; here, own, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]; {gpus}
(here / ("begun" + own)).write_text("")
until = time.time() + 60
while not (here / ("begun" + other)).exists() and time.time() < until: time.sleep(0.01)
(here / own).write_text(gpus)
"""
    last = f"import sys; {gpus}; open(sys.argv[1] + '/last', 'w').write(gpus)"

    def stage(name: str, program: str, *words: str, needs: tuple[str, ...] = (), spread: bool = False) -> build.Stage:
        return build.Stage(
            name, [sys.executable, "-c", program, str(tmp_path), *words], tmp_path / name, needs, spread=spread
        )

    stages = [
        stage("one", wait, "one", "two"), stage("two", wait, "two", "one"), stage("last", last, needs=("one",), spread=True)
    ]  # fmt: skip
    assert build.run(stages, tmp_path / "log.jsonl", ("2", "5")) == 0
    assert [(tmp_path / name).read_text() for name in ("one", "two", "last")] == ["2", "5", "2,5"]


def test_a_light_stage_shares_its_gpu() -> None:
    def stage(name: str, **how: bool) -> build.Stage:
        return build.Stage(name, [], Path(name), **how)

    light, other = stage("light", light=True), stage("other")
    assert build.startable([light, other], [], ["0"], 1) == [(light, ("0",)), (other, ("0",))]
    assert build.startable([light, other], [], ["0", "1"], 2) == [(light, ("0",)), (other, ("1",))]
    assert build.startable([other, light], [], ["0"], 1) == [(other, ("0",))]


def test_a_run_that_is_ended_takes_its_stages_along(tmp_path: Path) -> None:
    held, log = tmp_path / "held", tmp_path / "one.log"
    hold = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True)"
    program = f"""
import sys, build
from pathlib import Path
command = [sys.executable, "-c", {hold + "; time.sleep(120)"!r}, {str(held)!r}]
build.plan_stages = lambda *_: [build.Stage("one", command, Path("never"))]
build.main(["--work", {str(tmp_path)!r}, "--cifar", "."])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parent)}
    run = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    assert log.read_text() == "held\n"
    run.terminate()
    assert run.communicate(timeout=60)[1] == "ended by a signal; the same command goes on from here\n"
    assert run.returncode == 1
    with held.open() as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            else:
                return
    raise AssertionError("the stage goes on")


def test_a_batch_s_rows_are_divided_among_gpus(capsys: pytest.CaptureFixture) -> None:
    def rows(num_gpus: int) -> list[str]:
        stages = build.plan_stages(presets.PRESETS["full"], *map(Path, ("/work", "/fonts", "/cifar")), 4, num_gpus)
        commands = [stage.command for stage in stages if stage.spread]
        assert all(str(num_gpus) in command for command in commands)
        return [command[command.index("--per_device_train_batch_size") + 1] for command in commands]

    assert [rows(num_gpus) for num_gpus in (2, 4)] == [["12", "40", "30"], ["6", "20", "15"]]
    with pytest.raises(SystemExit, match="a batch of 24 rows cannot be divided among 5 GPUs"):
        rows(5)


def test_a_stage_that_leaves_no_result_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stage = build.Stage("empty", [sys.executable, "-c", ""], tmp_path / "nothing")
    assert build.run([stage], tmp_path / "log.jsonl", ("0",)) == 1
    assert "[empty] left no" in capsys.readouterr().out
