"""The language models that LLaVA-NeXT was published over, with the config keys and tensor names that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import build

import llava
from llava.errors import InputError
from llava.model.builder import load
from llava.model.config import language_model_type

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 1,
    },
    "gemma": {"head_dim": 16},
}  # fmt: skip
CLASSES = {
    "mixtral": "LlavaMixtralForCausalLM",
    "qwen2_moe": "LlavaQwenMoeForCausalLM",
    "gemma": "LlavaGemmaForCausalLM",
}
IDS = torch.tensor([[5, 6, -200, 8, 9]])


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def published(folder: Path, kind: str) -> Path:
    """A checkpoint as transformers 4 and LLaVA-NeXT write it."""
    made = build(folder / "made", kind, **EXPERTS[kind])
    load(made, device="cpu", dtype="fp32").save(folder / "published")
    return folder / "published"


@pytest.mark.parametrize("kind", EXPERTS)
def test_published_names_are_written_and_read(kind: str, tmp_path: Path) -> None:
    folder = published(tmp_path, kind)
    parts = {
        "mixtral": ("block_sparse_moe.experts.2.w2", "block_sparse_moe.gate"),
        "qwen2_moe": ("mlp.experts.2.down_proj", "mlp.shared_expert_gate"),
        "gemma": ("mlp.down_proj", "mlp.up_proj"),
    }
    assert {f"model.layers.1.{part}.weight" for part in parts[kind]} <= names(folder)
    assert not any("gate_up_proj" in name for name in names(folder))
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    first, second = load(tmp_path / "made", device="cpu", dtype="fp32"), load(folder, device="cpu", dtype="fp32")
    assert type(second.model).__name__ == CLASSES[kind]
    with torch.no_grad():
        logits = [loaded.model(IDS, images=pixels).logits for loaded in (first, second)]
    assert torch.equal(*logits)
    second.save(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = published(tmp_path, "mixtral")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.0\.w1\.weight.*one of them is missing"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlavaQwenForCausalLM", "qwen2"), ("LlavaQwenMoeForCausalLM", "qwen2_moe"), ("LlavaMixtralForCausalLM", "mixtral"),
        ("LlavaGemmaForCausalLM", "gemma"), ("LlavaLlamaForCausalLM", "llama"), ("LlavaMistralForCausalLM", "mistral"),
        ("LlavaMptForCausalLM", "mpt"), ("LlavaQwen3ForCausalLM", "qwen3"),
    ],
)  # fmt: skip
def test_the_class_says_which_language_model_is_inside(architecture: str, kind: str) -> None:
    assert language_model_type({"model_type": "llava", "architectures": [architecture]}) == kind


def test_llama_3_keeps_its_rope(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    plain = load(build(tmp_path / "plain"), device="cpu", dtype="fp32").model
    folder = build(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0, "rope_scaling": rope}))
    model = load(folder, device="cpu", dtype="fp32").model
    from transformers import LlamaConfig, LlamaForCausalLM

    own = LlamaForCausalLM(LlamaConfig(**{**config, "rope_theta": 500000.0, "rope_scaling": rope})).eval()
    own.load_state_dict({name: value for name, value in model.state_dict().items() if name in own.state_dict()})
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, own(ids).logits, atol=1e-5, rtol=0)
    frequencies = [each.model.rotary_emb.inv_freq for each in (model, own, plain)]
    assert torch.equal(frequencies[0], frequencies[1])
    assert not torch.allclose(frequencies[0], frequencies[2])


def test_outside_names() -> None:
    from llava.model.language_model.llava_gemma import LlavaGemmaForCausalLM
    from llava.model.language_model.llava_mixtral import LlavaMixtralForCausalLM
    from llava.model.language_model.llava_qwen import LlavaQwenMoeForCausalLM

    for each in (LlavaGemmaForCausalLM, LlavaMixtralForCausalLM, LlavaQwenMoeForCausalLM):
        assert issubclass(each, llava.model.llava_arch.LlavaMetaForCausalLM)
