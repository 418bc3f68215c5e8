"""GGUF pairs as models: tensors, tokens and logits are those of the checkpoint that they were made of."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from cli_kit import run_llava
from golden_data import golden
from tiny import ANYRES, build

from llava.assets import embedded_model_path
from llava.convert.convert import ConversionOptions, convert
from llava.convert.describe import describe_checkpoint
from llava.convert.info import main as info
from llava.convert.tokenizer_json import TEXTS
from llava.diagnose.doctor import main as doctor
from llava.errors import InputError
from llava.model.builder import LoadedModel, load
from llava.model.checkpoints.gguf.blocks import BLOCKS, dequantize
from llava.model.checkpoints.gguf.config import llama_3_factors, llama_3_rope
from llava.model.checkpoints.gguf.file import read_gguf_header
from llava.model.checkpoints.gguf.folder import gguf_checkpoint
from llava.model.checkpoints.gguf.names import published_text_name, published_vision_name
from llava.model.checkpoints.hub import gguf_pair, resolve_checkpoint

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
TOWER = "model.vision_tower.vision_tower.vision_model."
UNUSED = f"{TOWER}post_layernorm."  # behind the features: GGUF leaves it out


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def to_gguf(source: Path, target: Path, precision: str = "f32") -> Path:
    convert(source, target, to="gguf", options=ConversionOptions(precision=precision, verification="tensors"))
    return target


def loaded(path: Path) -> LoadedModel:
    return load(path, device="cpu", dtype=torch.float32)


def files_of(pair: Path) -> tuple[Path, Path]:
    (vision,) = pair.glob("mmproj-*")
    (text,) = [file for file in pair.glob("*.gguf") if file != vision]
    return text, vision


def logits(model: LoadedModel) -> torch.Tensor:
    torch.manual_seed(0)
    side = model.image_processor.crop_size["height"]
    pixels = torch.randn(1, 1 if model.model.image_policy().mode != "anyres" else 3, 3, side, side)
    ids = torch.tensor([[1, 5, -200, 9, 17]])
    with torch.no_grad():
        images = pixels[0] if pixels.shape[1] == 1 else pixels
        return model.model(ids, images=images, image_sizes=[(2 * side, side)]).logits


# Every kind of model that is written is read again

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3's positions": ("llama", {"rope_parameters": LLAMA_3, "head_dim": 64}),
    "linear positions": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, embeddings tied": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 259}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True, "hidden_size": 96}),
    "gemma, a linear projector": (
        "gemma",
        {"head_dim": 16, "tie_word_embeddings": True, "hidden_size": 96, "mm_projector_type": "linear", **ANYRES},
    ),
    "a linear projector": ("llama", {"mm_projector_type": "linear"}),
    "a projector of one layer": ("llama", {"mm_projector_type": "mlp1x_gelu"}),
    "tiles": ("llama", ANYRES),
    "a range of tiles": ("llama", {**ANYRES, "image_grid_pinpoints": "(1x1),...,(6x6)"}),
    "the last layer": ("llama", {"mm_vision_select_layer": -1}),
    "images not padded": ("llama", {"image_aspect_ratio": "square"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_the_checkpoint_that_it_was_made_of(family: str, tmp_path: Path) -> None:
    language_model, changes = FAMILIES[family]
    source = build(tmp_path / "source", language_model, **changes)
    before, after = loaded(source), loaded(to_gguf(source, tmp_path / "pair"))
    ours, theirs = before.model.state_dict(), after.model.state_dict()
    assert ours.keys() == theirs.keys()
    tolerance = 1e-6 if language_model == "gemma" else 0.0  # its norms are stored with one added
    for name in ours:
        if not name.startswith(UNUSED):
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(logits(after), logits(before), rtol=0, atol=1e-6 if tolerance else 0)
    settings = ("rope_parameters", "mm_projector_type", "image_aspect_ratio", "mm_patch_merge_type", "model_type")
    for key in settings:
        assert getattr(after.model.config, key) == getattr(before.model.config, key)
    assert after.model.image_policy() == before.model.image_policy()
    assert (after.conv_mode, after.context_len) == (before.conv_mode, before.context_len)
    assert [after.tokenizer(text).input_ids for text in TEXTS] == [before.tokenizer(text).input_ids for text in TEXTS]
    report = convert(tmp_path / "pair", tmp_path / "back", to="original")  # which verifies tensors and logits
    assert (report.tensors.largest, report.logits and report.logits.largest) == (0, 0)


@pytest.mark.parametrize("precision", ["f16", "bf16", "q8_0"])
def test_the_embedded_model_through_a_pair(precision: str, tmp_path: Path) -> None:
    pair = to_gguf(embedded_model_path(), tmp_path / "pair", precision)
    before, after = loaded(embedded_model_path()), loaded(pair)
    theirs = {
        item.name: gguf.dequantize(item.data, item.tensor_type).reshape(tuple(reversed(item.shape.tolist())))
        for file in files_of(pair)
        for item in gguf.GGUFReader(file).tensors
    }
    assert torch.equal(after.model.lm_head.weight, torch.from_numpy(theirs["output.weight"].copy()))
    rows = theirs["blk.2.attn_k.weight"].reshape(5, 32, 2, 320).transpose(0, 2, 1, 3).reshape(320, 320)
    assert torch.equal(after.model.model.layers[2].self_attn.k_proj.weight, torch.from_numpy(rows.copy()))
    for text in TEXTS:
        ids = before.tokenizer(text).input_ids
        assert after.tokenizer(text).input_ids == ids
        assert after.tokenizer.decode(ids) == before.tokenizer.decode(ids)
    assert (after.conv_mode, after.context_len) == ("v1", before.context_len)


# Quantized tensors

SCALES_AT = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
    "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Blocks of a type of any content, with scales that are numbers."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, BLOCKS[kind][0]), dtype=np.uint8)
    for at in SCALES_AT[kind]:
        scales = random.standard_normal(count).astype(np.float16) * np.float16(0.01)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(count, 2)
    return blocks


@pytest.mark.parametrize("kind", BLOCKS)
def test_quantized_numbers_are_those_of_the_gguf_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.model.checkpoints.gguf.blocks.CHUNK", 40)  # in several parts
    blocks = random_blocks(kind, 300)
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    ours = dequantize(torch.from_numpy(blocks.copy()).flatten(), kind, theirs.shape)
    assert torch.equal(ours, torch.from_numpy(theirs.copy()))


def rewritten(file: Path, target: Path, change: Callable[[str, Any], Any], keys: dict[str, Any] | None = None) -> Path:
    """Copy a GGUF file by the gguf package; `change` gives for a tensor its new (name, type, bytes), or None to drop it."""
    reader, keys = gguf.GGUFReader(file), keys or {}
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in keys:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, value in keys.items():
        if value is not None:
            writer.add_key_value(name, value, *VALUE_TYPES[type(value)])
    for item in reader.tensors:
        made = change(item.name, item)
        if made is not None:
            name, kind, data = made
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


VALUE_TYPES = {
    str: (gguf.GGUFValueType.STRING,),
    bool: (gguf.GGUFValueType.BOOL,),
    int: (gguf.GGUFValueType.UINT32,),
    float: (gguf.GGUFValueType.FLOAT32,),
    list: (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32),
}


def as_is(name: str, item: Any) -> Any:
    return name, item.tensor_type, item.data


def test_a_model_of_every_quantized_type(tmp_path: Path) -> None:
    """Each matrix of the language model in another type; its numbers are what the gguf package makes of the bytes."""
    source = build(tmp_path / "source", hidden_size=256, intermediate_size=256, num_attention_heads=8,
                   num_key_value_heads=4, head_dim=32, vocab_size=512)  # fmt: skip
    text, vision = files_of(to_gguf(source, tmp_path / "pair"))
    kinds = iter(list(BLOCKS) * 2)
    expected: dict[str, np.ndarray] = {}

    def quantized(name: str, item: Any) -> Any:
        if len(item.shape) != 2:
            return as_is(name, item)
        kind = next(kinds)
        width, height = item.shape.tolist()
        block = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        rows = random_blocks(kind, height * width // block, seed=len(expected)).reshape(height, -1)
        expected[name] = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
        return name, gguf.GGMLQuantizationType[kind], rows

    folder = tmp_path / "quantized"
    folder.mkdir()
    model = rewritten(text, folder / "model-Q4_K_M.gguf", quantized)
    shutil.copy(vision, folder / "mmproj-model-f16.gguf")
    state = loaded(model).model.state_dict()
    assert len(expected) == 16
    for name, ours in {"token_embd": "model.embed_tokens", "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
                       "blk.1.attn_v": "model.layers.1.self_attn.v_proj", "output": "lm_head"}.items():  # fmt: skip
        assert torch.equal(state[f"{ours}.weight"], torch.from_numpy(expected[f"{name}.weight"].copy())), name
    order = [head * 32 + i * 2 + half for head in range(8) for half in range(2) for i in range(16)]
    queries = torch.from_numpy(expected["blk.1.attn_q.weight"].copy())[order]
    assert torch.equal(state["model.layers.1.self_attn.q_proj.weight"], queries)
    described = describe_checkpoint(model)
    assert (described.readers["llava"], described.stored_bytes["Q4_K"] > 0) == ("yes", True)


# Files of llama.cpp's own converters

LEGACY_NAMES = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}  # which had the two hidden layers of a tower exchanged


def legacy_pair(source: Path, target: Path, work: Path) -> Path:
    """The pair as converters of 2023 to 2025 wrote it: their names and keys, without the tower's last layer, no template."""
    text, vision = files_of(to_gguf(source, work))
    target.mkdir()
    own = {key: None for key in read_gguf_header(text).keys if key.startswith("llava.")}
    no_template = {"tokenizer.chat_template": None, "tokenizer.ggml.add_space_prefix": None, "llama.vocab_size": None}
    model = rewritten(text, target / "llava-v1.6-tiny-Q8_0.gguf", as_is, own | no_template)

    def legacy(name: str, item: Any) -> Any:
        if name.startswith("v.blk.2."):
            return None
        for part, other in LEGACY_NAMES.items():
            if f".{part}." in name:
                return name.replace(part, other), item.tensor_type, item.data
        return name.replace("v.image_newline", "model.image_newline"), item.tensor_type, item.data

    keys: dict[str, Any] = {"clip.vision.block_count": 2, "clip.vision.feature_layer": None, "clip.has_text_encoder": False,
                            "clip.projector_type": None, "llava.mm_projector_type": None,
                            "clip.vision.mm_projector_type": "mlp2x_gelu"}  # fmt: skip
    rewritten(vision, target / "mmproj-model-f16.gguf", legacy, keys)
    return model


