"""The site of docs/: every page is in its navigation, it builds strictly, and a link that leads nowhere stops it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

import llava

sys.path.append(str(ROOT / "scripts/docs"))  # its programs import each other by name
# Loaded by its path: the standard library has a module of this name.
SITE = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts/docs/site.py")
assert SITE is not None
assert SITE.loader is not None
site = importlib.util.module_from_spec(SITE)
SITE.loader.exec_module(site)

needs_mkdocs = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_static_i18n")),
    reason="mkdocs and its plug-ins are not installed (pip install '.[docs]')",
)


def named(entries: Any) -> list[str]:
    pages: list[str] = []
    for entry in entries:
        pages += [entry] if isinstance(entry, str) else named(next(iter(entry.values())))
    return pages


# Named in the navigation, and left out of the site until they are written.
EXPECTED = {"convert.md", "serving.md", "engine.md", "evaluate.md"}


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.name for path in (ROOT / "docs").glob("*.md") if ".zh-CN." not in path.name}
    assert set(named(config["nav"])) - EXPECTED == {*pages, "reference.md"} - EXPECTED
    built = site.written({"Use": ["index.md", {"More": ["nowhere.md"]}, "nowhere.md"]}, ROOT / "docs")
    assert built == {"Use": ["index.md"]}


def test_links_out_of_the_folder_stay_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/index.md"
    text = "See [the README](../README.md#install) and ![a star](../images/demo.jpg)."
    (tmp_path / "pages").mkdir()
    assert site.within(text, page, tmp_path) == "See the README (`README.md`) and ![a star](outside/images-demo.jpg)."
    assert (tmp_path / "outside/images-demo.jpg").read_bytes() == (ROOT / "images/demo.jpg").read_bytes()
    monkeypatch.setenv("LLAVA_DOCS_REPOSITORY", "https://example.org/llava/")
    assert "[the README](https://example.org/llava/blob/main/README.md#install)" in site.within(text, page, tmp_path)


def test_the_reference_has_every_public_name() -> None:
    found = re.findall(r"^::: ([\w.]+)$", site.reference(), flags=re.MULTILINE)
    assert {name.rpartition(".")[2] for name in found} == set(llava.__all__) - {"__version__"}


@pytest.mark.slow
@needs_mkdocs
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/docs/site.py"), "--build", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {"index", "tour", "trace", "doctor", "debug", "extend", "reference", "roadmap"} <= pages
    chinese = (tmp_path / "site/zh/trace.html").read_text(encoding="utf-8")
    assert "观察点" in chinese
    tree = (tmp_path / "site/architecture.html").read_text(encoding="utf-8")
    assert all(path.name in tree for path in (ROOT / "llava").rglob("[!_]*.py"))
    reference = (tmp_path / "site/reference.html").read_text(encoding="utf-8")
    assert "Load a model for inference." in reference

    config = tmp_path / "mkdocs.yml"
    (tmp_path / "pages/tour.md").write_text("# Tour\n\n[nowhere](nowhere.md)\n", encoding="utf-8")
    again = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config)]
    broken = subprocess.run(again, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert broken.returncode != 0
    assert "nowhere.md" in broken.stdout + broken.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_building_the_site_leaves_the_other_environment_alone() -> None:
    commands = subprocess.run(["make", "-n", "-B", "site"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "scripts/docs/site.py" in commands
    assert not re.search(r"\.venv/", commands)
    assert not re.search(r"install.*'?\.(?:\[|'|\s|$)", commands)  # the package itself is installed nowhere
    others = subprocess.run(["make", "-n", "-B", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    installs = [
        line for line in others.stdout.splitlines() if " install " in line and re.search(r"\s'?\.(?:\[|'|$)", line)
    ]
    assert installs
    assert all("--editable" in line for line in installs)
