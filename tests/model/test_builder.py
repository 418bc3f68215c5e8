"""Loading a model by `load` and `load_pretrained_model`, with every argument."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from golden_data import golden

import llava.errors
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.errors import InputError, MissingPackageError
from llava.model.builder import load, load_pretrained_model, load_tokenizer
from llava.model.device import pick_device, pick_dtype, pick_placement
from llava.model.tokenizer_setup import context_len

IDS = torch.tensor([[1, 40, IMAGE_TOKEN_INDEX, 70, 80, 90]])
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Widths in multiples of 64, the block of 4-bit quantization.
    return tiny.build(tmp_path_factory.mktemp("tiny") / "model", hidden_size=128, intermediate_size=256)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, images=PIXELS.to(model.dtype)).logits


def test_the_tuple_is_what_load_returns(folder: Path) -> None:
    typed = load(folder, device="cpu")
    tokenizer, model, image_processor, length = load_pretrained_model(str(folder), None, "any-name", device="cpu")
    assert torch.equal(logits(model), logits(typed.model))
    assert tokenizer("a b")["input_ids"] == typed.tokenizer("a b")["input_ids"]
    assert image_processor == typed.image_processor
    assert length == typed.context_len == 2048
    assert not model.training


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_calls_of_research_code(folder: Path, keyword: str) -> None:
    _, model, _, _ = load_pretrained_model(
        str(folder),
        None,
        "llava",
        device_map="cpu",
        multimodal=True,
        attn_implementation="eager",
        **{keyword: "bfloat16"},
    )
    assert model.dtype == model.get_vision_tower().dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_without_a_gpu_the_default_device_is_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    _, model, _, _ = load_pretrained_model(str(folder), None, "llava")
    assert model.device.type == "cpu"
    assert model.dtype == torch.float32
    assert "no CUDA device" in caplog.text
    with pytest.raises(InputError, match=r"'cuda'.*device='cpu'"):
        load(folder, device="cuda")


@pytest.mark.parametrize(
    ("device", "capable", "dtype"),
    [
        ("cpu", False, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("mps", False, torch.float16),
    ],
)
def test_automatic_dtype(monkeypatch: pytest.MonkeyPatch, device: str, capable: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capable)
    assert pick_dtype("auto", torch.device(device)) == dtype
    assert pick_dtype("torch.float16", torch.device(device)) == torch.float16


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_automatic_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == expected


@pytest.mark.parametrize(("needed", "is_spread"), [(10, False), (90, True)])
def test_a_model_is_sharded_only_when_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, needed: int, is_spread: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 100))
    placement = pick_placement("cuda", "auto", needed_bytes=needed)
    assert placement.device_map == ("auto" if is_spread else None)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_device_maps(folder: Path, device_map: Any) -> None:
    assert torch.equal(logits(load(folder, device_map=device_map).model), logits(load(folder, device="cpu").model))


def test_attention_functions_agree(folder: Path) -> None:
    models = [load(folder, device="cpu", attn_implementation=name).model for name in ("eager", "sdpa")]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), atol=1e-5, rtol=1e-4)


# Random weights of this width: 4 bits keep about 1 % of the logits' spread as noise, 8 bits a tenth of that.
@pytest.mark.parametrize(("mode", "largest"), [("4bit", 0.25), ("8bit", 0.05)])
def test_quantized_on_the_cpu(folder: Path, mode: str, largest: float) -> None:
    pytest.importorskip("bitsandbytes")
    full, quantized = load(folder, device="cpu"), load(folder, device="cpu", quantization=mode)
    want, got = logits(full.model), logits(quantized.model)
    difference = (got - want).abs().max() / want.std()
    assert 0 < difference < largest
    kinds = {name: type(module).__name__ for name, module in quantized.model.named_modules()}
    assert kinds["model.layers.1.mlp.up_proj"] == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[mode]
    kept = [name for name in kinds if name == "lm_head" or "vision_tower" in name or "mm_projector" in name]
    assert len(kept) > 30
    assert not any("bit" in kinds[name] for name in kept)
    # The projector's own numbers are the stored ones.
    assert torch.equal(quantized.model.model.mm_projector[0].weight, full.model.model.mm_projector[0].weight)
    tokens = quantized.model.generate(
        IDS, images=PIXELS, do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0
    )
    assert tokens.shape == (1, 4)


def test_quantized_through_the_tuple(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    _, model, _, _ = load_pretrained_model(str(folder), None, "llava", load_4bit=True, device="cpu")
    assert model.is_quantized
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert model.config.quantization_config.bnb_4bit_use_double_quant


def test_a_model_saved_quantized_loads_again(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    first = load(folder, device="cpu", quantization="4bit")
    first.save(tmp_path / "packed")
    again = load(tmp_path / "packed", device="cpu")
    assert type(again.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(logits(again.model), logits(first.model), atol=1e-5, rtol=1e-4)


def test_quantization_without_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = llava.errors.importlib.import_module

    def absent(name: str) -> Any:
        if name == "bitsandbytes":
            raise ModuleNotFoundError(name=name)
        return real(name)

    monkeypatch.setattr(llava.errors.importlib, "import_module", absent)
    with pytest.raises(MissingPackageError, match=r"install it with: pip install .*\[quant\]"):
        load(folder, device="cpu", quantization="4bit")


# --- tokenizer, context, template --------------------------------------------------------------------------------------


def test_context_length_as_recorded() -> None:
    """The recordings know two cases: no declared length (2048), and `max_sequence_length`, which only the `seq` config has."""
    rows = json.loads(golden("builder_context_len.json").read_text())
    assert {row["context_len"] for row in rows} == {2048, 777}
    for row in rows:
        extra = {"max_sequence_length": 777} if row["cfg"] == "seq" else {}
        assert context_len(SimpleNamespace(**extra)) == row["context_len"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tokenizer_model_max_length": 4096, "max_position_embeddings": 4096}, 4096),
        ({"tokenizer_model_max_length": 4096, "max_position_embeddings": 32768}, 4096),
        ({"tokenizer_model_max_length": 4096, "max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 4096}, 2048),
        ({"max_seq_len": 512}, 512),
    ],
    ids=str,
)
def test_context_length_where_files_say_more(config: dict[str, int], expected: int) -> None:
    assert context_len(SimpleNamespace(**config)) == expected


@pytest.mark.parametrize(
    ("language_model", "name", "changes", "expected"),
    [
        ("llama", "anything", {}, "llava_v1"),
        ("llama", "llava-v1.5-7b", {}, "llava_v1"),
        ("llama", "llava-llama-2-13b", {}, "llava_llama_2"),
        ("llama", "LLaVA-7B-v0", {}, "llava_v0"),
        ("llama", "my-mistral-mpt", {}, "llava_v1"),
        ("mistral", "llava-v1.6-7b", {}, "mistral_instruct"),
        ("mpt", "llava-v1", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "mpt"),
        ("qwen2", "llava-v1", {}, "qwen_1_5"),
        ("llama", "llava-v1", {"conv_mode": "llama_2"}, "llama_2"),
    ],
)
def test_conversation_template(
    tmp_path: Path, language_model: str, name: str, changes: dict[str, Any], expected: str
) -> None:
    loaded = load(tiny.build(tmp_path / name, language_model, **changes), device="cpu")
    assert loaded.conv_mode == expected
    assert expected in conv_templates


def test_a_tokenizer_with_chatml_tokens_decides_the_template(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert load(folder, device="cpu").conv_mode == "chatml_direct"


def test_image_tokens_get_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A config that asks for marker tokens beside a vocabulary that has no room for them."""
    folder = tiny.build(
        tmp_path / "m", vocab_size=tiny.NUM_TOKENS, mm_use_im_start_end=True, mm_use_im_patch_token=True
    )
    loaded = load(folder, device="cpu")
    rows = loaded.model.get_input_embeddings().weight
    assert len(loaded.tokenizer) == rows.shape[0] == tiny.NUM_TOKENS + 3 == loaded.model.config.vocab_size
    torch.testing.assert_close(rows[-1], rows[: tiny.NUM_TOKENS].mean(0))
    assert "the new rows begin as the mean of the others" in caplog.text
    assert len(load_tokenizer(folder)) == tiny.NUM_TOKENS + 3


