"""Inspecting a folder by its files, merging adapters, and the names that are saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from golden_data import golden, require_golden
from safetensors.torch import load_file, save_file

from llava.errors import InputError
from llava.model.builder import load
from llava.model.checkpoints.hub import resolve_vision_tower
from llava.model.checkpoints.inspect import inspect
from llava.model.checkpoints.lora import load_adapter, merge_into
from llava.model.checkpoints.weight_files import open_tensors, read_headers
from llava.model.language_model.registry import llava_classes

KINDS = {
    "llava-tiny-mpt": ("full", "mpt", False),
    "llava-v1-tiny-linear": ("full", "llama", False),
    "llava-v1.5-tiny-lora": ("lora", "llama", False),
    "llava-v1.5-tiny-pretrain": ("projector", "llama", False),
    "llava-v1.5-tiny-vicuna": ("full", "llama", False),
    "llava-v1.6-tiny-vicuna": ("full", "llama", True),
    "vicuna-tiny-base": ("language", "llama", False),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind(name: str) -> None:
    info = inspect(golden(f"checkpoints/{name}"))
    assert (info.kind, info.language_model, info.tower_in_checkpoint) == KINDS[name]
    assert info.needs_base == (info.kind in ("lora", "projector"))
    assert info.base_hint == ("checkpoints/vicuna-tiny-base" if info.needs_base else None)


def test_the_name_of_a_folder_means_nothing(tmp_path: Path) -> None:
    shutil.copytree(golden("checkpoints/llava-v1.5-tiny-vicuna"), tmp_path / "mpt-lora-mistral")
    info = inspect(tmp_path / "mpt-lora-mistral")
    assert (info.kind, info.language_model) == ("full", "llama")


def test_looking_into_a_folder_needs_no_torch() -> None:
    folder = golden("checkpoints/llava-v1.5-tiny-vicuna")
    program = (
        "import sys; from llava.model.checkpoints.inspect import inspect; inspect({!r}); print('torch' in sys.modules)"
    )
    code = program.format(str(folder))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("pattern", ["llava-*/*.bin", "llava-*/*.safetensors", "vision/*/*.bin"])
def test_headers_are_those_of_the_tensors(pattern: str) -> None:
    files = sorted(golden("checkpoints").glob(pattern))
    assert files
    for file in files:
        headers = read_headers(file)
        with open_tensors(file) as tensors:
            assert set(tensors.keys()) == set(headers)
            for name, header in headers.items():
                tensor = tensors.get_tensor(name)
                assert header.shape == tuple(tensor.shape)
                assert header.dtype == {torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_of_both_generations(tmp_path: Path, zipped: bool) -> None:
    state = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.nn.Parameter(torch.zeros(4))}
    torch.save(state, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    headers = read_headers(tmp_path / "w.bin")
    assert {name: (h.dtype, h.shape) for name, h in headers.items()} == {"a": ("BF16", (2, 3)), "b": ("F32", (4,))}
    with open_tensors(tmp_path / "w.bin") as tensors:
        assert torch.equal(tensors.get_tensor("a"), state["a"])


def test_old_configs_are_upgraded_in_memory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first release's config says `llama`; its weights are those of the linear-projector checkpoint."""
    shutil.copytree(golden("checkpoints/llava-v1-tiny-linear"), tmp_path / "v0")
    shutil.copy(golden("checkpoints/llava-v0-old/config.json"), tmp_path / "v0" / "config.json")
    before = (tmp_path / "v0" / "config.json").read_bytes()
    monkeypatch.chdir(golden("checkpoints").parent)
    old, new = load(tmp_path / "v0", device="cpu"), load(golden("checkpoints/llava-v1-tiny-linear"), device="cpu")
    assert old.info.has_legacy_config
    assert type(old.model).__name__ == "LlavaLlamaForCausalLM"
    assert old.model.config.model_type == "llava_llama"
    assert (tmp_path / "v0" / "config.json").read_bytes() == before
    state = new.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in old.model.state_dict().items())
    assert [old.tokenizer.convert_tokens_to_ids(t) for t in ("<im_patch>", "<im_start>", "<im_end>")] == [
        1000,
        1001,
        1002,
    ]


