"""The recipes in scripts/v1_5/eval: every command in them is one that its program takes, and POPE's runs for real."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import eval_kit as kit
import pytest
from eval_kit import load_script

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.name for path in (ROOT / "scripts/v1_5/eval").glob("*.sh") if path.name != "common.sh")
# Stands in for the interpreter: writes down how it was called, and leaves the answers that later steps read.
STAND_IN = """\
#!/usr/bin/env bash
line=$(printf '%q ' "$@")
echo "$line" >> "$LOG" # in one piece, since two run at a time
while [ $# -gt 0 ]; do
    if [ "$1" = --answers-file ]; then mkdir -p "$(dirname "$2")"; echo answer >> "$2"; fi
    shift
done
"""


def run(recipe: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts/v1_5/eval" / recipe), *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_commands_are_accepted(recipe: str, tmp_path: Path) -> None:
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = run(
        recipe, PYTHON=str(python), LOG=str(log), DATA=str(tmp_path / "data"), CUDA_VISIBLE_DEVICES="0,1", MODEL="m/x"
    )
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in log.read_text().splitlines()]
    assert commands
    for command in commands:
        if command[:1] == ["-m"]:
            module, words = command[1], command[2:]
            if module == "llava":
                from llava.eval.harness.scoring import build_parser

                assert words[:2] == ["eval", "score"]
                build_parser().parse_args(words[2:])
                continue
            script = module.replace(".", "/") + ".py"
        else:
            script, words = str(Path(command[0]).resolve().relative_to(ROOT)), command[1:]
        load_script(script).build_parser().parse_args(words)
    chunked = [command for command in commands if "--num-chunks" in command]
    if chunked:
        assert [command[command.index("--chunk-idx") + 1] for command in sorted(chunked)] == ["0", "1"]
        merged = next((tmp_path / "data").rglob("merge.jsonl"))
        assert merged.read_text() == "answer\nanswer\n"


def test_every_benchmark_of_the_guide_has_a_recipe() -> None:
    named = "gqa llavabench mmbench mmbench_cn mme mmvet pope qbench qbench_zh seed sqa textvqa vizwiz vqav2"
    assert [f"{name}.sh" for name in named.split()] == RECIPES


def test_pope_for_real(tmp_path: Path) -> None:
    from llava.assets import embedded_model_path

    kit.pope(tmp_path)
    (tmp_path / "pope/val2014").mkdir()
    for number in (1, 2):
        (tmp_path / f"pope/val2014/{number}.jpg").write_bytes(kit.png())
    done = run(
        "pope.sh", PYTHON=sys.executable, MODEL=str(embedded_model_path()), DATA=str(tmp_path), DEVICE="cpu",
        CONV_MODE="v1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Category: ") == 2
    rows = [json.loads(line) for line in (tmp_path / "pope/answers/llava-v1.5-tiny.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3]


def test_a_failing_step_ends_the_recipe(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\nexit 3\n")
    python.chmod(0o755)
    done = run("gqa.sh", PYTHON=str(python), DATA=str(tmp_path), CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 3
    assert not list(tmp_path.rglob("merge.jsonl"))
