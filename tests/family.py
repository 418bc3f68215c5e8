"""Published checkpoints of the family, built tiny: the config keys and tensor names are the published ones, the weights random.

`FAMILY` has a builder for each row of the table in docs/checkpoints.md, by the row's first cell. A builder of a model that is
read makes a whole model; one of a model that is refused writes a config and the tensor names that matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packing_kit import pack
from safetensors.torch import load_file, save_file
from tiny import ANYRES, NUM_TOKENS, build, save_tokenizer
from transformers import (
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    SiglipVisionConfig,
)
from transformers_kit import (
    IMAGE_TOKEN,
    LLAMA_3,
    SIZES,
    TOWER,
    save_peer,
    small_granite_vision,
    small_llava,
    small_llava_next,
    small_next_video,
    small_onevision,
    small_vipllava,
)

Builder = Callable[[Path], Path]


def of(language_model: str, **changes: Any) -> Builder:
    return lambda folder: build(folder, language_model, **changes)


def change(folder: Path, **values: Any) -> Path:
    """Change keys of a folder's config.json; None removes a key."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


# --- read -------------------------------------------------------------------------------------------------------------


def theirs(make: Callable[[], Any], **changes: Any) -> Builder:
    """A model of transformers' own class, as its version 4 wrote it."""

    def save(folder: Path) -> Path:
        save_peer(folder, make(), "4.3x")
        (folder / "preprocessor_config.json").write_text(json.dumps(_processor(folder)))
        return change(folder, **changes) if changes else folder

    return save


def _processor(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    side = config["vision_config"]["image_size"]
    if config["vision_config"]["model_type"] == "siglip_vision_model":
        return {"image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}
    return {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}, "crop_size": side}


def with_siglip(text: Any, layer: int = -2) -> Any:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(**TOWER, image_size=28, patch_size=14, vision_use_head=False),
            text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=layer,
            vision_feature_select_strategy="full", tie_word_embeddings=text.model_type in ("qwen2", "gemma"),
        )
    ).eval()  # fmt: skip


def over(text: Any) -> Any:
    model = small_llava()
    values = model.config.to_dict() | {"text_config": text.to_dict(), "tie_word_embeddings": text.tie_word_embeddings}
    return LlavaForConditionalGeneration(LlavaConfig.from_dict(values)).eval()


def llama_3() -> LlamaConfig:
    return LlamaConfig(**SIZES | {"max_position_embeddings": 8192}, num_key_value_heads=2, rope_parameters=LLAMA_3)


def joycaption() -> Any:
    return with_siglip(llama_3())


def interleave() -> Any:
    return with_siglip(small_llava("qwen2").config.text_config, layer=-1)


def phi_3() -> Any:
    return over(Phi3Config(**SIZES, num_key_value_heads=4))


def gemma() -> Any:
    return over(GemmaConfig(**SIZES, num_key_value_heads=4, head_dim=16))


def quantized(method: str, make: Builder) -> Builder:
    def save(folder: Path) -> Path:
        plain, beside = (folder.with_name(f"{folder.name}-{name}") for name in ("unquantized", "quantized"))
        packed, _ = pack(make(plain), method, beside)
        return packed.rename(folder)

    return save


def v0(folder: Path) -> Path:
    """With the keys of its time and no others."""
    build(folder, mm_projector_type="linear", mm_use_im_start_end=True, vocab_size=NUM_TOKENS + 3)
    return change(
        folder, model_type="llama", architectures=["LlavaLlamaForCausalLM"], mm_projector_type=None, image_aspect_ratio=None,
        mm_patch_merge_type=None, mm_use_im_patch_token=None, tokenizer_padding_side=None, tokenizer_model_max_length=None,
        mm_vision_select_feature=None,
    )  # fmt: skip


def v1_5(folder: Path) -> Path:
    return change(build(folder), model_type="llava", architectures=["LlavaLlamaForCausalLM"])


def cut(folder: Path) -> Path:
    """As LLaVA-NeXT trains over SigLIP: the tower is stored without its last layer and its head."""
    change(build(folder, "qwen2", siglip=True, **ANYRES), **NEXT_TRAINING)
    last = f".vision_model.encoder.layers.{TOWER['num_hidden_layers'] - 1}."
    state = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if last not in name and ".vision_model.head." not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def onevision(folder: Path) -> Path:
    """As OneVision was published: a cut tower, features reduced to those of nine tiles, the type "llava" over Qwen2."""
    return change(
        cut(folder), model_type="llava", architectures=["LlavaQwenForCausalLM"], image_aspect_ratio="anyres_max_9",
        image_grid_pinpoints="(1x1),...,(6x6)", mm_spatial_pool_stride=None, mm_resampler_type=None, add_faster_video=False,
        faster_token_stride=10, pos_skipping_range=4096,
    )  # fmt: skip


