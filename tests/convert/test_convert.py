"""Conversions between the original layout and transformers': exact both ways, read by transformers' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE, golden
from PIL import Image
from safetensors.torch import load_file
from tiny import ANYRES, build
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipVisionConfig
from transformers_kit import (
    LLAMA_3,
    save_peer,
    small_granite_vision,
    small_llava,
    small_llava_next,
    small_next_video,
    small_onevision,
    small_vipllava,
)

from llava.assets import embedded_model_path
from llava.conversation import get_template
from llava.convert import writer
from llava.convert.convert import ConversionOptions, ConversionReport, convert
from llava.convert.describe import describe_checkpoint
from llava.convert.layouts.hf import NAME_RULES, HFLayout
from llava.convert.source import open_source
from llava.convert.verify import VerificationError, collapsed
from llava.errors import InputError
from llava.model.builder import load
from llava.model.checkpoints.hf_layout import published_name
from llava.model.checkpoints.inspect import inspect, stored_tensors
from llava.model.checkpoints.weight_files import read_tensor

ROOT = HERE.parents[1]
V15, V16 = "checkpoints/llava-v1.5-tiny-vicuna", "checkpoints/llava-v1.6-tiny-vicuna"
LORA, BASE = "checkpoints/llava-v1.5-tiny-lora", "checkpoints/vicuna-tiny-base"
IMAGES = ("demo.jpg", "counting.png", "wide.png")
QUESTIONS = ("What do you see in this picture?", "How many shapes are there?")


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def tensors_of(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: read_tensor(header) for name, header in stored_tensors(Path(folder)).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def embedded_in_theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConversionReport]:
    folder = tmp_path_factory.mktemp("theirs") / "llava-v1.5-tiny-hf"
    return folder, convert(embedded_model_path(), folder, to="transformers")


# To transformers


def test_their_class_and_processor_give_our_answers(embedded_in_theirs: tuple[Path, ConversionReport]) -> None:
    """Loaded by transformers alone, as a user would: the same prompts, ids, pixels, logits and answers."""
    folder, report = embedded_in_theirs
    assert report.logits is not None
    assert (report.tensors.largest, report.logits.largest, report.logits.pixels) == (0, 0, 0)
    processor = AutoProcessor.from_pretrained(folder)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(embedded_model_path(), device="cpu", dtype=torch.float32)
    assert ours.processor is not None
    for name, question in [(name, question) for name in IMAGES for question in QUESTIONS]:
        image = Image.open(ROOT / "images" / name)
        conversation = get_template(ours.conv_mode)
        conversation.append_message(conversation.roles[0], f"<image>\n{question}")
        conversation.append_message(conversation.roles[1], None)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == conversation.get_prompt()
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        mine = ours.processor(conversation, [image])
        image_token = theirs.config.image_token_id
        assert collapsed(inputs["input_ids"][0].tolist(), image_token) == mine.input_ids.tolist()
        assert torch.equal(inputs["pixel_values"], mine.images)
        with torch.no_grad():
            logits = theirs(**inputs).logits[0]
            expected = ours.model(mine.input_ids[None], images=mine.images, image_sizes=mine.image_sizes).logits[0]
            torch.testing.assert_close(logits[:, : expected.shape[1]], expected, atol=1e-4, rtol=0)
            answer = theirs.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
            told = ours.model.generate(mine.input_ids[None], images=mine.images, image_sizes=mine.image_sizes,
                                       do_sample=False, max_new_tokens=40)[0]  # fmt: skip
        assert answer.tolist() == told.tolist()
        assert processor.decode(answer, skip_special_tokens=True) == ours.tokenizer.decode(
            told, skip_special_tokens=True
        )


@pytest.mark.parametrize("names", NAME_RULES)
@pytest.mark.parametrize("checkpoint", [V15, V16])
def test_every_kind_of_names_is_loaded_by_transformers(checkpoint: str, names: str, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "theirs", to="transformers", options=ConversionOptions(names=names))
    model, loading = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, output_loading_info=True
    )
    # The tower's last norm is in files and classes of some versions, and used by none.
    assert not [name for name in loading["missing_keys"] if "post_layernorm" not in name]
    assert not [name for name in loading["unexpected_keys"] if "post_layernorm" not in name]
    expected = {name: read_tensor(header) for name, header in inspect(tmp_path / "theirs").tensors.items()}
    for name, tensor in model.state_dict().items():
        if name.startswith(("model.", "lm_head")):
            assert torch.equal(tensor, expected[published_name(name)].float()), name


def test_what_today_s_version_saves_is_read_again(
    embedded_in_theirs: tuple[Path, ConversionReport], tmp_path: Path
) -> None:
    """Loaded by transformers, saved by it, converted back: the tensors of the beginning."""
    folder, _ = embedded_in_theirs
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "ours", to="original")
    found = tensors_of(tmp_path / "ours")
    for name, tensor in tensors_of(embedded_model_path()).items():
        if "post_layernorm" not in name:
            rows = (
                found[name][: len(tensor)] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else found[name]
            )
            assert torch.equal(rows, tensor), name
    assert load(tmp_path / "ours", device="cpu").model.image_policy().mode == "pad"


def test_vocabulary_as_in_published_conversions(tmp_path: Path) -> None:
    """A model with 32000 rows gets 32064; <image> and <pad> are 32000 and 32001; new rows never win."""
    source = build(tmp_path / "source", vocab_size=259)
    convert(source, tmp_path / "theirs", to="transformers")
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (values["image_token_index"], values["pad_token_id"]) == (259, 260)
    assert values["text_config"]["vocab_size"] == 320
    head = tensors_of(tmp_path / "theirs")["language_model.lm_head.weight"]
    torch.testing.assert_close(head[259:], head[:259].mean(dim=0).expand(61, -1))


# There and back


PAIRS = [(checkpoint, names) for checkpoint in (V15, V16) for names in NAME_RULES]
PAIRS += [(checkpoint, "4.36") for checkpoint in ("embedded", "chatml", "qwen2", "mistral", "llama_3", "next_video")]
PAIRS += [("onevision", names) for names in NAME_RULES]
BUILT: dict[str, dict[str, Any]] = {
    "qwen2": {"language_model": "qwen2"},
    "mistral": {"language_model": "mistral"},
    "chatml": {"language_model": "llama"},
    "llama_3": {"language_model": "llama", "conv_mode": "llava_llama_3", "rope_parameters": LLAMA_3},
    "next_video": {"language_model": "llama", "mm_spatial_pool_mode": "average", "mm_newline_position": "no_token",
                   "mm_spatial_pool_before_projector": True},
    "onevision": {"language_model": "qwen2", "siglip": True, "image_aspect_ratio": "anyres_max_9", "model_type": "llava_qwen",
                  "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token", "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize(("checkpoint", "names"), PAIRS)
def test_round_trips_are_exact(checkpoint: str, names: str, tmp_path: Path) -> None:
    if checkpoint in BUILT:
        values = {"conv_mode": "chatml_direct", "vocab_size": 259} | ANYRES | BUILT[checkpoint]
        source = build(tmp_path / "source", values.pop("language_model"), **values)
    else:
        source = embedded_model_path() if checkpoint == "embedded" else Path(checkpoint)
    convert(source, tmp_path / "theirs", to="transformers", options=ConversionOptions(names=names, shard_bytes=10**5))
    report = convert(tmp_path / "theirs", tmp_path / "ours", to="original")
    assert report.tensors.largest == 0
    found, expected = tensors_of(tmp_path / "ours"), tensors_of(source)
    # A tower that lay in a folder of its own is in the checkpoint now; its numbers are compared there.
    inner = "model.vision_tower."
    towers = {name: found.pop(name) for name in list(found) if name.startswith(inner)}
    own = {name: expected.pop(name) for name in list(expected) if name.startswith(inner)}
    assert_same(found, expected)
    assert towers
    if own:
        assert_same(towers, own)
    before, after = load(source, device="cpu"), load(tmp_path / "ours", device="cpu")
    assert after.model.image_policy() == before.model.image_policy()
    assert after.model.video_policy() == before.model.video_policy()
    assert after.image_processor == before.image_processor
    assert (after.conv_mode, after.context_len) == (before.conv_mode, before.context_len)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            assert (tmp_path / "ours" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("generation", ["today", "4.3x", "4.5x"])
@pytest.mark.parametrize("kind", ["llava", "siglip", "next", "onevision", "next_video", "vipllava", "granite"])
def test_their_checkpoints_to_ours_and_back(kind: str, generation: str, tmp_path: Path) -> None:
    """Of files that we did not write: no tensor changes, no row of the vocabulary is added or lost."""
    tower = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                               image_size=28, patch_size=14)  # fmt: skip
    makers = {
        "llava": small_llava,
        "siglip": lambda: small_llava("qwen2", strategy="full", tower=tower),
        "next": small_llava_next,
        "onevision": small_onevision,
        "next_video": small_next_video,
        "vipllava": small_vipllava,
        "granite": small_granite_vision,
    }
    peer_model = makers[kind]()
    peer = save_peer(tmp_path / "theirs", peer_model, generation)
    convert(peer, tmp_path / "ours", to="original")
    assert inspect(tmp_path / "ours").kind == "full"
    report = convert(tmp_path / "ours", tmp_path / "again", to="transformers")
    assert (report.video_logits is not None) == (kind in ("onevision", "next_video"))
    assert inspect(tmp_path / "again").config["architectures"] == [type(peer_model).__name__]
    found = {published_name(name): tensor for name, tensor in tensors_of(tmp_path / "again").items()}
    assert_same(found, {published_name(name): tensor for name, tensor in tensors_of(peer).items()})


def test_learned_ends_are_a_part_of_the_projector(tmp_path: Path) -> None:
    """The newline, and the end of frames that LLaVA-NeXT's faster videos have."""
    faster = {"add_faster_video": True, "faster_token_stride": 2, "mm_newline_position": "grid"}
    source = build(tmp_path / "source", **ANYRES, **faster)
    convert(source, tmp_path / "projector", to="projector")
    stored = torch.load(tmp_path / "projector" / "mm_projector.bin")
    assert {"model.image_newline", "model.faster_token"} < set(stored)
    base = build(tmp_path / "base", seed=1, **ANYRES, **faster)
    model = load(tmp_path / "projector", base=base, device="cpu").model
    assert torch.equal(model.get_model().faster_token, stored["model.faster_token"])
    convert(source, tmp_path / "delta", to="delta", base=base)
    convert(tmp_path / "delta", tmp_path / "again", to="from-delta", base=base)
    ends = describe_checkpoint(source).parameters["projector"] - sum(
        tensor.numel() for name, tensor in stored.items() if "mm_projector" in name
    )
    assert ends == 2 * 64
    with pytest.raises(InputError, match="add_faster_video"):
        convert(source, tmp_path / "theirs", to="transformers")


