"""The arguments of `load_pretrained_model` that LLaVA-NeXT's builder and transformers have besides the original's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch

from llava.errors import InputError
from llava.model import device as device_module
from llava.model.builder import load, load_pretrained_model
from llava.model.checkpoints.hub import HubOptions
from llava.model.checkpoints.loading import TOO_LARGE
from llava.model.device import pick_placement
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny") / "llava-tiny")


def model_of(folder: Path, **options: Any) -> Any:
    return load_pretrained_model(str(folder), None, "llava", device="cpu", **options)[1]


def test_keys_of_the_config_are_overwritten(folder: Path) -> None:
    changes = {
        "mm_spatial_pool_stride": 2,  # of LLaVA-NeXT, unknown here
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": "(1x1),...,(2x2)",
        "tokenizer_model_max_length": 99,
        "conv_mode": "qwen_2_5",
    }
    with pytest.raises(InputError, match="image_newline"):  # it is stored in no file of this checkpoint
        model_of(folder, overwrite_config=changes)
    changes["mm_patch_merge_type"] = "spatial"
    loaded = load(folder, device="cpu", overwrite_config=changes)
    assert {key: getattr(loaded.model.config, key) for key in changes} == changes
    assert loaded.model.image_policy().pinpoints == ((28, 28), (28, 56), (56, 28), (56, 56))
    assert (loaded.context_len, loaded.conv_mode) == (99, "qwen_2_5")
    assert model_of(folder, overwrite_config=None).config.image_aspect_ratio == "pad"
    with pytest.raises(InputError, match="mm_vision_select_layer 'x'; it must be an integer"):
        model_of(folder, overwrite_config={"mm_vision_select_layer": "x"})


def test_rotary_embeddings_are_scaled_as_callers_of_llava_next_ask(folder: Path) -> None:
    ids = torch.arange(3, 20)[None]
    plain = model_of(folder)
    scaled = model_of(folder, overwrite_config={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert scaled.model.rotary_emb.inv_freq.tolist() == (plain.model.rotary_emb.inv_freq / 2).tolist()
    assert not torch.equal(scaled(ids).logits, plain(ids).logits)


def test_a_config_in_place_of_the_folder_s(folder: Path, tmp_path: Path) -> None:
    config = LlavaConfig.from_pretrained(folder)
    config.mm_vision_select_layer = -1
    file = tmp_path / "other.json"
    file.write_text(json.dumps(config.to_dict()))
    expected = model_of(folder, overwrite_config={"mm_vision_select_layer": -1})
    assert expected.get_vision_tower().select_layer == -1
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, -200, 9]])
    for given in (config, config.to_dict(), str(file), file):
        model = model_of(folder, customized_config=given)
        assert torch.equal(model(ids, images=pixels).logits, expected(ids, images=pixels).logits)
    both = model_of(folder, customized_config=config, overwrite_config={"mm_vision_select_layer": 0})
    assert both.get_vision_tower().select_layer == 0
    for wrong in ({"customized_config": 7}, {"overwrite_config": [1]}, {"overwrite_config": {1: 2}}):
        with pytest.raises(InputError, match="it must be an object with the keys"):
            model_of(folder, **wrong)
    with pytest.raises(InputError, match="no/file"):
        model_of(folder, customized_config="no/file.json")


def test_hub_options_reach_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The revision is that of the model; the tower's repository has revisions of its own."""
    outside = tiny.build(tmp_path / "outside")
    values = json.loads((outside / "config.json").read_text())
    values |= {"mm_vision_tower": "owner/tower", "unfreeze_mm_vision_tower": False}
    (outside / "config.json").write_text(json.dumps(values))
    model_of(folder).get_vision_tower().vision_tower.vision_model.save_pretrained(outside / "tower")
    calls = []

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append((repository, {key: value for key, value in options.items() if key != "allow_patterns"}))
        return str(outside if repository == "owner/model" else outside / "tower")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {"cache_dir": str(tmp_path), "local_files_only": True, "token": "t"}
    load_pretrained_model("owner/model", None, "llava", device="cpu", revision="v2", **options)
    assert dict(calls) == {"owner/model": {**options, "revision": "v2"}, "owner/tower": {**options, "revision": None}}
    calls.clear()
    load("owner/model", device="cpu", hub=HubOptions(cache_dir="elsewhere"))
    assert {options["cache_dir"] for _, options in calls} == {"elsewhere"}
    calls.clear()
    load_pretrained_model("owner/model", None, "llava", device="cpu", use_auth_token="u", revision=None)
    assert {(options["token"], options["revision"]) for _, options in calls} == {("u", None)}


