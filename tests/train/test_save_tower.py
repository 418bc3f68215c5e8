"""A saved model finds its tower again, wherever the tower's files were."""

from __future__ import annotations

import json
import shutil

import torch
from golden_data import golden

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load


def checkpoint_with_its_tower(folder, *, weights_inside: bool):
    """The recorded v1.6 checkpoint, moved, with its tower's folder inside it under a relative name."""
    shutil.copytree(golden("checkpoints/llava-v1.6-tiny-vicuna"), folder)
    shutil.copytree(golden("checkpoints/vision/clip-tiny-56"), folder / "tower")
    config = json.loads((folder / "config.json").read_text())
    config |= {"mm_vision_tower": "tower", "unfreeze_mm_vision_tower": weights_inside}
    (folder / "config.json").write_text(json.dumps(config))
    if weights_inside:
        (folder / "tower/pytorch_model.bin").unlink()
    return folder


def answer(model) -> torch.Tensor:
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(torch.tensor([[1, 5, -200, 7]]), images=pixels).logits


def test_a_relative_tower_travels_with_a_saved_model(tmp_path):
    for weights_inside in (True, False):
        source = checkpoint_with_its_tower(tmp_path / f"source-{weights_inside}", weights_inside=weights_inside)
        first = load(source, device="cpu")
        target = tmp_path / f"target-{weights_inside}"
        first.model.save_pretrained(target)  # the plain call, as a trainer makes it
        first.tokenizer.save_pretrained(target)
        shutil.rmtree(source)
        again = load(target, device="cpu")
        assert torch.equal(answer(first.model), answer(again.model))
        assert again.model.config.mm_vision_tower == "tower"
        has_weights = any((target / "tower").glob("*.bin"))
        assert has_weights != weights_inside


def test_a_model_in_the_transformers_layout_loads_by_from_pretrained_once_saved(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=999))
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copy(golden("checkpoints/vicuna-tiny-base/tokenizer.model"), tmp_path / "theirs")
    first = load(tmp_path / "theirs", device="cpu")
    first.save(tmp_path / "ours")
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(answer(first.model), answer(again))
