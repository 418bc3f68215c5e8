"""The first hour of a new user: the package as `pip install` leaves it, in a fresh environment, folder and home.

The sdist is built from the repository's files, the wheel from the sdist, and pip installs it into a new environment that sees
the libraries of this one, but not this repository. The commands of README's first screens follow, right ones and wrong ones.
None ends in a traceback, nothing that was given is left out, and exit statuses are right.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = pytest.mark.slow

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and a user's folder."""

    environment: Path
    home: Path
    sdist: Path
    wheel: Path

    def run(self, *words: str, stdin: str | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run `llava WORDS` in the user's folder."""
        ended = subprocess.run(
            [str(self.environment / "bin" / "llava"), *words],
            input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True, text=True, timeout=timeout, cwd=self.home, env=self.variables(),
        )  # fmt: skip
        assert "Traceback" not in ended.stdout + ended.stderr, ended.stderr[-2000:]
        return ended

    def variables(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TERM")}
        return {
            **kept,
            "HOME": str(self.home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }


def build(kind: str, source: Path, target: Path) -> Path:
    made = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(target)], cwd=source, check=True, capture_output=True, text=True
    )
    return target / made.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("first-hour")
    source, made, home = folder / "source", folder / "made", folder / "home"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    for each in (made, home):
        each.mkdir()
    sdist = build("build_sdist", source, made)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("build_wheel", unpacked, made)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (own,) = (environment / "lib").glob("python3*/site-packages")
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    (own / "libraries.pth").write_text(
        libraries + "\n"
    )  # whose own .pth files, such as an editable install's, do not count
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet", "--no-deps",
            "--no-index", "--force-reinstall", "--ignore-installed", str(wheel),
        ],
        check=True,
    )  # fmt: skip
    shutil.copy(ROOT / "images" / "demo.jpg", home / "photo.jpg")
    return Installed(environment, home, sdist, wheel)


def test_the_package_is_the_installed_one_and_complete(installed: Installed) -> None:
    python = installed.environment / "bin" / "python"
    where = subprocess.run(
        [str(python), "-c", "import llava; print(llava.__file__)"], cwd=installed.home, env=installed.variables(),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(installed.environment)
    in_wheel = {name for name in zipfile.ZipFile(installed.wheel).namelist() if name.startswith("llava/")}
    listed = subprocess.run(["git", "ls-files", "llava"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert in_wheel == set(listed.split()), in_wheel ^ set(listed.split())
    assert installed.wheel.stat().st_size < 60e6


def test_a_question_is_answered(installed: Installed) -> None:
    ended = installed.run("chat", "photo.jpg", "What do you see in this picture?")
    assert ended.returncode == 0
    assert "star" in ended.stdout
    first = installed.run("chat", "What do you see in this picture?", "photo.jpg")
    assert first.stdout == ended.stdout


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "llava COMMAND"),
        (["chat", "phto.jpg", "What is this?"], 2, "phto.jpg"),
        (["chat", "photo.HEIC", "What is this?"], 2, "photo.HEIC"),
        (["chat", "-m", "nowhere/model", "photo.jpg", "What?"], 2, "nowhere/model"),
        (["chat", ".", "What is this?"], 2, "folder"),
        (["info", "photo.jpg"], 2, "photo.jpg"),
        (["doctor", "nowhere"], 2, "nowhere"),
        (["serve", "nowhere"], 2, "nowhere"),
        (["eval", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["convert", "nowhere", "out", "--to", "gguf"], 2, "nowhere"),
        (["train", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_what_is_wrong_is_one_sentence(installed: Installed, words: list[str], status: int, said: str) -> None:
    ended = installed.run(*words)
    assert ended.returncode == status
    assert said in ended.stdout + ended.stderr
    if status:
        assert ended.stdout == ""


def test_own_questions_are_measured(installed: Installed) -> None:
    rows = [{"image": "photo.jpg", "question": "What shape is red?", "answer": "star"}]
    (installed.home / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = installed.run("eval", "own.jsonl", "--out", "report")
    assert ended.returncode == 0, ended.stderr
    assert json.loads((installed.home / "report" / "results.json").read_text())


def test_a_model_is_fine_tuned_and_asked(installed: Installed) -> None:
    sample = {
        "id": "1",
        "image": "photo.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWho drew this?"},
            {"from": "gpt", "value": "A program drew it."},
        ],
    }
    (installed.home / "train.json").write_text(json.dumps([sample] * 4))
    python = str(installed.environment / "bin" / "python")
    model = subprocess.run(
        [python, "-c", "from llava.assets import embedded_model_path as path; print(path())"], cwd=installed.home,
        env=installed.variables(), capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    words = (
        f"--model_name_or_path {model} --version v1 --data_path train.json --image_folder . --lora_enable True "
        "--learning_rate 2e-3 --num_train_epochs 1 --per_device_train_batch_size 2 --model_max_length 512 --output_dir tuned "
        "--report_to none --save_strategy no"
    )
    ended = installed.run("train", *words.split())
    assert ended.returncode == 0, ended.stderr
    commands = re.findall(r"^  llava (chat .*)$", ended.stdout, flags=re.MULTILINE)
    assert len(commands) == 1
    again = installed.run("train", *words.split())
    assert again.returncode == 2
    assert "is finished" in again.stderr
    asked = installed.run("chat", "-m", "tuned", "photo.jpg", "Who drew this?")
    assert asked.returncode == 0
    assert asked.stdout.strip()


def test_a_server_answers_and_ends(installed: Installed) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [str(installed.environment / "bin" / "llava"), "serve", "--port", str(port), "--no-page"],
        cwd=installed.home, env=installed.variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        address, models = f"http://127.0.0.1:{port}", None
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as reply:
                    models = json.load(reply)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        assert models is not None
        body = {
            "model": models["data"][0]["id"],
            "messages": [{"role": "user", "content": "What is a star?"}],
            "max_tokens": 5,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"]
    finally:
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=60)
    assert "Traceback" not in said
    assert server.returncode in (0, 130)
