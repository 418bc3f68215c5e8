"""What an error says to install, for each way in which this package can be installed."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from repository import ROOT

from llava import errors
from llava.errors import MissingPackageError, install_command, require

REQUIRES = [
    "torch>=2.11",
    'accelerate>=1.10; extra == "train"',
    'peft>=0.19; extra == "train"',
    'fastapi>=0.115; extra == "serve"',
    'llava[serve]; extra == "ui"',
    'gradio>=6.31; extra == "ui"',
]


class Installed:
    """The metadata of a package as an installer leaves them."""

    requires = REQUIRES

    def __init__(self, direct_url: object = None, installer: str = "pip") -> None:
        self.files = {"INSTALLER": installer + "\n"}
        if direct_url is not None:
            self.files["direct_url.json"] = json.dumps(direct_url)

    def read_text(self, name: str) -> str | None:
        return self.files.get(name)


def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: Installed | None, extra: str = "train") -> str:
    """The command of a package that lies in site-packages."""

    def distribution(name: str) -> Installed:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "llava" / "errors.py"))
    return install_command(extra)


def test_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_command("train") == f"pip install -e '.[train]' (in {ROOT})"
    with pytest.raises(MissingPackageError, match=r"install it with: pip install -e '.\[gguf\]' \(in "):
        require("no_such_package", extra="gguf")


def test_a_folder_or_a_file_that_is_still_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "llava 2-py3.whl"
    wheel.write_bytes(b"")
    found = Installed({"url": wheel.as_uri(), "archive_info": {}})
    assert command(monkeypatch, tmp_path, found) == f"pip install '{wheel}[train]'"
    wheel.unlink()  # what the extra consists of is enough
    assert command(monkeypatch, tmp_path, found) == "pip install 'accelerate>=1.10' 'peft>=0.19'"


def test_a_repository_an_address_and_an_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vcs = {"url": "https://example.org/llava.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    expected = "pip install 'llava[train] @ git+https://example.org/llava.git@abc'"
    assert command(monkeypatch, tmp_path, Installed(vcs)) == expected
    address = {"url": "https://example.org/llava.whl", "archive_info": {}}
    assert command(monkeypatch, tmp_path, Installed(address, "uv")) == (
        "uv pip install 'llava[train] @ https://example.org/llava.whl'"
    )
    assert command(monkeypatch, tmp_path, Installed(), "ui") == "pip install 'fastapi>=0.115' 'gradio>=6.31'"
    assert command(monkeypatch, tmp_path, Installed(), "unknown") == "pip install 'llava[unknown]'"
    assert command(monkeypatch, tmp_path, None) == "pip install 'llava[train]'"


def test_every_extra_that_an_error_names_exists() -> None:
    import re

    text = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M))
    named = {
        extra
        for file in (ROOT / "llava").rglob("*.py")
        for extra in re.findall(
            r"(?:require\([^()]*extra=|install_command\()[\"'](\w+)[\"']", file.read_text(encoding="utf-8")
        )
    }
    assert named <= extras, named - extras
    assert {"train", "gguf"} <= named
