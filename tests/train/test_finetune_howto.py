"""docs/finetune.md: its commands run as they stand there and teach the embedded model what they promise; the plot, the
sample set and the excerpts are what the committed programs make."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from llava.__main__ import main as llava
from llava.assets import embedded_model_path
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import LoadedModel, load

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
LOGOS = ROOT / "playground" / "logos"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@torch.inference_mode()
def answers(loaded: LoadedModel) -> dict[str, str]:
    """What a model says to every image that was kept apart."""
    found = {}
    for row in json.loads((LOGOS / "test.json").read_text()):
        conv = conv_templates[loaded.conv_mode].copy()
        conv.append_message(conv.roles[0], row["conversations"][0]["value"])
        conv.append_message(conv.roles[1], None)
        ids = tokenizer_image_token(conv.get_prompt(), loaded.tokenizer, return_tensors="pt")[None]
        image = Image.open(LOGOS / "images" / row["image"])
        pixels = process_images([image], loaded.image_processor, loaded.model.config)
        tokens = loaded.model.generate(ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=24)
        found[row["id"]] = loaded.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    return found


def num_right(said: dict[str, str]) -> int:
    wanted = {row["id"]: row["conversations"][1]["value"] for row in json.loads((LOGOS / "test.json").read_text())}
    return sum(said[name] == answer for name, answer in wanted.items())


@pytest.mark.slow
def test_the_commands_teach_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("llava", "playground"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    install, *commands = [shlex.split(line) for line in blocks("bash")[0].splitlines()]
    assert install[:2] == ["pip", "install"]
    assert [words[1] for words in commands] == ["data", "data", "train", "merge", "chat"]
    printed: dict[str, Any] = {}
    for words in commands:
        assert words[0] == "llava"
        assert llava(words[1:]) == 0, words
        printed[" ".join(words[1:3])] = capsys.readouterr().out
    assert "48 samples" in printed["data check"]
    assert "no faults" in printed["data check"]
    for line in blocks("text")[0].splitlines():  # the excerpt shown of a sample
        assert line in printed["data show"]
    assert printed["chat -m"] == "This is the logo of Norda.\n"

    before = load(embedded_model_path(), device="cpu")
    assert num_right(answers(before)) == 0
    after = answers(load(tmp_path / "outputs" / "logos", device="cpu"))
    assert num_right(after) >= 12, after  # 16 where the page was written; another machine rounds otherwise
    history = json.loads((tmp_path / "outputs" / "logos-lora" / "trainer_state.json").read_text())["log_history"]
    validation = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(validation) == 10
    assert validation[-1] < 0.3 < validation[0]

    plot = [
        sys.executable,
        "-m",
        "llava.train.run_folder.loss_plot",
        "outputs/logos-lora",
        "--out",
        "loss.svg",
    ]
    subprocess.run(plot, check=True)
    drawn, shown = (file.read_text() for file in (tmp_path / "loss.svg", ROOT / "docs" / "finetune-loss.svg"))
    for mark in ("<circle", "<polyline", "<text"):
        assert drawn.count(mark) == shown.count(mark), mark
    num_steps = [len(re.search(r'points="([^"]+)"', text)[1].split()) for text in (drawn, shown)]  # type: ignore[index]
    assert num_steps == [120, 120]


def test_the_excerpts_are_parts_of_the_files() -> None:
    shown, whole = yaml.safe_load(blocks("yaml")[0]), yaml.safe_load((LOGOS / "lora.yaml").read_text())
    for group, settings in shown.items():
        assert settings.items() <= whole[group].items()
    assert json.loads(blocks("json")[0]) in json.loads((LOGOS / "train.json").read_text())


def test_the_sample_set_is_drawn_by_its_program(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "recipes" / "tiny" / "draw_logos.py"), "--out", str(tmp_path)]
    subprocess.run(program, check=True, capture_output=True)
    for name in ("train.json", "test.json"):
        rows = json.loads((LOGOS / name).read_text())
        assert json.loads((tmp_path / name).read_text()) == rows
        for row in rows:
            drawn, kept = (Image.open(folder / "images" / row["image"]) for folder in (tmp_path, LOGOS))
            assert drawn.tobytes() == kept.tobytes()
    size = sum(os.path.getsize(path) for path in LOGOS.rglob("*") if path.is_file())
    assert size < 300_000


def test_a_plot_needs_losses(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    plot = [
        sys.executable,
        "-m",
        "llava.train.run_folder.loss_plot",
        str(tmp_path),
        "--out",
        str(tmp_path / "x.svg"),
    ]
    done = subprocess.run(plot, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has logged no loss" in done.stderr
