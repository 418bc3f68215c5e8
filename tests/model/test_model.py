"""The composed model: towers, projectors, any language model, batches against single requests."""

from __future__ import annotations

import json

import pytest
import torch
from golden_data import golden
from torch.nn import functional as F

from llava.errors import InputError
from llava.model.language_model.registry import llava_classes
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, CLIPVisionTowerS2
from llava.model.multimodal_projector.builder import build_vision_projector

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
}
# What each language model calls its sizes, and what it insists on.
LANGUAGE_MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "gemma2": {"head_dim": 16, "sliding_window": 12},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "phi3": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {},
}
OWN_NAMES = {"mpt", "gpt2"}


def tower_folder() -> str:
    return str(golden("checkpoints/vision/clip-tiny-28"))


def build(model_type: str, **overrides):
    config_class, model_class = llava_classes(model_type)
    sizes = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": None} if model_type in OWN_NAMES else dict(SMALL)
    if model_type in ("opt", "gpt_neox"):
        sizes.pop("num_key_value_heads")
    mm = {"mm_vision_tower": tower_folder(), "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu"}
    torch.manual_seed(0)
    model = model_class(config_class(**{**sizes, **LANGUAGE_MODELS[model_type], **mm, **overrides})).eval()
    model.get_vision_tower().load_model()
    return model


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_any_language_model_batched_equals_alone_and_trains(model_type):
    """Text only, one image, two images, padded left or right, greedy: the tokens of each request alone."""
    model = build(model_type)
    images = pixels(3, 3, 28, 28)
    prompts = [[1, 5, -200, 7, 8, 9, 10], [1, 5, 6, 7], [1, -200, 4, -200, 9]]
    owned = [images[:1], None, images[1:]]
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    alone = [
        model.generate(torch.tensor([ids]), images=image, **options)[0].tolist()
        for ids, image in zip(prompts, owned, strict=True)
    ]
    for side in ("left", "right"):
        width = max(map(len, prompts))
        blank = [[0] * (width - len(ids)) for ids in prompts]
        rows = [b + ids if side == "left" else ids + b for b, ids in zip(blank, prompts, strict=True)]
        mask = torch.tensor([[int(t != 0) for t in row] for row in rows])
        together = model.generate(torch.tensor(rows), images=images, attention_mask=mask, **options)
        assert together.tolist() == alone

    ids = torch.tensor([[1, 5, -200, 7, 8, 9]])
    out = model(input_ids=ids, labels=ids.clamp(min=0), images=images[:1])
    assert out["logits"].shape == (1, 6 - 1 + 4, 300)
    out["loss"].backward()
    assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.get_vision_tower().parameters()), "the tower is frozen"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_forward_of_a_left_padded_batch_equals_each_row_alone(model_type):
    model = build(model_type, tokenizer_padding_side="left")
    images = pixels(2, 3, 28, 28)
    rows = torch.tensor([[1, 5, -200, 7, 8, 9], [1, -200, 9, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    with torch.no_grad():
        together = model(input_ids=rows, attention_mask=mask, images=images).logits
        alone = model(input_ids=rows[1:, :3], images=images[1:]).logits
    assert torch.allclose(together[1, -alone.shape[1] :], alone[0], atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt_neox"])
def test_hidden_states_and_attention_are_returned(model_type):
    """What transformers finds by a model's class has to be found by ours as well."""
    model = build(model_type, attn_implementation="eager")
    ids, pixels = torch.tensor([[1, 5, -200, 7]]), torch.zeros(1, 3, 28, 28)
    with torch.inference_mode():
        output = model(input_ids=ids, images=pixels, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(1, 7, 64)] * 3
    assert [weights.shape for weights in output.attentions] == [(1, 4, 7, 7)] * 2


def test_a_trainable_tower_gets_gradients_and_a_frozen_one_keeps_none():
    model = build("llama")
    model.get_vision_tower().requires_grad_(True)
    ids = torch.tensor([[1, -200, 7]])
    model(input_ids=ids, labels=ids.clamp(min=0), images=pixels(1, 3, 28, 28)).loss.backward()
    patch = model.get_vision_tower().vision_tower.vision_model.embeddings.patch_embedding
    assert patch.weight.grad.abs().sum() > 0


def test_unknown_language_model_is_refused():
    with pytest.raises(InputError, match="no causal language model of type 'nonesuch'"):
        llava_classes("nonesuch")


@pytest.mark.parametrize(("name", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp5x_gelu", 5)])
def test_projectors(name, layers):
    config = type("Config", (), {"mm_projector_type": name, "mm_hidden_size": 8, "hidden_size": 6})
    projector = build_vision_projector(config)
    linears = [module for module in projector.modules() if isinstance(module, torch.nn.Linear)]
    assert [module.in_features for module in linears] == [8] + [6] * (layers - 1)
    x = torch.randn(2, 3, 8)
    by_hand = x
    for index, module in enumerate(linears):
        by_hand = module(F.gelu(by_hand) if index else by_hand)
    assert torch.equal(projector(x), by_hand)


@pytest.mark.parametrize("name", ["mlp0x_gelu", "mlp2x_gelu_", "cubic"])
def test_unknown_projectors_are_refused(name):
    config = type("Config", (), {"mm_projector_type": name, "mm_hidden_size": 8, "hidden_size": 6})
    with pytest.raises(InputError, match=f"unknown mm_projector_type '{name}'"):
        build_vision_projector(config)


def test_identity_needs_equal_widths():
    config = type("Config", (), {"mm_projector_type": "identity", "mm_hidden_size": 8, "hidden_size": 6})
    with pytest.raises(InputError, match="mm_hidden_size is 8 and hidden_size is 6"):
        build_vision_projector(config)
    config.hidden_size = 8
    x = torch.randn(1, 2, 8)
    assert build_vision_projector(config)(x) is x


def args(**keys):
    return type("Args", (), {"mm_vision_tower": tower_folder(), "mm_vision_select_layer": -2, **keys})


def test_the_kind_of_tower_is_what_its_config_says(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        )
    ).eval()
    folder = tmp_path / "looks-like-clip"
    siglip.save_pretrained(folder)
    tower = build_vision_tower(args(mm_vision_tower=str(folder)))
    images = pixels(2, 3, 28, 28)
    with torch.no_grad():
        expected = siglip(images, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(tower(images), expected)
    assert tower.num_patches == expected.shape[1] == 4
    assert tower.image_processor.image_mean == (0.5, 0.5, 0.5)
    assert isinstance(build_vision_tower(args()), CLIPVisionTower)


def test_a_tower_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="is of type 'bert'; known: clip"):
        build_vision_tower(args(mm_vision_tower=str(tmp_path)))


def test_a_list_of_images_gives_a_list_of_features():
    tower = build_vision_tower(args())
    images = pixels(3, 3, 28, 28)
    batch = tower(images)
    for single, row in zip(tower(list(images)), batch, strict=True):
        assert torch.allclose(single[0], row, atol=1e-6)


def test_several_scales_equal_piece_by_piece_arithmetic():
    """S2 by its definition: resize, cut, encode each piece, lay the pieces' maps side by side, average down."""
    tower = build_vision_tower(args(s2=True, s2_scales="28,56,84"))
    assert isinstance(tower, CLIPVisionTowerS2)
    assert tower.hidden_size == 96
    assert tower.num_patches == 4
    assert tower.image_processor.crop_size == {"height": 84, "width": 84}
    one_scale = build_vision_tower(args())
    images = pixels(2, 3, 84, 84)
    with torch.no_grad():
        parts = []
        for pieces in (1, 2, 3):
            scaled = F.interpolate(images, size=(28 * pieces, 28 * pieces), mode="bicubic")
            grid = torch.empty(2, 32, 2 * pieces, 2 * pieces)
            for i in range(pieces):
                for j in range(pieces):
                    piece = scaled[:, :, 28 * i : 28 * (i + 1), 28 * j : 28 * (j + 1)]
                    features = one_scale(piece).reshape(2, 2, 2, 32).permute(0, 3, 1, 2)
                    grid[:, :, 2 * i : 2 * (i + 1), 2 * j : 2 * (j + 1)] = features
            small = grid.reshape(2, 32, 2, pieces, 2, pieces).mean(dim=(3, 5))
            parts.append(small.flatten(2).transpose(1, 2))
        assert torch.allclose(tower(images), torch.cat(parts, dim=-1), atol=1e-5)


def test_a_model_with_several_scales_counts_its_features():
    model = build("llama", s2=True, s2_scales="28,56", mm_hidden_size=64)
    assert model.image_policy().tile_size == 56
    assert model.image_policy().features_per_tile == 4
    out = model(input_ids=torch.tensor([[1, -200, 7]]), images=pixels(1, 3, 56, 56))
    assert out.logits.shape[1] == 2 + 4


def test_a_prompt_longer_than_the_limit_is_an_error_and_a_training_row_a_warning(caplog):
    model = build("llama", tokenizer_model_max_length=5)
    ids, images = torch.tensor([[1, 5, -200, 7]]), pixels(1, 3, 28, 28)
    with pytest.raises(InputError, match=r"7 tokens long .* is 5"):
        model.generate(ids, images=images, max_new_tokens=1)
    out = model(input_ids=ids, labels=ids.clamp(min=0), images=images)
    assert out.logits.shape[1] == 5
    assert "1 of 1 training rows are longer" in caplog.text
