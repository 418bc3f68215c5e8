"""`llava examples`: the files of a clone, from a clone and from an installation, and never over a user's own."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from repository import ROOT

from llava.cli import examples
from llava.cli.examples import SHARED, SHIPPED, main, shipped_files
from llava.errors import InputError
from llava.model.checkpoints.hub import resolve_checkpoint
from llava.train.config_file import expand_config


def test_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new"
    assert main([str(target)]) == 0
    written = {file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()}
    assert written == dict(shipped_files()).keys()
    assert (target / "playground/logos/lora.yaml").read_bytes() == (ROOT / "playground/logos/lora.yaml").read_bytes()
    config = yaml.safe_load((target / "playground/logos/lora.yaml").read_text())
    assert resolve_checkpoint(config["model"]["model_name_or_path"]).is_dir()
    for key in ("data_path", "image_folder", "eval_data_path"):
        assert (target / config["data"][key]).exists()
    (target / "scripts/zero3.json").unlink()
    assert main([str(target)]) == 0
    assert f"1 files written below {target}, {len(written) - 1} were there" in capsys.readouterr().out

    (target / "scripts/zero3.json").write_text("{}")  # of the user
    (target / "images/demo.jpg").unlink()
    assert main([str(target)]) == 2
    assert "zero3.json exists and is another file" in capsys.readouterr().err
    assert not (target / "images/demo.jpg").exists()
    assert (target / "scripts/zero3.json").read_text() == "{}"


def test_installations_have_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patterns of pyproject.toml, by which a wheel is built, are those of a clone; an installation lists them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shared = project["tool"]["setuptools"]["data-files"]
    assert sorted(pattern for patterns in shared.values() for pattern in patterns) == sorted(SHIPPED)
    for folder, patterns in shared.items():
        for pattern in patterns:
            assert folder == SHARED + str(Path(pattern).parent)

    class Listed:
        def __init__(self, name: str) -> None:
            self.name = name

        def as_posix(self) -> str:
            return f"../../../{SHARED}{self.name}"

        def locate(self) -> Path:
            return ROOT / self.name

    in_clone = dict(shipped_files())
    monkeypatch.setattr(examples, "__file__", str(tmp_path / "site-packages/llava/cli/examples.py"))
    monkeypatch.setattr(metadata, "files", lambda name: [Listed(name) for name in in_clone])
    assert dict(shipped_files()) == in_clone
    monkeypatch.setattr(metadata, "files", lambda name: [])
    assert main([str(tmp_path / "x")]) == 2


def test_a_missing_configuration_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="llava examples writes those that come with this package here"):
        expand_config(["scripts/configs/finetune_lora.yaml"], ["learning_rate"])
