"""Errors of loading: one sentence with the file, the tensor, and what was expected and found."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from golden_data import golden
from safetensors.torch import load_file, save_file

from llava.errors import InputError
from llava.model.builder import load, load_pretrained_model
from llava.model.checkpoints.inspect import inspect
from llava.model.checkpoints.weight_files import read_headers


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Path(shutil.copytree(whole, tmp_path / "model"))


def sentence(path: Path | str, *expected: str, **options: Any) -> str:
    """Load, and return the one sentence of the refusal, after checking that it holds what it must."""
    with pytest.raises(InputError) as caught:
        load(path, device="cpu", **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in expected:
        assert part in text, text
    return text


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def rewrite_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_no_such_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence("./no-such-folder", "there is no model folder './no-such-folder'")
    sentence(str(folder / "config.json"), "is a file")
    monkeypatch.chdir(folder.parent)
    sentence("model/missing-below-a-folder-that-exists", "there is no model folder")
    # Only what looks like a repository is looked for elsewhere, and not at all when working offline.
    sentence("nobody/nothing", "'nobody/nothing' was not found", str(folder.parent / "nobody"), "hub repository")


def test_no_network_for_a_local_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loading a local folder opened a connection")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(folder, device="cpu")


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    sentence(folder, "holds no config.json", str(folder))


@pytest.mark.parametrize("text", ["{ not json", "[1, 2]", ""])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    sentence(folder, str(folder / "config.json"), "JSON")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, "config.json"),
        ({"mm_projector_type": "mlp9x_relu"}, "'mlp9x_relu'"),
        ({"mm_vision_select_feature": "everything"}, "'everything'"),
        ({"mm_patch_merge_type": "bogus"}, "'bogus'"),
        ({"model_type": "llava_unheard_of"}, "'unheard_of'"),
        ({"mm_vision_tower": "nowhere/at/all"}, "'nowhere/at/all'"),
    ],
    ids=str,
)
def test_config_that_describes_no_model(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_config(folder, **changes)
    sentence(folder, message)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sentence(folder, "holds no weights", str(folder), "model.safetensors", "mm_projector.bin")


def test_folder_without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    sentence(folder, "tokenizer", str(folder))


# --- files ------------------------------------------------------------------------------------------------------------


def test_truncated_safetensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    text = sentence(folder, str(file), "truncated", f"ends at byte {size}", f"the file has {size - 100}")
    assert "tensor 'model." in text
    os.truncate(file, 50)
    sentence(folder, str(file), "truncated")
    os.truncate(file, 3)
    sentence(folder, str(file), "truncated", "3 bytes")


def safetensors_file(path: Path, header: Any, body: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"{ no json",
        b"[]",
        {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"t": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [1]}},
        {"t": "what"},
    ],
    ids=str,
)
def test_damaged_safetensors_headers(tmp_path: Path, header: Any) -> None:
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        read_headers(safetensors_file(tmp_path / "bad.safetensors", header, b"\0" * 8))


def test_an_announced_header_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "huge.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(InputError, match="announces a header of"):
        read_headers(file)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_run_nothing(folder: Path, tmp_path: Path, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "was-run"
    torch.save({"weight": Malicious(marker)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    sentence(folder, str(folder / "pytorch_model.bin"), "cannot be read")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"text, not weights", pickle.dumps({"a": 1}), b"PK\x03\x04 half a zip"], ids=repr
)
def test_corrupt_bin(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    sentence(folder, str(folder / "pytorch_model.bin"))


def test_truncated_bin(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(state, file)
    load(folder, device="cpu")
    os.truncate(file, file.stat().st_size // 2)
    sentence(folder, str(file), "cannot be read")


# --- indexes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden("checkpoints/llava-v1.6-tiny-vicuna"), tmp_path / "sharded"))


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    sentence(
        sharded, "model.safetensors.index.json", "model-00002-of-00003.safetensors", "does not exist", "tensor 'model."
    )
    (sharded / "model.safetensors.index.json").unlink()
    sentence(sharded, "lacks weight shard 2 of 3")


def test_index_that_names_absent_tensors(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.7.extra"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    sentence(sharded, str(file), "'model.layers.7.extra'", "model-00001-of-00003.safetensors", "does not hold it")


@pytest.mark.parametrize("weight_map", [None, {"a": "../../elsewhere.safetensors"}, {"a": 3}], ids=str)
def test_unusable_index(sharded: Path, weight_map: Any) -> None:
    file = sharded / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    sentence(sharded, str(file))


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_missing_tensor(folder: Path) -> None:
    rewrite_weights(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    sentence(folder, "'model.layers.1.mlp.up_proj.weight' [96, 64]", "in no weight file of", str(folder))


def test_tensor_of_another_shape(folder: Path) -> None:
    rewrite_weights(folder, lambda state: state.update({"model.norm.weight": torch.zeros(65)}))
    sentence(folder, str(folder / "model.safetensors"), "'model.norm.weight' has shape [65], expected [64]")


def test_projector_of_another_width(folder: Path) -> None:
    rewrite_weights(folder, lambda state: state.update({"model.mm_projector.0.weight": torch.zeros(64, 48)}))
    sentence(folder, "'model.mm_projector.0.weight' has shape [64, 48], expected [64, 32]")


def test_projector_of_another_depth(folder: Path) -> None:
    rewrite_config(folder, mm_projector_type="linear")
    sentence(folder, "'model.mm_projector.0.bias'", "mm_projector_type")


def test_one_layer_more_than_the_config_says(folder: Path) -> None:
    rewrite_config(folder, num_hidden_layers=1)
    sentence(folder, "'model.layers.1.input_layernorm.weight'", "number of layers")


def test_one_layer_less_than_the_config_says(folder: Path) -> None:
    rewrite_config(folder, num_hidden_layers=3)
    sentence(folder, "'model.layers.2.", "and 8 more")


def test_vocabulary_of_another_size(folder: Path) -> None:
    rewrite_config(folder, vocab_size=400)
    sentence(folder, "has shape [320, 64], expected [400, 64]")


def test_unexpected_tensors_are_refused(folder: Path) -> None:
    rewrite_weights(folder, lambda state: state.update({"model.vision_resampler.w": torch.zeros(1)}))
    sentence(folder, "'model.vision_resampler.w'", "is unexpected")


def test_tower_folder_without_weights(folder: Path) -> None:
    rewrite_config(folder, unfreeze_mm_vision_tower=False)
    sentence(folder, str(folder / "tower"), "holds no weights")


def test_tower_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "tower" / "config.json").read_text())
    (folder / "tower" / "config.json").write_text(json.dumps(config | {"image_size": 56}))
    sentence(folder, "makes images of 28 x 28 pixels", "takes 56 x 56")
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps({"size": 56, "crop_size": 56}))
    sentence(folder, "position_embedding.weight' has shape [5, 32], expected [17, 32]")


def test_the_same_refusals_when_weights_are_quantized(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    rewrite_weights(folder, lambda state: state.update({"model.norm.weight": torch.zeros(65)}))
    sentence(folder, "'model.norm.weight' has shape [65], expected [64]", quantization="8bit")


# --- bases ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(golden("checkpoints").parent)
    return Path(shutil.copytree("checkpoints/llava-v1.5-tiny-lora", tmp_path / "lora"))


def test_base_that_cannot_be_found(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lora)
    sentence(lora, str(lora), "needs its base model", "'checkpoints/vicuna-tiny-base'", "model_base")
    (lora / "adapter_config.json").write_text(
        json.dumps(json.loads((lora / "adapter_config.json").read_text()) | {"base_model_name_or_path": ""})
    )
    rewrite_config(lora, _name_or_path="")
    sentence(lora, "is a LoRA adapter", "pass the folder of its base model as model_base (--model-base)")


def test_base_of_another_width(lora: Path, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "other", hidden_size=128)
    sentence(lora, str(other / "model.safetensors"), "has shape", "expected", base=other)


def test_adapter_of_another_shape(lora: Path) -> None:
    file = lora / "adapter_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("q_proj.lora_A.weight"))
    state[name] = torch.zeros(8, 32)
    save_file(state, file)
    sentence(lora, str(file), "[64, 32]", "[64, 64]", "another base model")


def test_adapter_for_layers_that_the_base_lacks(lora: Path) -> None:
    file = lora / "adapter_model.safetensors"
    state = load_file(file)
    state |= {name.replace("layers.1.", "layers.9."): tensor for name, tensor in state.items() if "layers.1." in name}
    save_file({name: tensor.clone() for name, tensor in state.items()}, file)
    sentence(lora, str(file), "'model.layers.9.", "does not have")


def test_adapter_without_its_weights(lora: Path) -> None:
    (lora / "adapter_model.safetensors").unlink()
    sentence(lora, "adapter_config.json", "adapter_model.safetensors")


def test_base_that_is_no_base(lora: Path) -> None:
    sentence(lora, "without a language model", base="checkpoints/llava-v1.5-tiny-pretrain")


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float13"}, "'float13'"),
        ({"quantization": "3bit"}, "'3bit'"),
        ({"attn_implementation": "telepathy"}, "'telepathy'"),
        ({"device_map": {"model": "disk"}}, "disk"),
        ({"device_map": {"model": "cpu", "lm_head": "warp:9"}}, "warp:9"),
    ],
    ids=str,
)
def test_arguments(folder: Path, options: dict[str, Any], message: str) -> None:
    sentence(folder, message, **options)


def test_unknown_device(folder: Path) -> None:
    with pytest.raises(InputError, match="'abacus'"):
        load(folder, device="abacus")


def test_arguments_of_the_tuple(folder: Path) -> None:
    with pytest.raises(InputError, match="'load_2bit'"):
        load_pretrained_model(str(folder), None, "llava", load_2bit=True)
    with pytest.raises(InputError, match="exclude each other"):
        load_pretrained_model(str(folder), None, "llava", load_4bit=True, load_8bit=True)


@pytest.mark.skipif(__import__("importlib").util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_that_is_not_installed(folder: Path) -> None:
    with pytest.raises(InputError, match="pip install flash-attn"):
        load_pretrained_model(str(folder), None, "llava", use_flash_attn=True)


def test_projector_file_beside_a_text_only_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({"model.mm_projector.weight": torch.zeros(1)}, tmp_path / "mm_projector.bin")
    with pytest.raises(InputError, match="names no vision tower"):
        inspect(tmp_path)
