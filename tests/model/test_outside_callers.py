"""Evaluation suites that load a model by this package: the calls of lmms-eval's and VLMEvalKit's classes, in their order.

The classes are not copied: what they import, construct and call is written down here from their sources.
"""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import golden
from PIL import Image
from transformers import AutoConfig

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.engine.engine import Engine
from llava.engine.request import Request, SamplingParams, ScoreRequest
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load, load_pretrained_model

CHECKPOINTS = ("llava-v1.5-tiny-vicuna", "llava-v1.6-tiny-vicuna")
GENERATION = {
    "do_sample": False,
    "temperature": 0,
    "top_p": None,
    "num_beams": 1,
    "max_new_tokens": 12,
    "use_cache": True,
}
QUESTIONS = ("What is shown?", "How many cats and dogs are in this image, and where?")


@pytest.fixture(scope="module", params=CHECKPOINTS)
def path(request: pytest.FixtureRequest) -> Path:
    # Towers are named relative to the recordings' folder.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden(""))
        yield golden(f"checkpoints/{request.param}")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.effect_noise(size, 90).convert("RGB") for size in ((64, 48), (40, 90))]


def prompt_of(template: str, question: str) -> str:
    conv = copy.deepcopy(conv_templates[template])
    conv.append_message(conv.roles[0], question)
    conv.append_message(conv.roles[1], None)
    return conv.get_prompt()


