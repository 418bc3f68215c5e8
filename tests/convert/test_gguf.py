"""GGUF pairs: every tensor and field read back by our reader and the gguf package, and by llama.cpp where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from golden_data import HERE, golden
from tiny import build

from llava.assets import embedded_model_path
from llava.convert.chat_template import chat_template
from llava.convert.convert import ConversionOptions, convert
from llava.convert.gguf import blocks as gguf_blocks
from llava.convert.gguf.blocks import pack
from llava.convert.gguf.pair import UNUSED
from llava.convert.gguf.tokenizer import byte_level_notes
from llava.convert.sentencepiece_file import ScoredPiece, read_sentencepiece
from llava.model.builder import load
from llava.model.checkpoints.gguf.blocks import dequantize
from llava.model.checkpoints.gguf.file import read_gguf_header
from llava.model.checkpoints.gguf.names import gguf_name, interleave, is_vision, uninterleave
from llava.model.checkpoints.gguf.tokenizer import BPE, UNIGRAM

V15, V16 = "checkpoints/llava-v1.5-tiny-vicuna", "checkpoints/llava-v1.6-tiny-vicuna"


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def pair_of(folder: Path) -> tuple[Path, Path]:
    (vision,) = folder.glob("mmproj-*.gguf")
    (text,) = [file for file in folder.glob("*.gguf") if file != vision]
    return text, vision


def stored(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a file in single precision, by the gguf package."""
    return {
        item.name: gguf.dequantize(item.data, item.tensor_type).reshape(tuple(reversed(item.shape.tolist())))
        for item in gguf.GGUFReader(file).tensors
    }


def fields(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "q8_0"])
def test_every_tensor_is_the_checkpoint_s(precision: str, tmp_path: Path) -> None:
    """Put together by hand, with llama.cpp's names written out here, from what our loader gives."""
    report = convert(
        embedded_model_path(), tmp_path / "pair", to="gguf", options=ConversionOptions(precision=precision)
    )
    text, vision = pair_of(tmp_path / "pair")
    found = {**stored(text), **stored(vision)}
    state = {name: tensor.numpy() for name, tensor in
             load(embedded_model_path(), device="cpu", dtype=torch.float32).model.state_dict().items()}  # fmt: skip
    tower = "model.vision_tower.vision_tower.vision_model."
    expected = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
        "v.class_embd": state[tower + "embeddings.class_embedding"],
        "v.patch_embd.weight": state[tower + "embeddings.patch_embedding.weight"],
        "v.position_embd.weight": state[tower + "embeddings.position_embedding.weight"],
        "v.pre_ln.weight": state[tower + "pre_layrnorm.weight"],
        "v.pre_ln.bias": state[tower + "pre_layrnorm.bias"],
    }
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
    for layer in range(6):
        for theirs, ours in parts.items():
            matrix = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):  # rows of each of the five heads: 0, 32, 1, 33, ...
                order = [head * 64 + half * 32 + i for head in range(5) for i in range(32) for half in range(2)]
                matrix = matrix[order]
            expected[f"blk.{layer}.{theirs}.weight"] = matrix
    seen = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
            "attn_out": "self_attn.out_proj", "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2"}  # fmt: skip
    for layer in range(8):
        for theirs, ours in seen.items():
            for kind in ("weight", "bias"):
                expected[f"v.blk.{layer}.{theirs}.{kind}"] = state[f"{tower}encoder.layers.{layer}.{ours}.{kind}"]
    for number in (0, 2):
        for kind in ("weight", "bias"):
            expected[f"mm.{number}.{kind}"] = state[f"model.mm_projector.{number}.{kind}"]
    assert found.keys() == expected.keys()
    tolerance = {"f32": 0, "f16": 0, "bf16": 2**-8, "q8_0": 1 / 127}[
        precision
    ]  # the checkpoint itself is in half precision
    for name, numbers in expected.items():
        np.testing.assert_allclose(found[name], numbers, rtol=0, atol=tolerance * np.abs(numbers).max(), err_msg=name)
    assert report.logits is not None
    assert report.logits.same_token >= report.logits.num_positions - 3
    # The same head by a reader that shares nothing with the package.
    for file in (text, vision):
        head, theirs = read_gguf_header(file, longest=10**6), gguf.GGUFReader(file)
        assert {name: (t.shape, t.kind) for name, t in head.tensors.items()} == {
            item.name: (tuple(reversed(item.shape.tolist())), item.tensor_type.name) for item in theirs.tensors
        }
        assert {name: value for name, value in fields(file).items() if not name.startswith("GGUF.")} == dict(head.keys)