@pytest.mark.parametrize("changes", [{}, ANYRES], ids=["1.5", "1.6"])
def test_a_published_pair_with_old_names_and_keys(changes: dict[str, Any], tmp_path: Path) -> None:
    source = build(tmp_path / "source", **changes)
    before, after = loaded(source), loaded(legacy_pair(source, tmp_path / "old", tmp_path / "pair"))
    assert after.model.get_vision_tower().config.num_hidden_layers == 2
    assert after.model.config.mm_vision_select_layer == -1
    assert torch.equal(logits(after), logits(before))
    assert after.model.image_policy() == before.model.image_policy()
    assert after.context_len == before.model.config.max_position_embeddings
    assert after.conv_mode == "llava_v1"


def test_the_number_of_layers_of_a_public_tower_says_which_is_used(tmp_path: Path) -> None:
    """Of a whole CLIP-L the last layer is left out, as LLaVA and llama.cpp do; 23 layers were cut for LLaVA: all count."""
    from llava.model.checkpoints.gguf.config import GgufKeys, _layer_used

    header = read_gguf_header(files_of(to_gguf(embedded_model_path(), tmp_path / "pair"))[1])
    keys = GgufKeys(header)
    assert _layer_used(keys, 256, 8) == 7  # by its key
    without = GgufKeys(type(header)(header.file, {k: v for k, v in header.keys.items() if "feature" not in k}, {}))
    assert [_layer_used(without, 1024, blocks) for blocks in (24, 23)] == [23, 23]
    assert [_layer_used(without, 1152, blocks) for blocks in (27, 26)] == [26, 26]


