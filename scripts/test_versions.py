"""Run the tests on the lowest and on the newest supported versions of PyTorch and transformers: `make test-versions`.

In: pyproject.toml with the lower bounds, constraints.txt with the versions of everything else. Out: a virtual environment for
each under build/versions, which is kept and brought up to date, the tests' output, and at the end what ran on which versions.
Other arguments are pytest's: `python scripts/test_versions.py --only newest -x tests/model`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "versions"
VARIED = ("torch", "transformers")
# Packages whose versions these two require, so that constraints.txt does not hold them.
THEIRS = ("tokenizers", "huggingface_hub", "hf-xet", "deepspeed")
REPORT = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"


def lowest() -> list[str]:
    """Return the lower bounds that pyproject.toml declares, as exact requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(project["dependencies"])))
    return [f"{name}=={bounds[name]}.*" for name in VARIED]


def constraints(name: str) -> Path:
    """Write the constraints of an environment: constraints.txt with `VARIED` at their lowest, or free."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split("==")[0] not in (*VARIED, *THEIRS)]
    file = PLACE / f"{name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*kept, *(lowest() if name == "lowest" else ())]) + "\n", encoding="utf-8")
    return file


def build(name: str) -> Path:
    """Make the environment `name`, or bring it up to date, and return its interpreter."""
    folder, file = PLACE / name, constraints(name)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(file)]
    # The resolver would otherwise keep what an earlier call installed.
    subprocess.run([*install, "--upgrade", *VARIED], cwd=ROOT, check=True)
    subprocess.run([*install, "--editable", ".[dev]"], cwd=ROOT, check=True)
    pages = ["--no-deps", "--requirement", "tests/page-requirements.txt"]
    subprocess.run([*install, *pages], cwd=ROOT, check=True)
    return python


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the tests on the lowest and on the newest supported versions.")
    parser.add_argument("--only", choices=("lowest", "newest"), help="one of the two")
    args, rest = parser.parse_known_args(argv)
    words = rest or ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    lines, status = [], 0
    for name in (args.only,) if args.only else ("lowest", "newest"):
        python = build(name)
        versions = subprocess.run([python, "-c", REPORT], capture_output=True, text=True, check=True).stdout.strip()
        print(f"{name}: {versions}", flush=True)
        done = subprocess.run([python, "-m", "pytest", *words], cwd=ROOT, env=environment, check=False)
        lines.append(f"{name}: {versions}: {'passed' if done.returncode == 0 else f'failed ({done.returncode})'}")
        status = status or done.returncode
    print(*lines, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