def test_fields(tmp_path: Path) -> None:
    convert(embedded_model_path(), tmp_path / "pair", to="gguf")
    text, vision = (fields(file) for file in pair_of(tmp_path / "pair"))
    pieces = list(read_sentencepiece(embedded_model_path() / "tokenizer.model").pieces)
    # llama.cpp's tokenizer for this kind of model knows no bytes: the ASCII ones without a piece are letters for it.
    known = {piece.text for piece in pieces if piece.kind == 1}
    for byte in (byte for byte in range(1, 128) if byte != 32 and chr(byte) not in known):
        lowest = min(piece.score for piece in pieces[259:]) - 10
        pieces[3 + byte] = ScoredPiece(chr(byte), pytest.approx(lowest, abs=1e-5), 1)
    assert {key: text[key] for key in text if not key.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "llava-v1.5-tiny",
        "general.file_type": 1,
        "llava.language_model": "llama",
        "llava.tokenizer_model_max_length": 1024,
        "llava.tokenizer.legacy": True,
        "llama.context_length": 2048,
        "llama.embedding_length": 320,
        "llama.block_count": 6,
        "llama.feed_forward_length": 1024,
        "llama.attention.head_count": 5,
        "llama.attention.head_count_kv": 5,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 1436,
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [
            pytest.approx(piece.score, abs=1e-5) if isinstance(piece.score, float) else piece.score for piece in pieces
        ],
        "tokenizer.ggml.token_type": [piece.kind for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "tokenizer.chat_template": chat_template("v1", "<image>"),
    }
    assert {key: vision[key] for key in vision if key.startswith("clip.")} == {
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.vision.feature_layer": [7],
        "clip.vision.image_aspect_ratio": "pad",
        "clip.use_gelu": False,
        "clip.vision.image_size": 112,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 320,
        "clip.vision.feed_forward_length": 1280,
        "clip.vision.projection_dim": 320,
        "clip.vision.block_count": 8,
        "clip.vision.attention.head_count": 5,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "clip.vision.image_mean": pytest.approx([0.48145466, 0.4578275, 0.40821073]),
        "clip.vision.image_std": pytest.approx([0.26862954, 0.26130258, 0.27577711]),
    }


def test_tiles_and_other_layers(tmp_path: Path) -> None:
    convert(V16, tmp_path / "tiles", to="gguf")
    _, vision = (fields(file) for file in pair_of(tmp_path / "tiles"))
    assert vision["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert vision["clip.vision.image_grid_pinpoints"] == [56, 112, 112, 56, 112, 112, 168, 56, 56, 168]
    assert "v.image_newline" in stored(pair_of(tmp_path / "tiles")[1])
    convert(build(tmp_path / "last", mm_vision_select_layer=-1), tmp_path / "x", to="gguf")
    assert fields(pair_of(tmp_path / "x")[1])["clip.vision.feature_layer"] == [3]
    text = json.loads((tmp_path / "tiles" / "conversion.json").read_text())
    assert any("newlines" in note for note in text["notes"])


def test_types_of_sentencepiece_files() -> None:
    mini = read_sentencepiece(golden("tokenizers/llama-mini1k-legacy") / "tokenizer.model")
    assert (mini.kind, len(mini.pieces)) == (BPE, 1000)
    assert mini.pieces[259] == ("▁t", 0.0, 1)
    assert mini.pieces[3] == ("<0x00>", 0.0, 6)
    assert read_sentencepiece(embedded_model_path() / "tokenizer.model").kind == UNIGRAM


def test_interleaved_rows_rotate_as_halves_do() -> None:
    """Rotating pairs of neighbours with reordered rows is rotating halves with rows as they are (Su et al. 2021)."""
    heads, size, position = 3, 8, 11.0
    rows, hidden = torch.randn(heads * size, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    angles = position * 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) * 2 / size)
    halves = (rows @ hidden).reshape(heads, 2, size // 2)
    a, b = halves[:, 0], halves[:, 1]
    turned = torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)
    pairs = (interleave(rows, heads) @ hidden).reshape(heads, size // 2, 2)
    c, d = pairs[..., 0], pairs[..., 1]
    neighbours = torch.stack([c * angles.cos() - d * angles.sin(), d * angles.cos() + c * angles.sin()], dim=-1)
    torch.testing.assert_close(neighbours.transpose(1, 2), turned)
    assert torch.equal(uninterleave(interleave(rows, heads), heads), rows)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_numbers_are_packed_as_the_package_packs_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "CHUNK", 1000)  # in several parts
    numbers = torch.randn(37, 96) * torch.logspace(-6, 2, 37)[:, None]
    numbers[3] = 0
    numbers[5, :4] = torch.tensor([0.5, 1.5, -0.5, 127.0])  # halves, where roundings differ
    stored = pack(gguf, numbers, kind)
    expected = gguf.quantize(numbers.numpy(), gguf.GGMLQuantizationType[kind])
    assert stored.tobytes() == expected.tobytes()
    theirs = gguf.dequantize(expected, gguf.GGMLQuantizationType[kind])
    found = dequantize(torch.from_numpy(np.frombuffer(stored.tobytes(), dtype=np.uint8).copy()), kind, (37, 96))
    assert torch.equal(found.float(), torch.from_numpy(theirs.copy()))


def test_names_of_real_sizes() -> None:
    """Every tensor of the published 7B and 13B has one name, which the gguf package's own tables know for it."""
    recorded = json.loads(golden("full_size_state_dict_keys.json").read_text())
    text = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 40)
    vision = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 24)
    for model in recorded.values():
        ours = [name for name in model["state_dict"] if not UNUSED.match(name)]
        theirs = [gguf_name(name) for name in ours]
        assert None not in theirs
        assert len(set(theirs)) == len(ours)
        for name, target in zip(ours, theirs, strict=True):
            if "mm_projector" not in name and not name.endswith(
                "image_newline"
            ):  # the tables have another model's names
                table = vision if is_vision(name) else text
                known = name.replace("model.vision_tower.vision_tower.", "vision_tower.")
                assert table.get_name(known, try_suffixes=(".weight", ".bias")) == target