def test_videos_that_no_class_reduces_are_refused(tmp_path: Path) -> None:
    """LLaVA-Video's newlines after each row: neither OneVision's class nor LLaVA-NeXT-Video's has them."""
    rows = {"image_aspect_ratio": "anyres_max_9", "mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}
    source = build(tmp_path / "source", "qwen2", siglip=True, **ANYRES | rows)
    assert "as LLaVA-Video" in str(describe_checkpoint(source).facts["kind"])
    with pytest.raises(InputError, match="cannot express videos reduced by average behind the projector"):
        convert(source, tmp_path / "theirs", to="transformers")
    convert(source, tmp_path / "pair", to="gguf")
    assert load(tmp_path / "pair", device="cpu").model.video_policy() == load(source, device="cpu").model.video_policy()


# Adapters, towers, shards, precision


def test_an_adapter_is_merged_on_the_way(tmp_path: Path) -> None:
    convert(LORA, tmp_path / "merged", to="original", base=BASE, options=ConversionOptions(tower="in"))
    convert(LORA, tmp_path / "theirs", to="transformers", base=BASE)
    merged = tensors_of(tmp_path / "merged")
    recorded = load_file(golden("checkpoint_outputs/lora_merged_fp16.safetensors"))
    for name, tensor in recorded.items():
        torch.testing.assert_close(merged[name].half(), tensor, atol=1e-4, rtol=2e-3)
    theirs = {published_name(name): tensor for name, tensor in tensors_of(tmp_path / "theirs").items()}
    for name, tensor in merged.items():
        assert torch.equal(theirs[name][: len(tensor)], tensor), name


def test_the_tower_out_and_in_again(tmp_path: Path) -> None:
    source = embedded_model_path()
    convert(source, tmp_path / "out", to="original", options=ConversionOptions(tower="out"))
    assert not [name for name in tensors_of(tmp_path / "out") if "vision_tower" in name]
    assert (tmp_path / "out" / "vision_tower" / "model.safetensors").is_file()
    convert(tmp_path / "out", tmp_path / "kept", to="original")
    assert_same(tensors_of(tmp_path / "kept" / "vision_tower"), tensors_of(tmp_path / "out" / "vision_tower"))
    convert(tmp_path / "kept", tmp_path / "in", to="original", options=ConversionOptions(tower="in"))
    assert_same(tensors_of(tmp_path / "in"), tensors_of(source))


def test_shards_and_precision(tmp_path: Path) -> None:
    convert(V15, tmp_path / "small", to="original", options=ConversionOptions(shard_bytes=50_000, dtype="bf16"))
    files = sorted(file.name for file in (tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 5
    assert all((tmp_path / "small" / name).stat().st_size < 200_000 for name in files)
    for name, tensor in tensors_of(V15).items():
        assert torch.equal(tensors_of(tmp_path / "small")[name], tensor.to(torch.bfloat16)), name
    record = json.loads((tmp_path / "small" / "conversion.json").read_text())
    assert 0 < record["tensors"]["largest"] < 0.01
    assert json.loads((tmp_path / "small" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert(tmp_path / "small", tmp_path / "one", to="original")
    assert_same(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "small"))


def test_a_verification_that_was_skipped_is_recorded(tmp_path: Path) -> None:
    report = convert(V15, tmp_path / "x", to="transformers", options=ConversionOptions(verification="tensors"))
    assert report.logits is None
    assert json.loads((tmp_path / "x" / "conversion.json").read_text())["logits"] == "not compared"


# What the verification finds


def broken_pieces(header: Any) -> Any:
    for number, piece in enumerate(PIECES(header)):
        yield bytes([piece[0] ^ 1]) + piece[1:] if number == 0 and header.name == "model.norm.weight" else piece


PIECES = writer.pieces


def test_a_changed_byte_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "pieces", broken_pieces)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        convert(V16, tmp_path / "x", to="original")
    assert list(tmp_path.iterdir()) == []


def test_a_swapped_projector_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = tuple(
        (p, r.replace("linear_1", "linear_9").replace("linear_2", "linear_1")) for p, r in NAME_RULES["4.36"]
    )
    swapped = tuple((p, r.replace("linear_9", "linear_2")) for p, r in swapped)
    monkeypatch.setitem(NAME_RULES, "4.36", swapped)
    with pytest.raises((VerificationError, InputError)):
        convert(V15, tmp_path / "x", to="transformers")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_chat_template_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFLayout, "chat_template", lambda self: "USER: {{ messages[0]['content'] }}")
    with pytest.raises(VerificationError, match="chat template"):
        convert(V15, tmp_path / "x", to="transformers")


# Names


@pytest.mark.parametrize("names", NAME_RULES)
def test_names_of_real_sizes_come_back(names: str) -> None:
    """For the tensors of published models of 7B and 13B: each has one name of its own, and it leads back."""
    layout = HFLayout(open_source(V15), names=names)
    recorded = json.loads(golden("full_size_state_dict_keys.json").read_text())
    for model in recorded.values():
        ours = list(model["state_dict"])
        theirs = [layout.target_name(name) for name in ours]
        assert len(set(theirs)) == len(ours)
        assert [published_name(name) for name in theirs] == ours


def test_kept_files_that_no_longer_fit_are_ignored(tmp_path: Path) -> None:
    convert(V15, tmp_path / "theirs", to="transformers")
    kept = tmp_path / "theirs" / "original" / "config.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "num_hidden_layers": 7}))
    convert(tmp_path / "theirs", tmp_path / "ours", to="original")
    assert tensors_of(tmp_path / "ours")["lm_head.weight"].shape[0] == 1024
    shutil.rmtree(kept.parent)
    convert(tmp_path / "theirs", tmp_path / "again", to="original")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "ours"))