def test_mistral_is_told_by_its_name(tmp_path: Path) -> None:
    """GGUF has one architecture for both; the prompt differs."""
    source = build(tmp_path / "source")
    pair = legacy_pair(source, tmp_path / "old", tmp_path / "pair")
    renamed = pair.rename(pair.with_name("llava-v1.6-mistral-7b.Q4_K_M.gguf"))
    assert loaded(renamed).conv_mode == "mistral_instruct"


# Llama 3's positions


@pytest.mark.parametrize(
    ("factor", "positions", "base", "head_dim"), [(8.0, 8192, 5e5, 128), (32.0, 8192, 5e5, 64), (4.0, 4096, 1e4, 128)]
)
def test_factors_of_llama_3(factor: float, positions: int, base: float, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA_3, "factor": factor, "original_max_position_embeddings": positions, "rope_theta": base}
    config = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    factors = llama_3_factors(base, head_dim, rope)
    torch.testing.assert_close(torch.tensor(factors).double(), plain / scaled.double(), rtol=1e-5, atol=0)
    stored = [struct.unpack("<f", struct.pack("<f", value))[0] for value in factors]
    assert llama_3_rope(stored, base) == {key: value for key, value in rope.items() if key != "rope_theta"}


@pytest.mark.parametrize("head_dim", [4, 6, 8, 16, 24])
@pytest.mark.parametrize("positions", [64, 1024, 8192])
def test_factors_of_llama_3_with_small_heads(head_dim: int, positions: int) -> None:
    """With few factors the numbers do not follow from them, but numbers that make the same factors are found."""
    rope = {**LLAMA_3, "original_max_position_embeddings": positions}
    factors = llama_3_factors(5e5, head_dim, rope)
    again = llama_3_factors(5e5, head_dim, llama_3_rope(factors, 5e5))
    assert again == pytest.approx(factors, rel=1e-3)


