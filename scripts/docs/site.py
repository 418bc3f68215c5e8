"""Build the site of docs/: `python scripts/docs/site.py [--serve]`, which `make site` calls. It needs the extra `docs`.

In: docs/, mkdocs.yml, the package. Out: build/site. mkdocs wants every page and image in one folder, and every link within
it, so docs/ is copied first. A link to a file outside of docs/ becomes a link into the repository where the environment
variable LLAVA_DOCS_REPOSITORY gives its address, and plain text where it does not; an image from outside is copied. The
reference is written from the public names of the package, and architecture.md gets the tree of all files (tree.py). Pages
that mkdocs.yml names and that do not exist are left out. mkdocs builds strictly: a link that leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from tree import draw

ROOT = Path(__file__).resolve().parents[2]
# Anchors of Chinese headings; a Python object that YAML can name and not hold.
UNICODE_ANCHORS = ("slugify: unicode", "slugify: !!python/object/apply:pymdownx.slugs.slugify {kwds: {case: lower}}")
# The site has a switch of languages of its own.
OTHER_LANGUAGE = re.compile(r"\[(?:中文|English)\]\([\w.-]+\.md\)(?: · )?")
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
TITLES = {
    "llava.model.builder": "Loading",
    "llava.engine.engine": "Many answers at once",
    "llava.engine.config": "Settings of the engine",
    "llava.engine.request": "Requests and results",
    "llava.session": "Conversations with a model",
    "llava.conversation": "Templates",
    "llava.processor": "Inputs",
    "llava.images.io": "Images",
    "llava.images.download": "Limits for images",
    "llava.diagnose.tracer.hooks": "Tracing",
    "llava.model.language_model.llava_llama": "Models",
    "llava.errors": "Errors",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the site of docs/ into build/site.")
    parser.add_argument("--serve", action="store_true", help="serve it on 127.0.0.1 instead of writing it")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where to build (default: build)")
    args = parser.parse_args()
    config = prepare(args.build.resolve())
    command = ["serve"] if args.serve else ["build"]
    words = [sys.executable, "-m", "mkdocs", *command, "--strict", "-f", str(config)]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode


def prepare(build: Path) -> Path:
    """Write the pages as mkdocs wants them, and its configuration; gives the latter."""
    pages = build / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages)
    for page in sorted(pages.rglob("*.md")):
        source = ROOT / "docs" / page.relative_to(pages)
        # The plug-in finds the page in the reader's language by the name without one.
        text = OTHER_LANGUAGE.sub("", page.read_text(encoding="utf-8")).replace(".zh-CN.md", ".md")
        page.write_text(within(text, source, pages), encoding="utf-8")
        page.rename(page.with_name(page.name.replace(".zh-CN.", ".zh.")))  # as the plug-in and the theme spell it
    (pages / "reference.md").write_text(reference(), encoding="utf-8")
    with (pages / "architecture.md").open("a", encoding="utf-8") as page:
        page.write(f"\n## Every file\n\n```text\n{draw(ROOT / 'llava')}\n```\n")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config |= {"docs_dir": str(pages), "site_dir": str(build / "site")}
    config["nav"] = [entry for entry in (written(entry, pages) for entry in config["nav"]) if entry]
    target = build / "mkdocs.yml"
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
    target.write_text(text.replace(*UNICODE_ANCHORS), encoding="utf-8")
    return target


def within(text: str, page: Path, pages: Path) -> str:
    """A page whose links to files outside of docs/ lead somewhere from the site, or are text."""
    repository = os.environ.get("LLAVA_DOCS_REPOSITORY", "").rstrip("/")

    def exchange(match: re.Match[str]) -> str:
        mark, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (page.parent / target).resolve()
        name = path.relative_to(ROOT)
        if mark:
            place = pages / "outside" / "-".join(name.parts)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
            return f"![{words}](outside/{place.name})"
        return f"[{words}]({repository}/blob/main/{name}{anchor})" if repository else f"{words} (`{name}`)"

    return OUTSIDE.sub(exchange, text)


def written(entry: Any, pages: Path) -> Any:
    """A navigation entry without the pages that do not exist."""
    if isinstance(entry, str):
        return entry if (pages / entry).is_file() else None
    (title, below), *_ = entry.items()
    below = [page for page in (written(page, pages) for page in below) if page]
    return {title: below} if below else None


def reference() -> str:
    """The public names of the package, by the module that holds them, for mkdocstrings to fill in."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for name, module in public_names().items():
        by_module[module].append(name)
    lines = [
        "# Reference",
        "",
        "The public names, from their docstrings. Each can be imported from `llava` itself.",
        "",
    ]
    for module, title in TITLES.items():
        names = by_module.pop(module, [])
        lines += [f"## {title}", "", *(line for name in names for line in (f"::: {module}.{name}", ""))]
    assert not by_module, f"no title for {', '.join(by_module)}"
    return "\n".join(lines)


def public_names() -> dict[str, str]:
    """The module of each public name, from `llava.EXPORTS`, read without importing the package."""
    for node in ast.parse((ROOT / "llava/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXPORTS":
            return {name: home for home, names in ast.literal_eval(node.value).items() for name in names}
    raise AssertionError("llava/__init__.py has no table EXPORTS")


if __name__ == "__main__":
    sys.exit(main())
