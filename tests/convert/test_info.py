"""`llava info`: facts about the recorded checkpoints, without torch and without weights, and what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_kit import run_llava, run_python
from golden_data import HERE, golden
from tiny import ANYRES, build

from llava.assets import embedded_model_path
from llava.convert.convert import ConversionOptions, convert
from llava.convert.describe import as_json, describe_checkpoint
from llava.convert.info import lines
from llava.errors import InputError
from llava.model.builder import load

CHECKPOINTS = {
    "llava-v1.5-tiny-vicuna": ("full", "as LLaVA-1.5", "llava_v1", "padded to a square, 16 tokens each"),
    "llava-v1.6-tiny-vicuna": ("full", "as LLaVA-1.6", "llava_v1", "an overview and tiles, 16 tokens a tile"),
    "llava-v1-tiny-linear": ("full", "as LLaVA v1", "llava_v1", "middle cut out, 4 tokens each"),
    "llava-tiny-mpt": ("full", "as LLaVA-1.5", "mpt", "padded to a square, 4 tokens each"),
    "llava-v1.5-tiny-pretrain": ("projector", "a projector for a base model", "llava_v1", "padded to a square"),
    "llava-v1.5-tiny-lora": ("lora", "an adapter for a base model", "llava_v1", "padded to a square"),
}


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_facts_are_those_of_the_loaded_model(name: str) -> None:
    layout, kind, template, images = CHECKPOINTS[name]
    found = describe_checkpoint(f"checkpoints/{name}")
    assert found.layout == layout
    assert kind in found.facts["kind"]
    assert found.facts["template"] == template
    assert found.facts["images"].startswith(images)
    assert found.missing == ()
    loaded = load(f"checkpoints/{name}", base="checkpoints/vicuna-tiny-base" if "v1.5-tiny-" in name and layout != "full"
                  else None, device="cpu")  # fmt: skip
    assert (found.facts["template"], found.facts["context"]) == (loaded.conv_mode, loaded.context_len)
    parts = {
        "vision tower": sum(p.numel() for n, p in loaded.model.named_parameters() if ".vision_tower." in n),
        "projector": sum(
            p.numel() for n, p in loaded.model.named_parameters() if "mm_projector" in n or n.endswith("newline")
        ),
    }
    parts["language model"] = sum(p.numel() for p in loaded.model.parameters()) - sum(parts.values())
    assert {name: found.parameters[name] for name in parts} == parts
    assert found.memory_bytes["float32"] == 4 * sum(parts.values())
    assert (
        found.memory_bytes["float32"]
        > found.memory_bytes["bfloat16 or float16"]
        > found.memory_bytes["8-bit"]
        > found.memory_bytes["4-bit"]
    )
    assert as_json(found).startswith("{")


def test_other_layouts(tmp_path: Path) -> None:
    whole = describe_checkpoint(embedded_model_path())
    for layout in ("transformers", "gguf"):
        convert(embedded_model_path(), tmp_path / layout, to=layout, options=ConversionOptions(verification="tensors"))
    theirs = describe_checkpoint(tmp_path / "transformers")
    assert theirs.facts["kind"].startswith("a whole model in the layout of LlavaForConditionalGeneration")
    for key in ("template", "context", "images", "vision tower", "projector"):
        assert theirs.facts[key] == whole.facts[key]
    assert theirs.facts["added tokens"] == ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    assert (theirs.readers["transformers"], theirs.readers["vLLM"]) == ("yes", "yes")
    assert theirs.readers["SGLang"] == "after llava convert --to original --tower out"
    config = json.loads((tmp_path / "transformers" / "config.json").read_text())
    del config["tokenizer_model_max_length"]  # a published checkpoint has positions only, as loading reads it
    (tmp_path / "transformers" / "config.json").write_text(json.dumps(config))
    limit = config["text_config"]["max_position_embeddings"]
    assert describe_checkpoint(tmp_path / "transformers").facts["context"] == limit
    pair = describe_checkpoint(tmp_path / "gguf")
    assert pair.layout == "gguf"
    assert pair.parameters["language model"] == whole.parameters["language model"]
    assert pair.missing == ()
    for key in ("template", "context", "images", "projector", "language model"):
        assert pair.facts[key] == whole.facts[key]
    assert (pair.readers["llava"], pair.memory_bytes) == ("yes", whole.memory_bytes)
    (vision,) = (tmp_path / "gguf").glob("mmproj-*")
    assert describe_checkpoint(vision).facts == {vision.name: "vision tower and projector, 8 layers, 320 wide"}
    vision.unlink()
    assert "give the file of tower and projector" in describe_checkpoint(tmp_path / "gguf").missing[0]


def test_readers_agree_with_conversions(tmp_path: Path) -> None:
    """`no` where a conversion refuses, and a command where it does not."""
    for name, changes in {"plain": {}, "linear": {"mm_projector_type": "linear"}, "tiles": ANYRES}.items():
        folder = build(tmp_path / name, **changes)
        answer = describe_checkpoint(folder).readers["transformers"]
        try:
            convert(
                folder, tmp_path / f"{name}-hf", to="transformers", options=ConversionOptions(verification="tensors")
            )
        except InputError:
            assert answer == "no"
        else:
            assert answer == "after llava convert --to transformers"


def test_what_is_missing(tmp_path: Path) -> None:
    shutil.copytree(golden("checkpoints/llava-v1.5-tiny-lora"), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "config.json").read_text())
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "openai/clip-x"}))
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({**adapter, "base_model_name_or_path": "gone/base"})
    )
    missing = describe_checkpoint(tmp_path / "lora").missing
    assert "the base model (its files name gone/base)" in missing[0]
    assert "the vision tower 'openai/clip-x', which loading looks for on the hub" in missing[1]
    folder = build(tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    found = describe_checkpoint(folder)
    assert found.missing == ("a tokenizer (tokenizer.model, tokenizer.json or vocab.json)",)
    assert found.readers["llava"] == f"no: it lacks {found.missing[0]}"


def test_printed() -> None:
    text = "\n".join(lines(describe_checkpoint(embedded_model_path())))
    for line in (
        "kind                         a whole model in the original layout (as LLaVA-1.5)",
        "parameters                   language model 9.28 million, projector 0.21 million, vision tower 10.07 million",
        "stored                       39.12 MB F16",
        "read by llama.cpp            after llava convert --to gguf",
    ):
        assert line in text


def test_as_a_program(tmp_path: Path) -> None:
    done = run_llava("info", "checkpoints/llava-v1.5-tiny-vicuna", "--json")
    assert json.loads(done.stdout)["parameters"]["projector"] == 6272
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 8)
    (tmp_path / "weights").mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "weights" / "pytorch_model.bin")
    for path, sentence in {
        "nowhere": "there is no model folder or .gguf file 'nowhere'",
        str(tmp_path / "weights"): "holds no config.json",
        str(tmp_path / "x.gguf"): "is damaged or cut short",
    }.items():
        done = run_llava("info", path)
        assert (done.returncode, done.stdout) == (2, "")
        assert sentence in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_it_is_quick_because_nothing_large_is_imported() -> None:
    """Not a clock, which a busy machine would upset: what the time goes to."""
    code = (
        "import sys; from llava.convert.info import main; main([{!r}]); print(len(sys.modules), 'torch' in sys.modules)"
    )
    done = run_python("-c", code.format("checkpoints/llava-v1.6-tiny-vicuna"))
    count, torch_is_there = done.stdout.strip().splitlines()[-1].split()
    assert torch_is_there == "False"
    assert int(count) < 300