def test_names_that_no_tensor_has() -> None:
    for name in ("blk.0\n.attn_q.weight", "", "\n", "v.blk.x.ln1", "blk..weight"):
        assert published_text_name(name) is None
        assert published_vision_name(name, is_linear=False) is None
    assert published_text_name("blk.7.attn_q.bias") == "model.layers.7.self_attn.q_proj.bias"


def test_factors_of_another_encoding_are_refused() -> None:
    with pytest.raises(InputError, match="not those of Llama 3"):
        llama_3_rope([1.0, 1.5, 1.2, 4.0, 8.0, 8.0], 1e4)


# Tokenizers

CORPUS = [
    "The star is yellow, and the circles are red; there are 1234 of them, aren't there?",
    "What's in this picture?\n\n  def f(x):\n\treturn x  # 日本語 and Ελληνικά",
    "I'LL SAY: it's 12,345.67 €… naïve café",
] * 20


def byte_level_tokenizer(pattern: str, *, nfc: bool = False, ignore_merges: bool = False) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    tokenizer.add_tokens([AddedToken("<extra>", special=False, normalized=False)])
    if not nfc:
        begin = tokenizer.token_to_id("<|begin_of_text|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
        )
    return tokenizer


_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _END
QWEN_PATTERN = LLAMA_3_PATTERN.replace("{1,3}", "")