def test_the_type_llava_in_the_original_layout(tmp_path: Path) -> None:
    """Released 1.5 checkpoints say `llava`, the word that transformers now uses for its own layout."""
    folder = tiny.build(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    assert type(load(folder, device="cpu").model).__name__ == "LlavaLlamaForCausalLM"


# --- towers -----------------------------------------------------------------------------------------------------------


def test_where_a_tower_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, here = tmp_path / "checkpoint", tmp_path / "here"
    tiny.save_tower_config(checkpoint / "both")
    tiny.save_tower_config(here / "both")
    tiny.save_tower_config(here / "only-here")
    monkeypatch.chdir(here)
    assert resolve_vision_tower("both", checkpoint_folder=checkpoint) == str(checkpoint / "both")
    assert resolve_vision_tower("only-here", checkpoint_folder=checkpoint) == str(here / "only-here")
    assert resolve_vision_tower(str(here / "both"), checkpoint_folder=checkpoint) == str(here / "both")


def test_a_missing_tower_names_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        resolve_vision_tower("nobody/no-such-tower", checkpoint_folder=tmp_path / "c")
    for place in (tmp_path / "c" / "nobody/no-such-tower", tmp_path / "nobody/no-such-tower", "hub repository nobody/"):
        assert str(place) in str(caught.value)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_lora_is_merged_as_the_original_merges_it(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = load_file(require_golden("checkpoint_outputs/lora_merged_fp16.safetensors"))
    monkeypatch.chdir(golden("checkpoints").parent)
    ours = load(
        "checkpoints/llava-v1.5-tiny-lora", base="checkpoints/vicuna-tiny-base", device="cpu"
    ).model.state_dict()
    changed = 0
    base = load("checkpoints/vicuna-tiny-base", device="cpu").model.state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor.float(), atol=2e-3, rtol=2e-3)  # the recording is rounded to fp16
        changed += name in base and not torch.allclose(ours[name], base[name], atol=1e-4)
    assert changed == 14  # the seven linear layers of both blocks


PEFT_CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj"], "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "up_proj"], "use_dora": True},
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens"]},
    "whole modules": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_adapters_are_merged_as_peft_merges_them(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {key: tiny.CONFIG[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = LlamaConfig(**sizes, num_attention_heads=4)
    base = LlamaForCausalLM(config)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**PEFT_CASES[case], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, mean=1 if "magnitude" in name else 0, std=0.1)
    wrapped.save_pretrained(tmp_path)
    want = wrapped.merge_and_unload().state_dict()

    ours = LlamaForCausalLM(config)
    ours.load_state_dict(state)
    info = inspect(tmp_path)
    merge_into(ours, load_adapter(info.adapter, info.adapter_config or {}))
    got = ours.state_dict()
    assert any(not torch.equal(got[name], state[name]) for name in state)
    for name in state:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-5)


def test_lora_finds_the_base_that_its_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden("checkpoints").parent)
    for name in ("llava-v1.5-tiny-lora", "llava-v1.5-tiny-pretrain"):
        alone = load(f"checkpoints/{name}", device="cpu").model.state_dict()
        given = load(f"checkpoints/{name}", base="checkpoints/vicuna-tiny-base", device="cpu").model.state_dict()
        assert all(torch.equal(tensor, given[key]) for key, tensor in alone.items())


def test_image_tokens_that_pretraining_added(tmp_path: Path) -> None:
    """A projector file with `<im_start>` rows beside a base that has none: its rows are taken, the output's begin as a mean."""
    base = tiny.build(tmp_path / "base")
    whole = load_file(base / "model.safetensors")
    rows = torch.cat([whole["model.embed_tokens.weight"], torch.full((2, 64), 0.25)])
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    config = json.loads((base / "config.json").read_text())
    changes = {
        "vocab_size": 322,
        "mm_use_im_start_end": True,
        "unfreeze_mm_vision_tower": False,
        "_name_or_path": str(base),
    }
    _write_json(stage1 / "config.json", config | changes | {"mm_vision_tower": str(tiny.save_tower(tmp_path / "clip"))})
    projector = {name: tensor for name, tensor in whole.items() if "mm_projector" in name}
    torch.save(projector | {"model.embed_tokens.weight": rows}, stage1 / "mm_projector.bin")
    model = load(stage1, device="cpu").model
    assert torch.equal(model.get_input_embeddings().weight, rows)
    head = model.get_output_embeddings().weight
    assert torch.equal(head[:320], whole["lm_head.weight"])
    torch.testing.assert_close(head[321], whole["lm_head.weight"].mean(0))


