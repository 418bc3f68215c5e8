"""The versions that `make test-versions` runs on, and what the README says of them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_versions_program", ROOT / "scripts/test_versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PLACE", tmp_path)
    return module


def test_constraints_hold_everything_but_the_two_packages(program: ModuleType) -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    torch, transformers = (re.search(rf'"{name}>=([\d.]+)', declared)[1] for name in program.VARIED)
    bounds = [f"torch=={torch}.*", f"transformers=={transformers}.*"]
    assert program.lowest() == bounds
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    newest, lowest = (
        program.constraints(name).read_text(encoding="utf-8").splitlines() for name in ("newest", "lowest")
    )
    assert lowest == [*newest, *bounds]
    free = {line.split("==")[0] for line in set(pinned) - set(newest)}
    assert free == {*program.VARIED, *program.THEIRS}


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_names_the_lower_bounds(program: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| ")}
    for name, requirement in zip(("PyTorch", "transformers"), program.lowest(), strict=True):
        assert requirement.split("==")[1].removesuffix(".*") in rows[name]
