"""Errors of `llava convert` as a process: one sentence, and no files left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_kit import environment, run_llava, run_python
from golden_data import HERE, golden
from safetensors.torch import load_file, save_file
from tiny import build

from llava.assets import embedded_model_path
from llava.convert.convert import ConversionOptions, convert
from llava.model.builder import load
from llava.model.checkpoints.inspect import inspect

V15 = "checkpoints/llava-v1.5-tiny-vicuna"


def without_shard(folder: Path) -> Path:
    shutil.copytree(golden("checkpoints/llava-v1.5-tiny-vicuna"), folder)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    return folder


def with_config(folder: Path, **changes: object) -> Path:
    build(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


def with_another_projector(folder: Path) -> Path:
    build(folder)
    state = load_file(folder / "model.safetensors")
    state["model.mm_projector.0.weight"] = torch.zeros(64, 48)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def not_a_checkpoint(folder: Path, file: str = "notes.txt") -> Path:
    folder.mkdir()
    (folder / file).write_text("x")
    return folder


# What is given, the flags, and what the sentence says. The first are told from headers alone, without torch.
BAD: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no such folder": (lambda folder: folder / "absent", ["--to", "original"], "there is no model folder"),
    "not a checkpoint": (not_a_checkpoint, ["--to", "original"], "holds no config.json"),
    "an empty GGUF file": (
        lambda folder: not_a_checkpoint(folder, "model-f16.gguf"),
        ["--to", "original"],
        "is not a GGUF file",
    ),
    "a missing shard": (without_shard, ["--to", "transformers"], "pytorch_model-00002-of-00003.bin, which does not exist"),
    "a language model": (lambda _: "checkpoints/vicuna-tiny-base", ["--to", "gguf"], "without a vision tower (llama)"),
    "a projector that does not fit": (
        with_another_projector,
        ["--to", "original"],
        "'model.mm_projector.0.weight' has shape [64, 48], expected [64, 32]",
    ),
    "a tower that is not there": (
        lambda folder: with_config(folder, mm_vision_tower="gone", unfreeze_mm_vision_tower=False),
        ["--to", "original"],
        "the vision tower 'gone' was not found",
    ),
    "a tower of another size": (
        lambda folder: (with_config(folder), (folder / "tower/config.json").write_text(
            (folder / "tower/config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 48')
        ), folder)[-1],
        ["--to", "transformers"],
        "expected [48",
    ),
    "an unknown architecture": (
        lambda folder: with_config(folder, model_type="llava_nothing"),
        ["--to", "original"],
        "no causal language model of type 'nothing'",
    ),
    "a base that is missing": (
        lambda _: "checkpoints/llava-v1.5-tiny-pretrain",
        ["--to", "original", "--base", "absent"],
        "there is no base model folder 'absent'",
    ),
    "a layout that lacks a projector": (
        lambda _: "checkpoints/llava-v1-tiny-linear",
        ["--to", "transformers"],
        "the transformers layout cannot express a projector of type 'linear'",
    ),
    "a layout that lacks a language model": (
        lambda _: "checkpoints/llava-tiny-mpt",
        ["--to", "gguf"],
        "the gguf layout cannot express a language model of type 'mpt'",
    ),
    "a layout that lacks a way of merging": (
        lambda folder: build(folder, image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56]]),
        ["--to", "transformers"],
        "cannot express tiles joined by mm_patch_merge_type 'flat'",
    ),
    "another base": (
        lambda folder: build(folder),
        ["--to", "delta", "--base", "checkpoints/vicuna-tiny-base"],
        "it is another base",
    ),
    "no base": (lambda _: V15, ["--to", "delta"], "--to delta needs the base model's folder"),
    "an unknown layout": (lambda _: V15, ["--to", "onnx"], "invalid choice: 'onnx'"),
    "a size": (lambda _: V15, ["--to", "original", "--shard-size", "much"], "the size 'much' is not a number of bytes"),
}  # fmt: skip


# Runs several command lines one after another as the program does, and says of each how it ended and what it printed.
SERIES = """
import contextlib, io, json, sys
from llava.__main__ import main
results = {}
for case, words in json.loads(sys.stdin.read()).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as stopped:
            status = stopped.code
    results[case] = [status, out.getvalue(), err.getvalue()]
