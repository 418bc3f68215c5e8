"""Names of models: the table, downloading and removing by name from a hub on loopback, misspelt names, the embedded one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from cli_kit import environment
from hub_kit import FakeHub, fake_hub
from tiny import build, save_tower

from llava.assets import embedded_model_path
from llava.cli.models import list_models, main, memory_here, presence
from llava.cli.remove import main as remove
from llava.errors import InputError
from llava.model.checkpoints.catalog import CATALOG, repository_of
from llava.model.checkpoints.hub import HubOptions, resolve_checkpoint
from llava.model.checkpoints.inspect import inspect

IMAGE = str(Path(__file__).parents[2] / "images" / "demo.jpg")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with small models under the names of real ones, one of them with its tower in a repository of its own."""
    whole = build(tmp_path / "whole")
    apart = build(tmp_path / "apart")
    config = json.loads((apart / "config.json").read_text())
    changes = {"mm_vision_tower": "openai/clip", "unfreeze_mm_vision_tower": False}
    (apart / "config.json").write_text(json.dumps(config | changes))
    tower = save_tower(tmp_path / "clip")
    repositories = {"llava-hf/llava-1.5-7b-hf": whole, "someone/apart": apart, "openai/clip": tower}
    with fake_hub(repositories) as server:
        yield server


def llava(hub: FakeHub | None, home: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    values = environment() | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    if hub is not None:
        del values["HF_HUB_OFFLINE"]
        values["HF_ENDPOINT"] = hub.url
    command = [sys.executable, "-m", "llava", *words]
    return subprocess.run(command, env=values, input=stdin, capture_output=True, text=True, timeout=120)


def test_pull_ask_and_remove_by_name(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    done = llava(hub, home, "pull", "llava-1.5-7b")
    assert done.returncode == 0, done.stderr
    folder = home / "hub/models--llava-hf--llava-1.5-7b-hf"
    assert str(folder) in done.stdout
    assert done.stdout.splitlines()[-1] == "ask it: llava chat -m llava-1.5-7b IMAGE"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    assert {row.name for row in list_models() if row.here == "yes"} == {"tiny", "llava-1.5-7b"}
    found = resolve_checkpoint("llava-1.5-7b", hub=HubOptions(local_files_only=True, cache_dir=home / "hub"))
    assert inspect(found).is_multimodal

    for file in folder.rglob("model.safetensors"):
        os.truncate(file.resolve(), 5000)
    assert presence("llava-hf/llava-1.5-7b-hf") == "partly"
    done = llava(None, home, "rm", "llava-1.5-7b")
    assert (done.returncode, folder.is_dir()) == (2, True)
    assert "needs --yes where nobody can be asked" in done.stderr
    (folder.parent / "models--someone--other").mkdir()
    assert remove(["LLaVA-v1.5-7b", "--yes"]) == 0
    assert [child.name for child in folder.parent.iterdir() if child.name.startswith("models")] == [
        "models--someone--other"
    ]
    assert remove(["llava-1.5-7b", "--yes"]) == 2


def test_a_tower_of_its_own_is_pulled_too(hub: FakeHub, tmp_path: Path) -> None:
    done = llava(hub, tmp_path / "home", "pull", "someone/apart")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home/hub/models--openai--clip").is_dir()


def test_removing_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    folder = tmp_path / "models--llava-hf--llava-1.5-7b-hf"
    for answer, is_left in (("", True), ("no", True), ("y", False)):
        folder.mkdir(exist_ok=True)
        (folder / "file").write_bytes(b"x" * 2000)
        asked: list[str] = []
        monkeypatch.setattr("builtins.input", lambda text, answer=answer, asked=asked: asked.append(text) or answer)
        assert remove(["llava-1.5-7b"]) == 0
        assert folder.exists() is is_left
        assert asked[0].startswith("remove llava-hf/llava-1.5-7b-hf, 2 kB, from")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tiny", "'tiny' comes with the package and is not removed"),
        (".", "'.' is no name or repository of a downloaded model"),
        ("llava-1.5-8b", "did you mean 'llava-1.5-7b'"),
        ("../x/y", "no name or repository"),
        ("someone/never", "someone/never is not downloaded"),
    ],
)
def test_what_is_not_removed(name: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert remove([name, "--yes"]) == 2
    assert sentence in capsys.readouterr().err


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_checkpoint("tiny") == embedded_model_path()
    assert repository_of("llava-v1.6-Mistral-7b") == "llava-hf/llava-v1.6-mistral-7b-hf"
    with pytest.raises(InputError, match=r"no model folder 'llava-1.5-7'; did you mean 'llava-1.5-7b'"):
        resolve_checkpoint("llava-1.5-7")
    with pytest.raises(InputError, match="or a name that llava models lists"):
        resolve_checkpoint("xyz")
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "llava-1.5-7b")  # a folder of that name is the folder
    assert inspect("llava-1.5-7b").folder == Path("llava-1.5-7b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"'llava-hf/llava-1.5-13b-hf' was not found"):
        resolve_checkpoint("llava-1.5-13b", hub=HubOptions(local_files_only=True, cache_dir=tmp_path / "none"))


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.cli.models.memory_here", lambda: ("GPU", 24 * 2**30))
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["name", "download"]
    assert len({line.index(line.split()[1]) for line in lines[1 : 2 + len(CATALOG)]}) == 1  # columns
    assert main(["--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {"tiny", *CATALOG}
    assert [rows[name]["fits"] for name in ("tiny", "llava-1.5-7b", "llava-1.5-13b", "llava-1.6-34b", "llava-next-72b")] == [
        "yes", "yes", "--load-8bit", "--load-4bit", "no"
    ]  # fmt: skip
    assert memory_here()[1] > 0


def test_sizes_are_those_of_the_architectures() -> None:
    """Counted from the layers' shapes, for LLaVA-1.5 by the recorded shapes of the published model."""
    recorded = json.loads((Path(__file__).parents[1] / "golden/full_size_state_dict_keys.json").read_text())
    for name, model in CATALOG.items():
        assert model.in_layers < model.parameters
        assert (
            model.memory_bytes("4-bit")
            < model.memory_bytes("8-bit")
            < model.memory_bytes("bf16")
            == model.download_bytes
        )
        assert name == name.lower()
    for found in recorded.values():
        shapes = found["state_dict"]
        total = sum(_product(shape) for shape in shapes.values()) / 1e9
        if not any("vision_tower" in key for key in shapes):
            total += 0.3035  # of CLIP-L with 336 pixels
        nearest = min(CATALOG.values(), key=lambda model: abs(model.parameters - total))
        assert abs(nearest.parameters - total) < 0.02, total


def _product(shape: object) -> int:
    result = 1
    for side in shape if isinstance(shape, list) else shape["shape"]:  # type: ignore[index, call-overload]
        result *= side
    return result


def test_the_model_in_the_package_introduces_itself_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llava.cli.chat import main as chat

    words = [IMAGE, "What colour is the star?"]
    for is_terminal, flags, introduces in ((True, [], True), (True, ["-q"], False), (False, [], False)):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        assert chat([*flags, *words]) == 0
        shown = capsys.readouterr()
        assert shown.out == "The star is yellow.\n"
        assert ("this is tiny, the model in the package" in shown.err) is introduces