def with_tokenizer(folder: Path, tokenizer: Any, begin: str, end: str, **config: object) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def check_tokenizers(before: LoadedModel, after: LoadedModel) -> None:
    for text in (*TEXTS, *CORPUS[:3], "a<extra>b <|eot_id|> c<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"):
        ids = before.tokenizer(text).input_ids
        assert after.tokenizer(text).input_ids == ids, text
        assert after.tokenizer.decode(ids) == before.tokenizer.decode(ids), text


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_byte_level_tokenizers(name: str, tmp_path: Path) -> None:
    is_llama = name == "llama-bpe"
    source = build(tmp_path / "source", "llama" if is_llama else "qwen2", vocab_size=512)
    tokenizer = byte_level_tokenizer(
        LLAMA_3_PATTERN if is_llama else QWEN_PATTERN, nfc=not is_llama, ignore_merges=is_llama
    )
    with_tokenizer(source, tokenizer, "<|begin_of_text|>", "<|eot_id|>")
    pair = to_gguf(source, tmp_path / "pair")
    head = read_gguf_header(files_of(pair)[0])
    assert head.keys["tokenizer.ggml.pre"] == name
    assert head.keys["tokenizer.ggml.add_bos_token"] is is_llama
    before, after = loaded(source), loaded(pair)
    check_tokenizers(before, after)
    assert after.conv_mode == before.conv_mode == ("llava_llama_3" if is_llama else "qwen_1_5")


@pytest.mark.parametrize("rule", ["legacy", "nonlegacy"])
@pytest.mark.parametrize("language_model", ["llama", "mistral"])
def test_a_sentencepiece_model_and_the_tokenizer_json_made_of_it(
    rule: str, language_model: str, tmp_path: Path
) -> None:
    """The ids through a pair are those of the source: of tokenizer.model, and of a tokenizer.json alone."""
    source = build(tmp_path / "source", language_model, vocab_size=1024, mm_use_im_start_end=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).unlink()
    for file in golden(f"tokenizers/llama-mini1k-{rule}").iterdir():
        shutil.copy(file, source)
    pair = to_gguf(source, tmp_path / "pair")
    check_tokenizers(loaded(source), loaded(pair))

    convert(source, tmp_path / "hf", to="transformers", options=ConversionOptions(verification="tensors"))
    (source / "tokenizer.model").unlink()
    shutil.copy(tmp_path / "hf" / "tokenizer.json", source)
    shutil.copy(tmp_path / "hf" / "tokenizer_config.json", source)
    (source / "special_tokens_map.json").unlink()
    before, after = loaded(source), loaded(to_gguf(source, tmp_path / "pair2"))
    for text in (*(text for text in TEXTS if "<image>" not in text), *CORPUS[:3]):
        assert after.tokenizer(text).input_ids == before.tokenizer(text).input_ids, text