print("RESULTS", json.dumps(results))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, list[Path]]]:
    """Every bad command line, run in one process that is not this one: status, stdout, stderr, what is in the folder."""
    commands, folders = {}, {}
    for number, (case, (make, flags, _)) in enumerate(BAD.items()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        folders[case] = folder / "out"
        folders[case].mkdir()
        with contextlib.chdir(HERE):
            source = make(folder / "source")
        commands[case] = ["convert", str(source), str(folders[case] / "target"), *flags]
    done = run_python("-c", SERIES, stdin=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.rsplit("RESULTS", 1)[1])
    return {case: (*result, list(folders[case].iterdir())) for case, result in results.items()}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_and_nothing_written(case: str, ended: dict[str, tuple[int, str, str, list[Path]]]) -> None:
    status, out, err, left = ended[case]
    assert status == 2, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("llava convert: error: ")
    assert BAD[case][2] in line
    assert "Traceback" not in err
    assert (out, left) == ("", [])


@pytest.mark.parametrize("case", ["no such folder", "not a checkpoint", "a missing shard", "no base", "a size"])
def test_errors_in_headers_are_raised_without_torch(case: str, tmp_path: Path) -> None:
    make, flags, sentence = BAD[case]
    words = ["convert", str(make(tmp_path / "source")), str(tmp_path / "target"), *flags]
    done = child(f"import sys; from llava.__main__ import main; print(main({words!r}), 'torch' in sys.modules)")
    assert done.stdout.split() == ["2", "False"]
    assert sentence in done.stderr


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("kept")
    done = run_llava("convert", V15, str(tmp_path / "there"), "--to", "original")
    assert (done.returncode, "exists; name a new folder" in done.stderr) == (2, True)
    assert (tmp_path / "there" / "mine.txt").read_text() == "kept"
    done = run_llava("convert", V15, str(tmp_path / "no" / "parent"), "--to", "original")
    assert (done.returncode, "to write 'parent' into" in done.stderr) == (2, True)


# Disks and kills

PROGRAM = "import sys; from llava.__main__ import main; sys.exit(main({words!r}))"


def child(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )  # type: ignore[call-overload]


def test_a_disk_that_is_full_in_the_middle(tmp_path: Path) -> None:
    words = ["convert", str(embedded_model_path()), str(tmp_path / "out" / "target"), "--to", "transformers"]
    (tmp_path / "out").mkdir()
    done = child(
        PROGRAM.format(words=words),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**7, 2 * 10**7)),
    )
    assert done.returncode == 2, done.stderr
    assert "its disk is full or limited" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_too_small_from_the_start(tmp_path: Path) -> None:
    words = ["convert", str(embedded_model_path()), str(tmp_path / "target"), "--to", "original"]
    patch = "import shutil, collections; Usage = collections.namedtuple('Usage', 'total used free')\n"
    patch += "shutil.disk_usage = lambda path: Usage(10**9, 10**9 - 10**6, 10**6)\n"
    done = child(patch + PROGRAM.format(words=words))
    assert done.returncode == 2, done.stderr
    assert re.search(r"takes 0\.0\d GiB and the disk has 0\.00 GiB free", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["writing", "proving"])
def test_killed_in_the_middle(moment: str, tmp_path: Path) -> None:
    """What a killed conversion leaves is no checkpoint under the target's name."""
    target = tmp_path / "target"
    words = ["convert", str(embedded_model_path()), str(target), "--to", "original", "--proof", "tensors"]
    die = f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    patches = {
        "writing": f"import os, llava.convert.writer as w\nold = w.ByteProgress.update\ndef add(self, n):\n    old(self, n)\n"
        f"    self.seen = getattr(self, 'seen', 0) + n\n    if self.seen > 10**7: {die}\nw.ByteProgress.update = add\n",
        "proving": f"import os, llava.convert.layouts.original as o\no.verify_folder = lambda *a, **k: {die}\n",
    }
    done = child(patches[moment] + PROGRAM.format(words=words))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert left.name == "incomplete-target"
    if moment == "writing":
        with pytest.raises(ValueError, match=r"config\.json"):
            inspect(left)
    with contextlib.chdir(HERE):  # the next conversion clears it away
        convert(embedded_model_path(), target, to="original", options=ConversionOptions(verification="tensors"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]
    assert load(target, device="cpu").conv_mode == "v1"


def test_a_keyboard_interrupt(tmp_path: Path) -> None:
    words = ["convert", str(embedded_model_path()), str(tmp_path / "target"), "--to", "original"]
    patch = (
        "import llava.convert.writer as w\ndef stop(self, n): raise KeyboardInterrupt\nw.ByteProgress.update = stop\n"
    )
    done = child(patch + PROGRAM.format(words=words))
    assert (done.returncode, done.stderr) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_what_a_finished_conversion_prints(tmp_path: Path) -> None:
    done = run_llava("convert", V15, str(tmp_path / "theirs"), "--to", "transformers")
    assert done.returncode == 0, done.stderr
    first, second, third, fourth, *_ = done.stdout.splitlines()
    assert first.startswith(f"wrote {tmp_path / 'theirs'}: transformers layout")
    assert second == "compared 80 tensors both ways: largest difference 0"
    assert third.startswith(
        "compared logits of a sample with an image in float32: largest difference 0 at a magnitude of"
    )
    assert fourth == "compared prompt and ids of the sample: equal; pixels: largest difference 0"
    assert os.listdir(tmp_path) == ["theirs"]
