"""Values of config files that this package cannot read: loading and `llava info` say so in one and the same sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ANYRES, build
from torch import nn
from transformers_kit import save_peer, small_llava

from llava.convert.describe import describe_checkpoint
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.model.builder import load
from llava.model.checkpoints import loading
from llava.model.config import KEYS_BY_TYPE, TYPES_BY_KEY, LlavaSettings, check_types
from llava.model.multimodal_projector.builder import PROJECTORS

OTHER = {"number": 5, "word": "x", "list": [1, "a"], "object": {"a": 1}, "true": True, "float": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("values") / "model", **ANYRES)


def change(file: Path, **values: object) -> dict[str, object]:
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | values))
    return before


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sentence of loading, which reads no weight before it, and of `llava info`."""

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patched:
        patched.setattr(loading, "open_tensors", no_weights)
        with pytest.raises(InputError) as of_loading:
            load(folder, device="cpu")
    with pytest.raises(InputError) as of_info:
        describe_checkpoint(folder)
    assert str(of_loading.value) == str(of_info.value)
    assert "\n" not in str(of_info.value)
    return str(of_info.value)


@pytest.mark.parametrize("key", TYPES_BY_KEY)
def test_a_value_of_another_type(folder: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    words, kind = TYPES_BY_KEY[key]
    for value in OTHER.values():
        if isinstance(value, kind) and not (kind is int and value is True):
            continue
        before = change(folder / "config.json", **{key: value})
        try:
            said = refusal(folder, monkeypatch)
            assert said == f"{folder / 'config.json'} has {key} {value!r}; it must be {words}"
            found = examine_checkpoint(folder, quick=True).findings[0]
            assert (found.code, found.what) == ("config-value", said)
        finally:
            (folder / "config.json").write_text(json.dumps(before))


def test_settings_that_nothing_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build(tmp_path / "model")
    change(
        folder / "config.json",
        mm_token_pruning=0.5,
        mm_compression=None,
        mm_projector_lr=1e-5,
        mm_newline_position="grid",
    )
    load(folder, device="cpu")
    assert f"{folder / 'config.json'} has settings that are not used: mm_token_pruning" in caplog.messages
    assert describe_checkpoint(folder).facts["settings not used"] == ["mm_token_pruning"]


def test_null_counts_as_absent() -> None:
    keys = {key for _, names in KEYS_BY_TYPE.values() for key in names}
    check_types(dict.fromkeys(keys), "config.json")
    assert LlavaSettings.from_hf(object()) == LlavaSettings.from_hf(type("Config", (), dict.fromkeys(keys))())


def test_values_within_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = save_peer(tmp_path, small_llava())
    values = json.loads((peer / "config.json").read_text())
    for part, key in (("text_config", "hidden_size"), ("vision_config", "image_size")):
        change(peer / "config.json", **values | {part: values[part] | {key: "28"}})
        assert refusal(peer, monkeypatch).endswith(f"config.json has {key} '28'; it must be an integer")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("image_grid_pinpoints", 5, "image_grid_pinpoints 5"),
        ("image_grid_pinpoints", [28, 56], "image_grid_pinpoints"),
        ("s2_scales", [], "s2_scales"),
        ("s2_scales", "a,b", "s2_scales"),
        ("mm_vision_select_feature", "x", "mm_vision_select_feature 'x'"),
        ("image_aspect_ratio", "x", "image_aspect_ratio is 'x'"),
        ("mm_patch_merge_type", "x", "mm_patch_merge_type 'x'"),
        ("mm_vision_tower", None, "no mm_vision_tower"),
    ],
)
def test_a_value_that_is_not_supported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object, words: str
) -> None:
    before = change(folder / "config.json", **{key: value} | ({"s2": True} if key == "s2_scales" else {}))
    try:
        assert words in refusal(folder, monkeypatch)
    finally:
        (folder / "config.json").write_text(json.dumps(before))


@pytest.mark.parametrize("hidden_act", ["x", 5])
def test_values_that_transformers_refuses(folder: Path, hidden_act: object) -> None:
    before = change(folder / "config.json", hidden_act=hidden_act)
    try:
        with pytest.raises(InputError, match=r"config\.json.*hidden_act"):
            load(folder, device="cpu")
    finally:
        (folder / "config.json").write_text(json.dumps(before))


