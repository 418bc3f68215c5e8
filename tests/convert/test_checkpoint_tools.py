"""The original's tools for checkpoints: deltas, consolidation, auto_upgrade, extraction of the projector."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import run_python
from golden_data import HERE, golden

from llava.convert.convert import ConversionOptions, convert
from llava.convert.layouts.projector import extract_mm_projector
from llava.errors import InputError
from llava.model.apply_delta import apply_delta
from llava.model.apply_delta import main as apply_delta_main
from llava.model.builder import load
from llava.model.checkpoints.inspect import stored_tensors
from llava.model.checkpoints.weight_files import read_tensor
from llava.model.consolidate import consolidate_ckpt
from llava.model.make_delta import main as make_delta_main
from llava.model.make_delta import make_delta
from llava.model.utils import EXPLANATION, QUESTION, auto_upgrade

BASE, LINEAR, V15, V16 = (
    f"checkpoints/{name}"
    for name in ("vicuna-tiny-base", "llava-v1-tiny-linear", "llava-v1.5-tiny-vicuna", "llava-v1.6-tiny-vicuna")
)


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def tensors_of(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: read_tensor(header) for name, header in stored_tensors(Path(folder)).items()}


# Deltas


@pytest.mark.parametrize("model", [LINEAR, V15])
def test_a_delta_by_the_recorded_rules(model: str, tmp_path: Path) -> None:
    """Recorded: the projector is copied, the first rows of the tables are target minus base, rows for new tokens stay.

    Another projector than a linear one stopped the original.
    """
    make_delta(BASE, model, str(tmp_path / "delta"))
    delta, base, target = (tensors_of(folder) for folder in (tmp_path / "delta", BASE, model))
    target = {name: tensor for name, tensor in target.items() if "vision_tower" not in name}
    assert delta.keys() == target.keys()
    for name, tensor in target.items():
        expected = tensor.clone()
        if name in base:
            expected[: len(base[name])] -= base[name].to(tensor.dtype)
        assert torch.equal(delta[name], expected), name
    apply_delta(BASE, str(tmp_path / "again"), str(tmp_path / "delta"))
    again = tensors_of(tmp_path / "again")
    assert again.keys() == target.keys()
    for name, tensor in target.items():
        # Recorded for the original in half precision: 0.0009765625 at most.
        assert (again[name].float() - tensor.float()).abs().max() <= 0.0009765625, name
    assert load(tmp_path / "again", device="cpu").conv_mode == load(model, device="cpu").conv_mode


def test_a_delta_in_single_precision_rounds_less(tmp_path: Path) -> None:
    report = convert(V15, tmp_path / "delta", to="delta", base=BASE, options=ConversionOptions(dtype="fp32"))
    convert(tmp_path / "delta", tmp_path / "again", to="from-delta", base=BASE, options=ConversionOptions(dtype="fp32"))
    worst = max(
        (tensors_of(tmp_path / "again")[name] - tensor.float()).abs().max().item()
        for name, tensor in tensors_of(V15).items()
    )
    assert worst == pytest.approx(report.tensors.largest)
    assert worst < 1e-7


def test_a_delta_needs_its_own_base(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is another base"):
        make_delta(V16, "checkpoints/llava-tiny-mpt", str(tmp_path / "delta"))
    assert list(tmp_path.iterdir()) == []


# Consolidation


def test_consolidation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As recorded: three shards become one file with the same tensors, and the same words."""
    recorded = {"files": ["config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
                          "tokenizer.model", "tokenizer_config.json"], "stdout": "Loading model\n"}  # fmt: skip
    consolidate_ckpt(V15, str(tmp_path / "one"))
    assert capsys.readouterr().out == recorded["stdout"]
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == sorted([*recorded["files"], "conversion.json"])
    found, expected = tensors_of(tmp_path / "one"), tensors_of(V15)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.float16 for name in found)


@pytest.mark.slow
def test_they_are_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One in a process of its own, as it is typed, all of them by their main function."""
    done = run_python("-m", "llava.model.consolidate", "--src", V15, "--dst", str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    delta, again = str(tmp_path / "delta"), str(tmp_path / "again")
    words = ["--base-model-path", BASE, "--target-model-path", V15, "--delta-path", delta]
    assert make_delta_main(words) == 0
    assert make_delta_main(words) == 2
    assert "exists; name a new folder" in capsys.readouterr().err
    assert apply_delta_main(["--base-model-path", BASE, "--target-model-path", again, "--delta-path", delta]) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", "delta", "one"]


# Old configs

# What the original changed in recorded runs, of the keys that say what the model is; the rest were defaults written out.
CHANGED = {"model_type": ("llama", "llava"), "architectures": (["LlamaForCausalLM"], ["LlavaLlamaForCausalLM"])}


@pytest.mark.parametrize("answer", ["y", "YES"])
def test_an_old_config_is_upgraded(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llava-v0-old"
    shutil.copytree(golden("checkpoints/llava-v0-old"), folder)
    before = json.loads((folder / "config.json").read_text())
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text: asked.append(text) or answer)
    auto_upgrade(folder)
    after = json.loads((folder / "config.json").read_text())
    assert asked == [QUESTION]
    assert capsys.readouterr().out == f"{EXPLANATION}\nUpgrading checkpoint...\nCheckpoint upgraded.\n"
    assert {key: (before[key], after[key]) for key in after if before.get(key) != after[key]} == CHANGED
    auto_upgrade(folder)  # once is enough
    assert asked == [QUESTION]


def test_a_no_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(golden("checkpoints/llava-v0-old"), tmp_path / "llava-v0-old")
    before = (tmp_path / "llava-v0-old" / "config.json").read_bytes()
    monkeypatch.setattr(builtins, "input", lambda text: "n")
    with pytest.raises(SystemExit) as stopped:
        auto_upgrade(tmp_path / "llava-v0-old")
    assert stopped.value.code == 1
    assert (tmp_path / "llava-v0-old" / "config.json").read_bytes() == before


@pytest.mark.parametrize("folder", [V15, BASE])
def test_others_are_not_asked_about(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(text: str) -> Any:
        raise AssertionError(text)

    monkeypatch.setattr(builtins, "input", never)
    auto_upgrade(folder)


# The projector


@pytest.mark.parametrize("model", [V15, LINEAR, V16])
def test_the_projector_alone(model: str, tmp_path: Path) -> None:
    """Of .bin and, which the original could not, of safetensors; it loads beside a base and gives the same features."""
    extract_mm_projector(model, str(tmp_path / "p" / "mm_projector.bin"))
    table = torch.load(tmp_path / "p" / "mm_projector.bin", weights_only=True)
    whole = tensors_of(model)
    assert table.keys() == {name for name in whole if "mm_projector" in name or name.endswith("image_newline")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in table.items())
    convert(model, tmp_path / "folder", to="projector")
    beside = load(tmp_path / "folder", base=BASE, device="cpu", dtype=torch.float32)
    alone = load(model, device="cpu", dtype=torch.float32)
    for name, tensor in alone.model.get_model().mm_projector.state_dict().items():
        assert torch.equal(beside.model.get_model().mm_projector.state_dict()[name], tensor)


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    script = str(HERE.parents[1] / "scripts" / "extract_mm_projector.py")
    done = run_python(script, "--model-path", V16, "--output", str(tmp_path / "p.bin"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'p.bin'}: 5 tensors")
    with pytest.raises(InputError, match="exists"):
        extract_mm_projector(V16, str(tmp_path / "p.bin"))
    assert [file.name for file in tmp_path.iterdir()] == ["p.bin"]