def test_a_tokenizer_without_a_space_before_texts(tmp_path: Path) -> None:
    """As Gemma's: pieces and their merges, spaces replaced, none added."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{value:02X}>" for value in range(256)), "<start_of_turn>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["content"].startswith("<0x")]
    source = build(tmp_path / "source", "gemma", vocab_size=704, head_dim=16, tie_word_embeddings=True)
    with_tokenizer(
        source, Tokenizer.from_str(json.dumps(described)), "<bos>", "<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    pair = to_gguf(source, tmp_path / "pair")
    assert read_gguf_header(files_of(pair)[0]).keys["tokenizer.ggml.add_space_prefix"] is False
    before, after = loaded(source), loaded(pair)
    for text in (*TEXTS, *CORPUS[:3]):
        assert after.tokenizer(text).input_ids == before.tokenizer(text).input_ids, text


def test_tokenizers_that_gguf_cannot_hold(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    source = build(tmp_path / "source", vocab_size=512)
    with_tokenizer(source, byte_level_tokenizer(r"\w+|\s"), "<|begin_of_text|>", "<|eot_id|>")
    with pytest.raises(InputError, match=r"splits text by .*\\w"):
        to_gguf(source, tmp_path / "x")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<s>": 2}, unk_token="<unk>"))
    with_tokenizer(source, words, "<s>", "<s>")
    with pytest.raises(InputError, match="a tokenizer of kind WordLevel"):
        to_gguf(source, tmp_path / "x")


# What is refused, in one sentence


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return to_gguf(build(folder / "source"), folder / "pair")


@pytest.fixture
def copied(pair: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(pair, tmp_path / "copy")
    return files_of(tmp_path / "copy")


def refused(text: Path, mmproj: Path | None, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        load(gguf_checkpoint(text, mmproj), device="cpu")
    assert len(str(error.value).splitlines()) == 1


def test_which_files_belong_together(copied: tuple[Path, Path], tmp_path: Path) -> None:
    text, vision = copied
    refused(vision, None, "holds a vision tower and a projector alone; give the language model's file")
    refused(text, text, "holds no vision tower; give the file of tower and projector with --mmproj")
    refused(text, tmp_path / "absent.gguf", "there is no file .*absent.gguf")
    second = shutil.copy(vision, vision.with_name("mmproj-other.gguf"))
    refused(text, None, "2 files named 'mmproj' beside it")
    assert gguf_checkpoint(text, vision).is_dir()
    Path(second).unlink()
    beside = text.parent / "adapter_config.json"  # of an adapter, beside which its maker put a GGUF file
    beside.write_text("{}")
    assert resolve_checkpoint(text.parent) == text.parent
    beside.unlink()
    assert resolve_checkpoint(text) == resolve_checkpoint(text.parent) == gguf_pair(text, vision)
    apart = tmp_path / "apart"
    apart.mkdir()
    alone = Path(shutil.move(text, apart / text.name))
    refused(alone, None, "no file named 'mmproj' beside it")
    refused(vision.parent, None, r"0 GGUF files of language models \(none\)")
    with pytest.raises(InputError, match="--mmproj belongs to a language model"):
        gguf_pair(embedded_model_path(), vision)
    other = build(tmp_path / "wide", hidden_size=128)
    refused(
        files_of(to_gguf(other, tmp_path / "other"))[0],
        vision,
        "features of 64 numbers, and the language model takes 128",
    )


@pytest.mark.parametrize(
    ("part", "keys", "sentence"),
    [
        (0, {"llama.embedding_length": 4096}, "embedding_length 4096, but tensor 'token_embd.weight' has 64 there"),
        (0, {"llama.block_count": 80}, "block_count 80, but tensor 'blk.*' has 2"),
        (0, {"llama.feed_forward_length": 10**9}, "feed_forward_length 1000000000, but tensor"),
        (0, {"llama.attention.head_count": 0}, "must be a whole number above 0"),
        (0, {"llama.rope.scaling.type": "yarn"}, "scales positions by 'yarn'"),
        (0, {"tokenizer.ggml.model": "bert"}, "a tokenizer of kind 'bert'"),
        (0, {"tokenizer.ggml.pre": "falcon"}, "by the pre-tokenizer 'falcon'"),
        (0, {"tokenizer.ggml.tokens": None}, "holds no vocabulary"),
        (1, {"clip.projector_type": "ldp"}, "a projector of type 'ldp'"),
        (1, {"clip.vision.image_size": 28000}, "has 5 there"),
        (1, {"clip.vision.feature_layer": [9]}, "feature_layer 9, but 3 layers"),
        (1, {"clip.vision.feature_layer": [1, 2]}, "joins the vision layers"),
        (1, {"clip.vision.attention.head_count": 5}, "does not divide 32"),
        (1, {"clip.use_silu": True}, "SiLU"),
        (1, {"general.alignment": 3}, "an alignment of 3 bytes"),
    ],
)
def test_keys_that_cannot_be_right(
    part: int, keys: dict[str, Any], sentence: str, copied: tuple[Path, Path], tmp_path: Path
) -> None:
    files = list(copied)
    if "general.alignment" in keys:
        data = files[part].read_bytes()
        at = data.index(
            b"general.file_type"
        )  # a key of as many letters is not needed: the value is written in its place
        files[part].write_bytes(
            data[:at] + b"general.alignment" + data[at + 17 : at + 21] + struct.pack("<I", 3) + data[at + 25 :]
        )
    else:
        files[part] = rewritten(files[part], tmp_path / ("mmproj-new.gguf" if part else "new.gguf"), as_is, keys)
    refused(files[0], files[1], sentence)


def test_another_architecture_is_described_and_refused(copied: tuple[Path, Path], tmp_path: Path) -> None:
    text, vision = copied
    renamed = text.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0falco", 1)
    text.write_bytes(renamed)
    refused(text, vision, "of architecture 'falco'; known: llama, qwen2, qwen3, gemma")
    assert "of architecture 'falco'" in describe_checkpoint(text.parent).readers["llava"]


@pytest.mark.parametrize("part", [0, 1])
def test_tensors_that_are_missing_or_too_many(part: int, copied: tuple[Path, Path], tmp_path: Path) -> None:
    files = list(copied)
    gone, name = ("blk.1.ffn_norm.weight", "new.gguf"), ("v.blk.1.ln1.bias", "mmproj-new.gguf")
    wanted, target = (gone, name)[part]
    files[part] = rewritten(files[part], tmp_path / target, lambda n, item: None if n == wanted else as_is(n, item))
    refused(files[0], files[1], "is in no weight file")
    files = list(copied)
    extra = lambda n, item: (n.replace(wanted, "blk.1.strange.weight"), item.tensor_type, item.data)  # noqa: E731
    files[part] = rewritten(files[part], tmp_path / f"extra-{target}", extra)
    refused(files[0], files[1], "blk.1.strange.weight|is in no weight file")


def test_damaged_files_are_refused_before_memory_is_taken(copied: tuple[Path, Path], tmp_path: Path) -> None:
    """Every length and count of the header, set to a large number, and the file cut at places all over it."""
    import tracemalloc

    text, _ = copied
    whole = text.read_bytes()
    end = min(read_gguf_header(text).tensors.values(), key=lambda tensor: tensor.start).start
    broken = tmp_path / "broken.gguf"
    sentences = set()
    tracemalloc.start()
    for at in range(4, end - 8, 97):
        for piece in (b"\xff" * 8, struct.pack("<Q", 2**40), struct.pack("<Q", 2**31)):
            broken.write_bytes(whole[:at] + piece + whole[at + 8 :])
            try:
                read_gguf_header(broken, longest=10**9)
            except InputError as error:
                sentences.add(str(error)[:40])
    for length in range(0, len(whole), len(whole) // 60):
        broken.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_gguf_header(broken)
    assert tracemalloc.get_traced_memory()[1] < 20 * len(whole)
    tracemalloc.stop()
    assert sentences


def test_an_unwritable_cache_is_one_sentence(copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(copied[0]))  # a file
    refused(*copied, "set the variable XDG_CACHE_HOME")


# Programs


@pytest.mark.slow
def test_programs_read_a_pair(tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_cache / "llava").mkdir()
    (own_cache / "llava" / "kernels").symlink_to(Path.home() / ".cache/llava/kernels")  # compiled once
    text, vision = files_of(to_gguf(embedded_model_path(), tmp_path / "pair", "q8_0"))
    apart = Path(shutil.move(vision, tmp_path / "tower.gguf"))
    image = str(golden("").parents[1] / "images" / "demo.jpg")
    done = run_llava("chat", "-m", str(text), "--mmproj", str(apart), image, "What colour is the star?")
    assert (done.returncode, done.stdout.strip()) == (0, "The star is yellow."), done.stderr
    assert info(["--json", str(text), "--mmproj", str(apart)]) == 0
    assert json.loads(capsys.readouterr().out)["readers"]["llava"] == "yes"
    assert doctor([str(text), "--mmproj", str(apart), "--quick"]) == 0
    assert "nothing found" in capsys.readouterr().out