def test_a_projector_that_a_user_adds_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table is enough, as docs/extend.md says."""
    monkeypatch.setitem(
        PROJECTORS, "wide", lambda vision, text: nn.Sequential(nn.Linear(vision, text), nn.LayerNorm(text))
    )
    folder = build(tmp_path / "model", mm_projector_type="wide")
    assert isinstance(load(folder, device="cpu").model.get_model().mm_projector[1], nn.LayerNorm)
    assert describe_checkpoint(folder).facts["projector"].startswith("wide")
    monkeypatch.delitem(PROJECTORS, "wide")
    assert refusal(folder, monkeypatch).startswith("unknown mm_projector_type 'wide'; known: linear, identity")


# --- the image processor and the tower ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [14, 56])
def test_an_image_processor_of_another_size_than_the_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    folder = build(tmp_path / "model")
    file = folder / "tower" / "preprocessor_config.json"
    change(file, crop_size={"height": side, "width": side})
    said = refusal(folder, monkeypatch)
    assert all(words in said for words in (f"{side} x {side}", "28 x 28", str(folder / "tower")))
    change(file, do_center_crop=False, size={"height": side, "width": side})
    assert f"{side} x {side}" in refusal(folder, monkeypatch)
    change(file, size={"shortest_edge": 28})  # images of any shape, which a square one fits
    load(folder, device="cpu")


def test_an_image_processor_of_a_folder_in_the_layout_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = save_peer(tmp_path, small_llava())
    (peer / "preprocessor_config.json").write_text(json.dumps({"size": 14, "crop_size": 14}))
    assert "14 x 14" in refusal(peer, monkeypatch)


@pytest.mark.parametrize("field", ["do_resize", "resample", "rescale_factor", "image_mean", "image_std", "extra"])
@pytest.mark.parametrize("value", ["x", [1, "a"], {"a": "b"}])
def test_fields_of_an_image_processor(field: str, value: object) -> None:
    if field == "extra" and isinstance(value, dict):
        return
    with pytest.raises(InputError, match=field):
        ClipImageProcessor.from_dict({field: value})


@pytest.mark.parametrize("name", [5, ["CLIPImageProcessor"]])
def test_the_type_of_an_image_processor(name: object) -> None:
    with pytest.raises(InputError, match="not a name"):
        ClipImageProcessor.from_dict({"image_processor_type": name})


@pytest.mark.parametrize("key", ["image_size", "patch_size"])
def test_a_tower_without_a_size(tmp_path: Path, key: str) -> None:
    folder = build(tmp_path / "model")
    change(folder / "tower" / "config.json", **{key: None})
    with pytest.raises(InputError, match=f"no {key}"):
        load(folder, device="cpu")
    describe_checkpoint(folder)


# --- the index of shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight_map", [None, 5, ["a"], {"lm_head.weight": 5}, {"lm_head.weight": "../model.safetensors"}]
)
def test_an_index_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_map: object) -> None:
    folder = build(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in refusal(folder, monkeypatch)


@pytest.mark.parametrize("of_tower", [False, True])
def test_an_index_that_names_a_missing_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_tower: bool) -> None:
    folder = build(tmp_path / "model", unfreeze_mm_vision_tower=not of_tower)
    state = load_file(folder / "model.safetensors")
    shard = "model-00001-of-00002.safetensors"
    places = dict.fromkeys(state, shard) | {"lm_head.weight": "model-00002-of-00002.safetensors"}
    place = folder / "tower" if of_tower else folder
    save_file(state, place / shard, metadata={"format": "pt"})
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "00002-of-00002.safetensors, which does not exist" in refusal(folder, monkeypatch)


def test_a_config_without_its_text_part_has_transformers_defaults(tmp_path: Path) -> None:
    """Those of a model of 7 billion parameters, which this one is not."""
    folder = save_peer(tmp_path, small_llava())
    change(folder / "config.json", text_config=None)
    with pytest.raises(InputError, match=r"is in no weight file"):
        load(folder, device="cpu", dtype=torch.float32)