def test_rows_beyond_the_tokenizer_stay(folder: Path) -> None:
    loaded = load(folder, device="cpu")
    assert loaded.model.get_input_embeddings().weight.shape[0] == 320 > len(loaded.tokenizer)


def test_a_plain_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model, image_processor, length = load_pretrained_model(
        str(golden("checkpoints/vicuna-tiny-base")), None, "vicuna-7b", device="cpu"
    )
    assert image_processor is None
    assert type(model).__name__ == "LlamaForCausalLM"
    assert length == 2048
    assert len(tokenizer) == 1000
    assert load(golden("checkpoints/vicuna-tiny-base"), device="cpu").processor is None


def test_a_base_given_without_need(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = golden("checkpoints/vicuna-tiny-base")
    with caplog.at_level(logging.WARNING):
        loaded = load(folder, base=base, device="cpu")
    assert "only for what it lacks" in caplog.text
    assert torch.equal(logits(loaded.model), logits(load(folder, device="cpu").model))


def test_tokenizer_of_a_folder_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden("checkpoints").parent)
    assert len(load_tokenizer("checkpoints/llava-v1.5-tiny-lora")) == 1000


def test_generation_config_is_read(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "pad_token_id": 0}))
    assert load(folder, device="cpu").model.generation_config.eos_token_id == [2, 7]


def test_default_dtype_is_left_alone(folder: Path) -> None:
    load(folder, device="cpu", dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32