def test_memory_limits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    limits: dict[int | str, int | str] = {0: "1GiB", "cuda:1": 5, "cpu": "2MB"}
    for device_map in (None, "auto", "balanced"):
        placement = pick_placement("cuda", device_map, needed_bytes=1, max_memory=limits)
        assert placement.max_memory == {0: 2**30, 1: 5, "cpu": 2_000_000}
        assert placement.device_map == (device_map or "auto")
    for wrong in ({0: "much"}, {0: None}):
        with pytest.raises(InputError, match="give bytes, or a text such as '10GiB'"):
            pick_placement("cuda", "auto", needed_bytes=1, max_memory=wrong)
    with pytest.raises(InputError, match="no such device"):
        pick_placement("cuda", "auto", needed_bytes=1, max_memory={7: "1GiB"})
    assert caplog.messages == []
    assert pick_placement("cuda", "cuda:1", needed_bytes=1, max_memory=limits).max_memory is None
    assert pick_placement("cpu", "auto", needed_bytes=1, max_memory=limits).max_memory is None
    assert [message.split(":")[0] for message in caplog.messages] == ["max_memory is not used"] * 2


def test_no_part_is_left_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "llava")
    assert model_of(folder, offload_folder="nowhere").device.type == "cpu"
    assert "offload_folder is not used" in caplog.text
    placed = device_module.Placement(torch.device("cpu"), "auto", {"cpu": 60_000})
    monkeypatch.setattr("llava.model.builder.pick_placement", lambda *args, **options: placed)
    with pytest.raises(InputError) as error:
        load(folder, device="cpu")
    assert str(error.value) == TOO_LARGE


def test_arguments_of_every_caller(folder: Path) -> None:
    quiet = {"multimodal": True, "low_cpu_mem_usage": True, "use_flash_attention_2": False, "use_safetensors": None}
    given = {"customized_config": None, "overwrite_config": None, "attn_implementation": None, "max_memory": None}
    tokenizer, model, _, _ = load_pretrained_model(str(folder), None, "llava", device_map="", **quiet, **given)
    assert (model.device.type, tokenizer.decode(tokenizer("a").input_ids[-1])) == ("cpu", "a")
    assert model_of(folder, torch_dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InputError, match="does not know the argument 'overwrite_configs'"):
        model_of(folder, overwrite_configs={})
    with pytest.raises(InputError, match="flash-attn"):
        model_of(folder, use_flash_attention_2=True)


@pytest.mark.parametrize("way", ["load", "from_pretrained", "transformers"])
def test_the_tower_has_the_attention_that_is_asked_for(folder: Path, way: str) -> None:
    def tower(**options: Any) -> Any:
        if way == "from_pretrained":
            return LlavaLlamaForCausalLM.from_pretrained(folder, **options).get_vision_tower()
        if way == "transformers":  # as quantized and sharded models are loaded
            options["device_map"] = {"": "cpu", "model": "cpu"}
        return load(folder, device="cpu", **options).model.get_vision_tower()

    assert tower(attn_implementation="eager").vision_tower.config._attn_implementation == "eager"
    assert tower().vision_tower.config._attn_implementation == "sdpa"