def test_qwen_with_tied_embeddings(tmp_path: Path) -> None:
    """One table serves as both; the model computes twice, with the source's numbers and with the file's."""
    source = build(tmp_path / "source", "qwen2", conv_mode="chatml_direct", tie_word_embeddings=True, vocab_size=259)
    report = convert(source, tmp_path / "pair", to="gguf", options=ConversionOptions(precision="f32"))
    text = pair_of(tmp_path / "pair")[0]
    assert "output.weight" not in stored(text)
    assert {"blk.0.attn_q.bias", "blk.1.attn_v.bias"} <= stored(text).keys()
    assert fields(text)["tokenizer.ggml.pre"] == "gpt-2"  # of a tokenizer that splits text as GPT-2's does
    assert report.logits is not None
    assert report.logits.largest == 0


def test_notes_on_how_llama_cpp_splits_qwen_s_text() -> None:
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab={"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, merges=[("a", "b")])
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    (note,) = byte_level_notes(described)  # its expression is the one that llama.cpp has
    assert "NFC" in note
    described["normalizer"] = None
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    (note,) = byte_level_notes(described)
    assert "splits" in note


# llama.cpp itself

LLAMA = os.environ.get("LLAMA_MTMD_CLI")


@pytest.mark.skipif(LLAMA is None, reason="set LLAMA_MTMD_CLI to llama.cpp's program llama-mtmd-cli")
def test_llama_cpp_gives_the_same_answer(tmp_path: Path) -> None:
    """benchmarks/convert/llama_cpp.py asks more; its answers are in benchmarks/results/llama_cpp.md."""
    convert(embedded_model_path(), tmp_path / "pair", to="gguf")
    text, vision = pair_of(tmp_path / "pair")
    image = HERE.parents[1] / "images" / "demo.jpg"
    command = [str(LLAMA), "-m", text, "--mmproj", vision, "--image", image, "--jinja", "--temp", "0", "-n", "40"]
    done = subprocess.run(
        [*command, "-p", "<__media__>\nWhat colour is the star?"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "The star is yellow."