def engine_texts(path: Path, images: list[Image.Image], template: str) -> list[str]:
    """The answers of this package's own engine."""
    requests = []
    for image, question in zip(images, QUESTIONS, strict=True):
        conv = copy.deepcopy(conv_templates[template])
        conv.append_message(conv.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        conv.append_message(conv.roles[1], None)
        requests.append(Request(conv, [image], SamplingParams(max_new_tokens=12)))
    loaded = load(path, device="cpu")
    with Engine(loaded.model, loaded.processor) as engine:
        return [result.text for result in engine.generate(requests)]


def engine_loss(path: Path, image: Image.Image, answer: str, template: str) -> float:
    """The mean of what the engine scores an answer's tokens, negative, for the first question."""
    conv = copy.deepcopy(conv_templates[template])
    conv.append_message(conv.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{QUESTIONS[0]}")
    conv.append_message(conv.roles[1], None)
    loaded = load(path, device="cpu")
    begun = tokenizer_image_token(conv.get_prompt(), loaded.tokenizer, IMAGE_TOKEN_INDEX)
    conv.messages[1][1] = answer
    whole = tokenizer_image_token(conv.get_prompt(), loaded.tokenizer, IMAGE_TOKEN_INDEX)
    with Engine(loaded.model, loaded.processor) as engine:
        score = engine.score(ScoreRequest(whole[: len(begun)], whole[len(begun) :], [image]))
    return -score.total_logprob / len(score.logprobs)


def as_half(pixels: Any) -> Any:
    return [one.to(torch.float16) for one in pixels] if isinstance(pixels, list) else pixels.to(torch.float16)


class LmmsEval:
    """What lmms-eval's model `llava` does, with `device_map` at its default."""

    def __init__(self, pretrained: str) -> None:
        name = get_model_name_from_path(pretrained)
        self.tokenizer, self.model, self.image_processor, self.max_length = load_pretrained_model(
            pretrained, None, name, device_map="", use_flash_attention_2=False
        )
        self.config = self.model.config
        self.model.eval()
        self.model.tie_weights()
        self.model.to("cpu")

    def pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        flips = self.tokenizer.padding_side == "left"
        rows = [row.flip(0) for row in rows] if flips else rows
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        return padded.flip(1) if flips else padded

    def answers(self, visuals: list[Image.Image], contexts: tuple[str, ...], template: str) -> list[str]:
        until = [self.tokenizer.decode(self.tokenizer.eos_token_id)]
        assert until == ["</s>"]
        assert self.tokenizer.encode("a b", add_special_tokens=False)
        pixels = as_half(process_images(visuals, self.image_processor, self.config))
        prompts = [prompt_of(template, f"{DEFAULT_IMAGE_TOKEN}\n{context}") for context in contexts]
        pad_id = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        rows = [tokenizer_image_token(one, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt") for one in prompts]
        ids = self.pad(rows, pad_id).to("cpu")
        out = self.model.generate(
            ids, attention_mask=ids.ne(pad_id), pad_token_id=pad_id, images=pixels,
            image_sizes=[image.size for image in visuals], **GENERATION,
        )  # fmt: skip
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    def loglikelihood(self, visual: Image.Image, context: str, continuation: str, template: str) -> float:
        pixels = as_half(process_images([visual], self.image_processor, self.config))
        conv = conv_templates[template].copy()
        conv.append_message(conv.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{context}")
        conv.append_message(conv.roles[1], None)
        begun = tokenizer_image_token(conv.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        conv.messages[1][1] = continuation
        ids = tokenizer_image_token(conv.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        labels = ids.clone()
        labels[0, : begun.shape[1]] = -100
        with torch.inference_mode():
            outputs = self.model(
                input_ids=ids, labels=labels, images=pixels, use_cache=True, image_sizes=[visual.size],
                modalities=["image"],
            )  # fmt: skip
        assert outputs["logits"].argmax(dim=-1).shape[0] == 1
        return float(outputs["loss"].item())


def test_lmms_eval(path: Path, images: list[Image.Image]) -> None:
    suite = LmmsEval(str(path))
    found = suite.answers(images, QUESTIONS, "vicuna_v1")
    alone = [suite.answers([image], (text,), "vicuna_v1")[0] for image, text in zip(images, QUESTIONS, strict=True)]
    assert found == alone == engine_texts(path, images, "vicuna_v1")
    for text in (found[0], "zebra"):
        loss = suite.loglikelihood(images[0], QUESTIONS[0], text, "vicuna_v1")
        assert loss == pytest.approx(engine_loss(path, images[0], text, "vicuna_v1"), abs=0.02)


def vlmeval_answer(parts: Any, prompt: str, pixels: Any, stop: str, **more: Any) -> str:
    tokenizer, model, _, _ = parts
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0).to("cpu")
    criteria = KeywordsStoppingCriteria([stop], tokenizer, ids)
    with torch.inference_mode():
        out = model.generate(ids, images=pixels, stopping_criteria=[criteria], **{**GENERATION, **more})
    return tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()


def test_vlmevalkit_llava(path: Path, images: list[Image.Image]) -> None:
    name = get_model_name_from_path(str(path))
    parts = load_pretrained_model(
        model_path=str(path), model_base=None, model_name=name, device="cpu", device_map="cpu"
    )
    system = conv_templates["llava_v1"].system + " "
    settings = SimpleNamespace(image_aspect_ratio="pad")
    pixels = process_images(images, parts[2], settings).to("cpu", dtype=torch.float16)
    both = vlmeval_answer(parts, f"{system}USER:  <image>  <image> What? ASSISTANT: ", pixels, "</s>")
    history = f"{system}USER: Hi ASSISTANT: Hello.</s>USER:  <image> What? ASSISTANT: "
    assert isinstance(both, str)
    assert vlmeval_answer(parts, history, pixels[:1], "</s>") == vlmeval_answer(parts, history, pixels[:1], "</s>")
    assert vlmeval_answer(parts, f"{system}USER: Hi ASSISTANT: ", None, "</s>") is not None


def test_vlmevalkit_next2_and_onevision(path: Path, images: list[Image.Image]) -> None:
    parts = load_pretrained_model(str(path), None, get_model_name_from_path(str(path)), device_map=None)
    _, model, image_processor, _ = parts
    model.eval()
    model.tie_weights()
    conv = copy.deepcopy(conv_templates["vicuna_v1"])
    stop = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
    single = torch.stack(
        [image_processor.preprocess(one, return_tensors="pt")["pixel_values"][0].half() for one in images]
    )
    prompt = prompt_of("vicuna_v1", "<image>\n<image>\nWhat?")
    assert isinstance(vlmeval_answer(parts, prompt, single, stop), str)
    tiles = [
        one.to(dtype=torch.float16, device="cpu") for one in process_images(images[:1], image_processor, model.config)
    ]
    question = prompt_of("vicuna_v1", f"<image>\n{QUESTIONS[0]}")
    found = vlmeval_answer(parts, question, tiles, stop, image_sizes=[images[0].size], modalities=["image"])
    assert found == engine_texts(path, images, "vicuna_v1")[0]


# LLaVA-OneVision and LLaVA-Video


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onevision") / "llava-onevision-qwen2-tiny-ov"
    shutil.copytree(golden("next/checkpoints/onevision-siglip28-qwen"), folder)
    tower = {"mm_vision_tower": str(golden("next/checkpoints/vision/siglip-28-p4"))}
    config = json.loads((folder / "config.json").read_text()) | tower
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Frames as video readers give them: (frames, height, width, channels)."""
    return np.random.default_rng(0).integers(0, 255, (4, 48, 64, 3), dtype=np.uint8)


def load_for_lmms_eval(path: Path, **settings: Any) -> Any:
    """As lmms-eval's `llava_onevision` and `llava_vid` load; a TypeError would have them try again without `multimodal`."""
    importlib.import_module("llava.model.builder")
    assert AutoConfig.from_pretrained(path).mm_patch_merge_type == "spatial_unpad"
    return load_pretrained_model(
        str(path), None, get_model_name_from_path(str(path)), device_map="auto", multimodal=True,
        attn_implementation="sdpa", overwrite_config=settings,
    )  # fmt: skip


def test_lmms_eval_onevision(onevision: Path, frames: np.ndarray, images: list[Image.Image]) -> None:
    settings = {"mm_spatial_pool_stride": 2, "mm_spatial_pool_mode": "average"}
    tokenizer, model, image_processor, max_length = load_for_lmms_eval(onevision, **settings)
    assert max_length == 32768
    assert {key: getattr(model.config, key) for key in settings} == settings
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert "image_aspect_ratio" in model.config.__dict__  # it is set to "pad" for several images, and back
    prompt = prompt_of("qwen_1_5", f"{DEFAULT_IMAGE_TOKEN}\nWhat?")
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    video = image_processor.preprocess(frames, return_tensors="pt")["pixel_values"].half()
    criteria = KeywordsStoppingCriteria([conv_templates["qwen_1_5"].sep], tokenizer, ids)
    common = {"attention_mask": ids.ne(pad), "pad_token_id": pad, "use_cache": True, "max_new_tokens": 6}
    with torch.inference_mode():
        found = model.generate(ids, images=[video], modalities=["video"], stopping_criteria=[criteria], **common)
        # Frames that are static images, as one batch.
        same = model.generate(ids, images=video, modalities=["video"], **common)
        # VLMEvalKit names a modality for each frame, and sizes that are numbers of bytes.
        again = model.generate(
            ids, images=[video], image_sizes=[frame.size for frame in frames], do_sample=False, temperature=0,
            max_new_tokens=6, modalities=["video"] * len(frames), stopping_criteria=[criteria],
        )  # fmt: skip
    assert found.tolist() == same.tolist() == again.tolist()
    assert found.shape[1] <= 6
    labels = ids.clone()
    labels[0, :-3] = -100
    with torch.inference_mode():
        losses = [
            float(model(input_ids=ids, labels=labels, images=[video], modalities=modalities, use_cache=True)["loss"])
            for modalities in (["video"], "video")  # llava_vid gives the bare word
        ]
    assert losses[0] == losses[1]
    # Several images: each one tile, with the sizes that the suites give as lists.
    model.config.image_aspect_ratio = "pad"
    two = process_images(images, image_processor, model.config)
    ids = tokenizer_image_token(prompt_of("qwen_1_5", "<image> <image>\nWhat?"), tokenizer, return_tensors="pt")[None]
    sizes = [[image.size[0], image.size[1]] for image in images]
    with torch.inference_mode():
        model.generate(ids, images=as_half(two), image_sizes=[image.size for image in images], **{
            **common, "attention_mask": ids.ne(pad)})  # fmt: skip
        assert (
            model(input_ids=ids, labels=ids.clone().clamp(min=-100), images=as_half(two), image_sizes=sizes)["loss"] > 0
        )


def test_vlmevalkit_onevision(onevision: Path, images: list[Image.Image]) -> None:
    name = get_model_name_from_path(str(onevision))
    parts = load_pretrained_model(str(onevision), None, name, device_map="cpu")
    _, model, image_processor, _ = parts
    model.eval()
    model.tie_weights()
    stop = conv_templates["qwen_1_5"].sep
    prompt = prompt_of("qwen_1_5", f"<image>\n{QUESTIONS[0]}")
    tiles = [tile.to(dtype=torch.float16) for tile in process_images(images[:1], image_processor, model.config)]
    found = vlmeval_answer(parts, prompt, tiles, stop, image_sizes=[images[0].size])
    assert found == engine_texts(onevision, images, "qwen_1_5")[0]


@pytest.mark.parametrize("name", [
    "llava-onevision-qwen2-7b-ov", "llava_qwen", "LLaVA-Video-7B-Qwen2", "llava-critic-7b", "llava-next-72b", "qwen2-7b",
    "llava-v1.6-vicuna-13b", "llava-mpt-7b", "LLaVA-NeXT-Video-7B-DPO", "llava-qwen-moe-a14b", "llava-gemma-2b",
])  # fmt: skip
def test_the_files_decide_about_the_class(onevision: Path, name: str) -> None:
    """LLaVA-NeXT takes the class by the name, so that these names load a LLaMA, an MPT, or fail over the same files."""
    tokenizer, model, image_processor, max_length = load_pretrained_model(
        str(onevision), None, name, device_map="cpu", attn_implementation="eager", torch_dtype="bfloat16"
    )
    assert type(model).__name__ == "LlavaQwenForCausalLM"
    assert max_length == 32768
    assert model.get_vision_tower().image_size == image_processor.crop_size["height"] == 28
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # Rows beyond the tokenizer's are kept, unlike there, where the tables shrink to 262.
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 320
    assert len(tokenizer) == 262


@pytest.mark.parametrize("setting", [
    {"mm_spatial_pool_mode": "max"}, {"mm_newline_position": "frame", "mm_spatial_pool_stride": 3},
    {"image_aspect_ratio": "anyres_max_4", "tokenizer_model_max_length": 4096}, {"delay_load": True},
])  # fmt: skip
def test_settings_that_callers_overwrite(onevision: Path, setting: dict[str, Any]) -> None:
    _, model, _, max_length = load_pretrained_model(
        str(onevision), None, "llava_qwen", device_map="cpu", overwrite_config=setting
    )
    assert {key: getattr(model.config, key) for key in setting} == setting
    assert max_length == setting.get("tokenizer_model_max_length", 32768)
    config = json.loads((onevision / "config.json").read_text()) | setting
    file = onevision.parent / "customized.json"
    file.write_text(json.dumps(config))
    _, other, _, _ = load_pretrained_model(
        str(onevision), None, "llava_qwen", device_map="cpu", customized_config=str(file)
    )
    assert {key: getattr(other.config, key) for key in setting} == setting


def test_names_that_suites_import() -> None:
    from llava.mm_utils import get_anyres_image_grid_shape, process_anyres_image, process_highres_image
    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.model.language_model.llava_qwen import LlavaQwenConfig
    from llava.utils import rank0_print

    AutoConfig.register("llava_llama", LlavaConfig)  # llava_vid does so after this package
    AutoConfig.register("llava_qwen", LlavaQwenConfig)
    assert get_anyres_image_grid_shape((10, 10), [(336, 672)], 336) == (1, 2)
    assert all(map(callable, (process_anyres_image, process_highres_image, rank0_print)))