NEXT_TRAINING = {
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_tower_lr": 2e-6,
    "unfreeze_mm_vision_tower": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_newline_position": "one_token",
    "vision_tower_pretrained": "",
    "use_pos_skipping": False,
}


# --- refused ----------------------------------------------------------------------------------------------------------

ORIGINAL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320,
    "max_position_embeddings": 4096, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "torch_dtype": "bfloat16",
}  # fmt: skip
THEIRS = {
    "image_token_index": IMAGE_TOKEN, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "text_config": {"model_type": "llama", **SIZES},
    "vision_config": {"model_type": "clip_vision_model", **TOWER, "image_size": 28, "patch_size": 14},
}  # fmt: skip
LLAMA_NAMES = ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.mm_projector.0.weight")
THEIR_NAMES = (
    "language_model.model.embed_tokens.weight",
    "multi_modal_projector.linear_1.weight",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
)


def refused(*names: str, keys: dict[str, Any], **values: Any) -> Builder:
    """A folder with these keys and tensors of these names, which nobody reads."""

    def save(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in (keys | values).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({name: torch.zeros(2, 2) for name in names}, folder / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(folder)
        return folder

    return save


def of_transformers(kind: str, name: str, *names: str, **values: Any) -> Builder:
    return refused(*(names or THEIR_NAMES), keys=THEIRS, model_type=kind, architectures=[name], **values)


def of_research(kind: str, name: str, *names: str, **values: Any) -> Builder:
    return refused(*LLAMA_NAMES, *names, keys=ORIGINAL, model_type=kind, architectures=[name], **values)


def in_parts(folder: Path) -> Path:
    """Each part in a folder of its own, none in the checkpoint's."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaModel"], "llm_cfg": {"model_type": "llama"},
        "vision_tower_cfg": {"model_type": "siglip_vision_model"}, "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"},
        "mm_hidden_size": 32, "hidden_size": 64, "image_aspect_ratio": "resize", "mm_vision_select_layer": -2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "llm").mkdir()
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "llm" / "model.safetensors")
    return folder


VIDEO = {"mm_image_tower": "LanguageBind/LanguageBind_Image", "mm_video_tower": "LanguageBind/LanguageBind_Video_merge"}

PUBLISHED_LAYERS = [-2, -5, -8, -11, 6]

READ: dict[str, Builder] = {
    "llava-hf/llava-1.5-7b-hf, -13b-hf": theirs(small_llava),
    "llava-hf/llava-v1.6-mistral-7b-hf": theirs(partial(small_llava_next, "mistral")),
    "llava-hf/llava-v1.6-vicuna-7b-hf, -13b-hf, llava-v1.6-34b-hf": theirs(small_llava_next),
    "llava-hf/llava-interleave-qwen-0.5b-hf, -7b-hf": theirs(interleave),
    "llava-hf/llava-next-72b-hf, llava-next-110b-hf": theirs(partial(small_llava_next, "qwen2")),
    "bczhou/tiny-llava-v1-hf": theirs(small_llava, vision_feature_layer=-2),
    "llava-hf/llama3-llava-next-8b-hf": theirs(small_llava_next),
    "xtuner/llava-llama-3-8b-v1_1-transformers": theirs(lambda: over(llama_3())),
    "fancyfeast/llama-joycaption-beta-one-hf-llava": theirs(joycaption),
    "xtuner/llava-phi-3-mini-hf": theirs(phi_3),
    "Intel/llava-gemma-2b": theirs(gemma),
    "llava-hf/bakLlava-v1-hf": theirs(partial(small_llava, "mistral")),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf, -7b, -72b": theirs(small_onevision),
    "llava-hf/LLaVA-NeXT-Video-7B-hf, -7B-DPO-hf, -34B-hf": theirs(small_next_video),
    "llava-hf/vip-llava-7b-hf, -13b-hf": theirs(
        partial(small_vipllava, PUBLISHED_LAYERS, num_layers=12),
        vision_feature_layer=None,
        vision_feature_layers=PUBLISHED_LAYERS,
    ),
    "ibm-granite/granite-vision-3.1-2b-preview, -3.2-2b, -3.3-2b": theirs(small_granite_vision),
    "liuhaotian/llava-v1.5-7b, -13b": v1_5,
    "liuhaotian/llava-v1-0719-336px (linear projector)": partial(build, mm_projector_type="linear"),
    "liuhaotian/LLaVA-7b-v0 (after apply_delta)": v0,
    "liuhaotian/LLaVA-Lightning-MPT-7B-preview": of(
        "mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=2048, mm_projector_type="linear"
    ),
    "liuhaotian/llava-v1.6-mistral-7b": of("mistral", sliding_window=None, **ANYRES),
    "liuhaotian/llava-v1.6-vicuna-7b, -13b, llava-v1.6-34b": partial(build, **ANYRES),
    "bfshi/llava-v1.5-7b-s2": partial(build, s2=True, s2_scales="28,56", mm_hidden_size=64),
    "microsoft/llava-med-v1.5-mistral-7b": of("mistral", sliding_window=None),
    "FreedomIntelligence/HuatuoGPT-Vision-7B": lambda folder: change(build(folder, "qwen2"), model_type="llava_qwen2"),
    "SkunkworksAI/BakLLaVA-1": of("mistral"),
    "liuhaotian/llava-llama-2-13b-chat-lightning-preview": partial(build, mm_projector_type="linear"),
    "lmms-lab/llama3-llava-next-8b": lambda folder: change(build(folder, **ANYRES), **NEXT_TRAINING),
    "lmms-lab/llava-next-72b, -110b, llava-next-qwen-32b": lambda folder: change(
        build(folder, "qwen2", **ANYRES), model_type="llava", architectures=["LlavaQwenForCausalLM"], **NEXT_TRAINING
    ),
    "lmms-lab/llava-onevision-qwen2-0.5b-ov, -7b, -72b, llava-critic-7b": onevision,
    "lmms-lab/LLaVA-Video-7B-Qwen2": lambda folder: change(
        onevision(folder), mm_newline_position="grid", mm_spatial_pool_mode="average", mm_spatial_pool_stride=2
    ),
    "lmms-lab/LLaVA-NeXT-Video-7B, -34B": lambda folder: change(
        build(folder, **ANYRES),
        mm_resampler_type="spatial_pool",
        mm_spatial_pool_stride=2,
        mm_spatial_pool_out_channels=1024,
        mm_spatial_pool_mode="average",
        mm_newline_position="no_token",
        mm_resampler_location="before",
    ),
    "TheBloke/llava-v1.5-13B-AWQ": quantized("awq", v1_5),
    "TheBloke/llava-v1.5-13B-GPTQ": quantized("gptq", v1_5),
    "RedHatAI/llava-1.5-7b-hf-quantized.w4a16": quantized("w4a16", theirs(small_llava)),
    "RedHatAI/llava-1.5-7b-hf-quantized.w8a8": quantized("w8a8", theirs(small_llava)),
    "models of your own, trained by LLaVA-NeXT's scripts over SigLIP": cut,
}

REFUSED: dict[str, Builder] = {
    "LanguageBind/Video-LLaVA-7B-hf": of_transformers(
        "video_llava", "VideoLlavaForConditionalGeneration", *THEIR_NAMES[:2], "video_tower.vision_model.post_layernorm.weight"
    ),
    "mistral-community/pixtral-12b": of_transformers(
        "llava", "LlavaForConditionalGeneration", vision_config={"model_type": "pixtral", "hidden_size": 32},
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    ),
    "LanguageBind/Video-LLaVA-7B": of_research("llava", "LlavaLlamaForCausalLM", mm_vision_tower=None, **VIDEO),
    "mucai/vip-llava-7b, -13b": of_research("llava", "LlavaLlamaForCausalLM", mm_vision_tower="clip_4layer_336"),
    "Lin-Chen/ShareGPT4V-7B, -13B": of_research(
        "share4v", "Share4VLlamaForCausalLM", mm_vision_tower="Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12"
    ),
    "BAAI/Bunny-v1_0-3B, Bunny-Llama-3-8B-V": of_research(
        "bunny-phi", "BunnyPhiForCausalLM", mm_vision_tower="google/siglip-so400m-patch14-384", mm_projector_type="mlp2x_gelu",
        auto_map={"AutoModelForCausalLM": "modeling_bunny_phi.BunnyPhiForCausalLM"},
    ),
    "bczhou/TinyLLaVA-3.1B": of_research("tiny_llava_phi", "TinyLlavaPhiForCausalLM"),
    "tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B": refused(
        "language_model.model.embed_tokens.weight", "connector._connector.0.weight",
        keys={"model_type": "tinyllava", "architectures": ["TinyLlavaForConditionalGeneration"], "connector_type": "mlp2x_gelu",
              "llm_model_name_or_path": "microsoft/phi-2", "vision_hidden_size": 32, "text_config": {"model_type": "phi"},
              "vision_config": {"model_type": "siglip_vision_model"}, "vision_model_name_or_path": "google/siglip"},
    ),
    "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e, -Phi2-2.7B-4e, -Qwen-1.8B-4e": of_research(
        "moe_llava_stablelm", "EvalMoELLaVAStablelmForCausalLM", mm_vision_tower=None, moe={"moe_enable": True},
        mm_image_tower="openai/clip-vit-large-patch14-336", mm_video_tower=None,
    ),
    "Efficient-Large-Model/VILA1.5-3b, NVILA-8B": in_parts,
    "lmms-lab/LLaVA-OneVision-1.5-8B-Instruct": refused(
        "model.visual.patch_embed.proj.weight", "model.language_model.embed_tokens.weight",
        keys={"model_type": "llavaonevision1_5", "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
              "auto_map": {"AutoConfig": "configuration.Config"}, "text_config": {"model_type": "LLaVAOneVision1_5_text"},
              "vision_config": {"model_type": "rice_vit", "patch_size": 14, "image_size": [448, 448]}},
    ),
    "favor123/llava-hr-7b-x": of_research(
        "llava", "LlavaLlamaForCausalLM", "model.vision_tower.slow_vision_tower.vision_tower.stages.0.blocks.0.norm.weight",
        vision_tower_slow="convnext_large_mlp.clip_laion2b_ft_320", is_multipath_encoder=True,
    ),
    "YanweiLi/MGM-7B": of_research("mgm", "MGMLlamaForCausalLM", mm_vision_tower_aux="laion/CLIP-convnext"),
    "nyu-visionx/cambrian-8b": of_research(
        "cambrian_llama", "CambrianLlamaForCausalLM", mm_vision_tower=None,
        mm_vision_tower_aux_list=["siglip/CLIP-ViT-SO400M-14-384", "openai/clip-vit-large-patch14-336"],
    ),
    "apple/FastVLM-0.5B, -1.5B, -7B": of_research(
        "llava_qwen2", "LlavaQwen2ForCausalLM", mm_vision_tower="mobileclip_l_1024",
        auto_map={"AutoConfig": "llava_qwen.LlavaConfig"},
    ),
}  # fmt: skip
# Kinds of models that are not in the table, which lists the family only.
OTHERS: dict[str, Builder] = {
    "another vision-language model": refused(
        "visual.patch_embed.proj.weight", "model.embed_tokens.weight",
        keys={"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": {"depth": 2},
              "hidden_size": 64},
    ),
    "one whose config shows no vision": refused(
        "vision_tower.patch_embed.weight", "model.embed_tokens.weight", keys={"model_type": "llama", "hidden_size": 64}
    ),
    "a vision tower": refused(
        "vision_model.post_layernorm.weight",
        keys={"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": TOWER},
    ),
    "an older vision-language model": refused(
        "model.vision_model.encoder.weight", keys={"model_type": "mplug_owl2", "architectures": ["MPLUGOwl2LlamaForCausalLM"]}
    ),
    "a classifier over a language model": refused(
        "model.embed_tokens.weight", "score.weight",
        keys={"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "hidden_size": 64},
    ),
    "an encoder of text": refused("bert.x.weight", keys={"model_type": "bert", "architectures": ["BertModel"]}),
    "a config without keys": refused("a.weight", keys={}),
    "a model of another library": refused("x.weight", keys={"_class_name": "UNet2DConditionModel"}),
    "an encoder": refused("shared.weight", keys={"model_type": "t5", "architectures": ["T5Model"]}),
    "a type that nobody knows": of_research("llava_gpt9", "LlavaGpt9ForCausalLM"),
    "another feature strategy": of_transformers(
        "llava", "LlavaForConditionalGeneration", vision_feature_select_strategy="cls_only"
    ),
    "another activation": of_transformers("llava", "LlavaForConditionalGeneration", projector_hidden_act="relu"),
    "a tower of another type": of_transformers(
        "llava", "LlavaForConditionalGeneration", vision_config={"model_type": "dinov2", "hidden_size": 32}
    ),
    "features that are not reduced": of_transformers(
        "llava_onevision", "LlavaOnevisionForConditionalGeneration", vision_aspect_ratio="pad",
        vision_config=THEIRS["vision_config"],
    ),
    "frames reduced by weights": of_transformers(
        "llava_next_video", "LlavaNextVideoForConditionalGeneration", spatial_pool_mode="conv"
    ),
    "class features among tiles": of_transformers(
        "llava_next", "LlavaNextForConditionalGeneration", vision_feature_select_strategy="full"
    ),
    "a norm of another precision": of_transformers(
        "vipllava", "VipLlavaForConditionalGeneration", projector_layernorm_eps=1e-3
    ),
    "a further tower": of_research("llava_llama", "LlavaLlamaForCausalLM", mm_audio_tower="openai/whisper"),
}  # fmt: skip
FAMILY = READ | REFUSED