def adapter_over(base: Path, folder: Path) -> Path:
    """An adapter as training writes it over a whole model: it changes one layer, and its config is the base's."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    _write_json(folder / "config.json", config | {"_name_or_path": str(base)})
    _write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "base_model_name_or_path": str(base),
        },
    )
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(2, 64), f"{prefix}.lora_B.weight": torch.full((64, 2), 0.5)},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_an_adapter_over_a_model_with_its_own_tower(tmp_path: Path) -> None:
    """The tower that was trained with the base is the base's, wherever the adapter lies."""
    base = tiny.build(tmp_path / "base")
    lora = load(adapter_over(base, tmp_path / "lora"), device="cpu")
    want = load(base, device="cpu").model.state_dict()
    got = lora.model.state_dict()
    changed = [name for name in want if not torch.equal(got[name], want[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(got[changed[0]], want[changed[0]] + 2.0)
    lora.save(tmp_path / "merged")
    again = load(tmp_path / "merged", device="cpu").model.state_dict()
    assert all(torch.equal(tensor, got[name]) for name, tensor in again.items())


def test_a_tower_that_is_declared_and_not_stored(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "m")
    tiny.save_tower(folder / "tower")
    state = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in state.items() if "vision_tower" not in name}, folder / "model.safetensors")
    loaded = load(folder, device="cpu").model
    name = "vision_model.embeddings.class_embedding"
    stored = load_file(folder / "tower" / "model.safetensors")[name]
    assert torch.equal(loaded.get_vision_tower().vision_tower.state_dict()[name], stored)
    assert loaded.config.unfreeze_mm_vision_tower is True


# --- names and numbers that reach the disk ----------------------------------------------------------------------------


def full_size_cases() -> list[Any]:
    records = json.loads(golden("full_size_state_dict_keys.json").read_text())
    return [pytest.param(record, id=name[:40]) for name, record in records.items()]


@pytest.mark.parametrize("record", full_size_cases())
def test_names_and_shapes_of_the_published_sizes(tmp_path: Path, record: dict[str, Any]) -> None:
    large_clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    tower = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 768} | large_clip
    _write_json(tmp_path / "config.json", tower)
    built = any("vision_tower" in name for name in record["state_dict"])
    config_class, model_class = llava_classes("llama")
    settings = {"mm_vision_tower": str(tmp_path), "unfreeze_mm_vision_tower": built}
    config = config_class.from_dict({k: v for k, v in record["config"].items() if k != "model_type"} | settings)
    with torch.device("meta"):
        model = model_class(config)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == record["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == record["n_params"]


def saved_names(folder: Path) -> dict[str, list[int]]:
    return {name: list(header.shape) for name, header in inspect(folder).tensors.items()}


@pytest.mark.parametrize("name", ["llava-tiny-mpt", "llava-v1.6-tiny-vicuna", "llava-v1-tiny-linear"])
def test_saving_keeps_published_names_and_settings(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden("checkpoints").parent)
    first = load(f"checkpoints/{name}", device="cpu")
    first.save(tmp_path / "saved")
    assert saved_names(tmp_path / "saved") == saved_names(golden(f"checkpoints/{name}"))
    old = json.loads(golden(f"checkpoints/{name}/config.json").read_text())
    new = json.loads((tmp_path / "saved" / "config.json").read_text())
    kept = [key for key in old if key.startswith(("mm_", "image_", "tokenizer_", "unfreeze_")) or key == "model_type"]
    assert {key: new[key] for key in kept if old[key] is not None} == {
        key: old[key] for key in kept if old[key] is not None
    }
    assert new["architectures"] == old["architectures"]
    again = load(tmp_path / "saved", device="cpu")
    state = first.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.model.state_dict().items())
    assert again.tokenizer("a <b>")["input_ids"] == first.tokenizer("a <b>")["input_ids"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("language_model", ["llama", "mistral", "qwen2", "qwen3", "mpt"])
def test_saving_and_loading_again_is_exact(tmp_path: Path, language_model: str, dtype: str) -> None:
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2} if language_model == "mpt" else {}
    first = load(tiny.build(tmp_path / "m", language_model, **sizes), device="cpu", dtype=dtype)
    first.save(tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu", dtype=dtype)
    model_class = type(first.model)
    straight = model_class.from_pretrained(tmp_path / "saved", dtype=dtype)
    state = first.model.state_dict()
    for other in (again.model, straight):
        assert other.dtype == first.model.dtype
        found = other.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "m")
    whole = load_file(folder / "model.safetensors")
    want = load(folder, device="cpu").model.state_dict()
    (folder / "model.safetensors").unlink()
    for part, names in enumerate([sorted(whole)[::2], sorted(whole)[1::2]], start=1):
        save_file({name: whole[name] for name in names}, folder / f"model-0000{part}-of-00002.safetensors")
    got = load(folder, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def test_loading_does_not_hold_on_to_the_files(tmp_path: Path) -> None:
    """A model may be saved over the folder that it came from."""
    folder = tiny.build(tmp_path / "m")
    loaded = load(folder, device="cpu")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def _write_json(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values, default=str))
    return path
