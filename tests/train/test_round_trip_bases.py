"""Language models of other kinds, as transformers stores them: read as it reads them, trained, saved and loaded.

Some are stored in another form than they compute with (experts one by one), some within a model that takes images.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from golden_data import HERE, golden
from train_kit import BASE, argv

from llava.errors import InputError
from llava.model.builder import load
from llava.train.arguments import parse_train_args
from llava.train.lora import find_all_linear_names
from llava.train.model_setup import load_base_model
from llava.train.run import run

VOCABULARY = 640
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
LLAMA_LIKE: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
EXPERTS: dict[str, Any] = {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

CONFIGS: dict[str, Callable[[], Any]] = {
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=2048),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=2048, vocab_size=VOCABULARY),
    "falcon": lambda: transformers.FalconConfig(**SIZES),
    "bloom": lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "mpt": lambda: transformers.MptConfig(d_model=64, n_layers=2, n_heads=4, max_seq_len=2048, vocab_size=VOCABULARY),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=128),
    "mamba": lambda: transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=VOCABULARY),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, output_router_logits=True),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=32, head_dim=16),
    "olmoe": lambda: transformers.OlmoeConfig(**EXPERTS),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**LLAMA_LIKE, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
        n_group=1, topk_group=1,
    ),
    "gemma3": lambda: transformers.Gemma3Config(text_config={**LLAMA_LIKE, "head_dim": 16}, vision_config=VISION),
    "internvl": lambda: transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **LLAMA_LIKE},
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]}
    ),
}  # fmt: skip
WITHIN = {"gemma3": "Gemma3ForConditionalGeneration", "internvl": "InternVLForConditionalGeneration"}
QUICK = {
    ("mixtral", "full"),
    ("mixtral", "lora"),
    ("gpt2", "lora"),
    ("gpt_neox", "full"),
    ("mamba", "full"),
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4},
    "projector": {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True},
}


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def stored(kind: str, folder: Path) -> Any:
    """Write a random model and a tokenizer, and return the language model."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    whole = getattr(transformers, WITHIN.get(kind, "AutoModelForCausalLM"))
    model = whole(config) if kind in WITHIN else whole.from_config(config)
    model.save_pretrained(folder)
    for file in golden(BASE).glob("*token*"):
        shutil.copy(file, folder)
    return model


def flags(folder: Path, base: Path, **more: Any) -> list[str]:
    return argv(folder, model=str(base), max_steps=2, learning_rate="1e-2", **more)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "mixtral" else pytest.mark.slow) for k in CONFIGS])
def test_a_base_is_read_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    expected = stored(kind, tmp_path / "base").eval()
    model_args, _, training_args = parse_train_args(flags(tmp_path / "run", tmp_path / "base"))
    model, _ = load_base_model(model_args, training_args)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[..., :VOCABULARY]  # the tokenizer has more tokens than the model
        torch.testing.assert_close(logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "how"),
    [pytest.param(k, h, marks=() if (k, h) in QUICK else pytest.mark.slow) for k in CONFIGS for h in KINDS],
)
def test_what_is_trained_is_what_loads(kind: str, how: str, tmp_path: Path) -> None:
    stored(kind, tmp_path / "base")
    trainer = run(*parse_train_args(flags(tmp_path / "run", tmp_path / "base", **KINDS[how])))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    with torch.no_grad():
        trained, loaded = (
            float(model.eval()(**batch).loss) for model in (trainer.model, load(tmp_path / "run", device="cpu").model)
        )
    assert loaded == pytest.approx(trained, rel=1e-5)


def test_experts_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    stored("mixtral", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    weights[name] = weights[name][:5].clone()
    save_file(weights, file, metadata={"format": "pt"})
    model_args, _, training_args = parse_train_args(flags(tmp_path / "run", tmp_path / "base"))
    with pytest.raises(InputError, match=r"block_sparse_moe\.experts\..*do not fit together"):
        load_base_model(model_args, training_args)


def test_a_model_with_no_causal_language_model_inside_is_still_refused(tmp_path: Path) -> None:
    stored("gemma3", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(file.read_text().replace('"gemma3_text"', '"t5gemma2_text"'))
    model_args, _, training_args = parse_train_args(flags(tmp_path / "run", tmp_path / "base"))
    with pytest.raises(InputError, match="takes images and is no LLaVA"):
        load_base_model(model_args, training_args)


def test_only_layers_that_are_called_get_adapters_in_a_state_space_model() -> None:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["mamba"]())
    assert find_all_linear_names(model) == ["in_proj"]
