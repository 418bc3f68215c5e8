"""A run teaches its model to stop: the end of an answer is one token, it is trained, and generation knows it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_data import golden
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from train_kit import argv
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import llava
from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates, get_template
from llava.convert.chat_template import chat_template
from llava.engine.engine import Engine
from llava.engine.request import Request, SamplingParams
from llava.errors import InputError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.text.end_token import end_token_id, missing_end_token
from llava.text.labels import dialogue_spans, preprocess
from llava.text.tokenization import load_tokenizer
from llava.train.arguments import parse_train_args
from llava.train.model_setup import fit_template, name_template
from llava.train.run import run

LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role']"
    " + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen 3's, an empty block of thoughts stands before the last answer and before no other.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI_4_MINI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n'"
    " + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_IM, _PHI = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
_HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# name: model type, special tokens, (begin token, end token), chat template, the template that `auto` chooses, the end mark
BASES: dict[str, tuple[str, tuple[str, ...], tuple[str | None, str], str | None, str | None, str]] = {
    "llama-3.1": ("llama", _HEADERS, (_HEADERS[0], "<|eot_id|>"), LLAMA_3, "llama_3", "<|eot_id|>"),
    "llama-3-base": ("llama", _HEADERS, (_HEADERS[0], "<|end_of_text|>"), None, "llava_llama_3", "<|eot_id|>"),
    "qwen2.5-base": ("qwen2", _IM, (None, "<|endoftext|>"), CHATML, "qwen_3", "<|im_end|>"),
    "qwen3": ("qwen3", (*_IM, "<think>", "</think>"), (None, "<|im_end|>"), THINKING, None, "<|im_end|>"),
    "phi-3": ("phi3", _PHI, (None, "<|endoftext|>"), PHI_3, "phi_3", "<|end|>"),
    "phi-4": ("phi3", (*_IM, "<|im_sep|>"), (None, "<|im_end|>"), PHI_4, "phi_4", "<|im_end|>"),
    "phi-4-mini": ("phi3", _PHI, (None, "<|endoftext|>"), PHI_4_MINI, "phi_4_mini", "<|end|>"),
    "gemma-2": ("gemma2", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<bos>", "<eos>"), GEMMA,
                None, "<end_of_turn>"),
    "gemma-3": ("gemma3_text", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<bos>", "<eos>"), GEMMA,
                None, "<end_of_turn>"),
    "mistral-v0.3": ("mistral", ("<s>", "</s>", "[INST]", "[/INST]"), ("<s>", "</s>"), MISTRAL, None, "</s>"),
}  # fmt: skip
TURNS = [
    ("human", "<image>\nWhat is it?"),
    ("gpt", "a red star"),
    ("human", "And  now? "),
    ("gpt", "A blue one.\nSure."),
]


def save_base_tokenizer(folder: Path, name: str) -> Path:
    _, specials, (begin, end), template, *_ = BASES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if begin is not None:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, fast.token_to_id(begin))]
        )
    saved = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=begin, eos_token=end)
    saved.chat_template = template
    saved.save_pretrained(folder)
    return folder


def source(turns: Any = TURNS) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


@pytest.mark.parametrize("name", BASES)
def test_auto_takes_the_models_own_template_and_trains_its_end(tmp_path: Path, name: str) -> None:
    model_type, _, (_, end_of_text), template, expected, mark = BASES[name]
    tokenizer = load_tokenizer(save_base_tokenizer(tmp_path, name))
    chosen = name_template("auto", tokenizer, {"model_type": model_type})
    generation = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(end_of_text))
    fitted = fit_template(chosen, tokenizer, generation)
    assert fitted == chosen
    if expected is not None:
        assert chosen == expected
    conv = get_template(chosen)
    assert missing_end_token(conv, tokenizer) is None
    end = end_token_id(conv, tokenizer)
    assert end == tokenizer.convert_tokens_to_ids(mark)
    stops = generation.eos_token_id
    assert end in (stops if isinstance(stops, list) else [stops])

    made = preprocess([source()], tokenizer, has_image=True, conv=conv, keep_empty_answers=True)
    ids, labels = made["input_ids"][0].tolist(), made["labels"][0].tolist()
    text = "".join(span.text for span in dialogue_spans(source(), conv))
    if template is not None:  # the same text as transformers renders
        messages = [{"role": {"human": "user", "gpt": "assistant"}[who], "content": said} for who, said in TURNS]
        theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
        assert theirs.removeprefix(tokenizer.bos_token or "").startswith(text.removeprefix(tokenizer.bos_token or ""))
    # What is trained follows the prompt that asks for it, and ends with the mark.
    for turns, answer in ((TURNS[:1], "a red star"), (TURNS[:3], "A blue one.\nSure.")):
        asked = conv.copy()
        for place, (_, said) in enumerate(turns):
            asked.append_message(asked.roles[place % 2], said)
        asked.append_message(asked.roles[1], None)
        prompt = tokenizer_image_token(asked.get_prompt().removeprefix(tokenizer.bos_token or ""), tokenizer)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt) - 1] == IGNORE_INDEX
        stop = next(place for place in range(len(prompt), len(ids)) if ids[place] == end)
        assert labels[len(prompt) : stop + 1] == ids[len(prompt) : stop + 1]
        written = tokenizer.decode(ids[len(prompt) : stop], skip_special_tokens=False)
        assert written.split("</think>")[-1].strip() == answer
    assert sum(label == end for label in labels) == 2


@pytest.mark.parametrize("name", [name for name, base in BASES.items() if base[3] is not None])
def test_a_chat_template_of_texts_is_converted_for_parts(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(save_base_tokenizer(tmp_path, name))
    chosen = name_template("auto", tokenizer, {"model_type": BASES[name][0]})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = chat_template(chosen, "<image>")
    conv, messages = get_template(chosen).copy(), []
    for place, (_, text) in enumerate(TURNS[:3]):
        conv.append_message(conv.roles[place % 2], text)
        parts = [{"type": "text", "text": text.removeprefix("<image>\n")}]
        image = [{"type": "image"}] if "<image>" in text else []
        messages.append({"role": ("user", "assistant")[place % 2], "content": [*image, *parts]})
    conv.append_message(conv.roles[1], None)
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    begin = tokenizer.bos_token or ""
    assert rendered.removeprefix(begin) == conv.get_prompt().removeprefix(begin)


def test_an_end_mark_that_is_no_token_is_replaced_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(save_base_tokenizer(tmp_path, "llama-3.1"))
    with caplog.at_level("WARNING"):
        name = fit_template("v1", tokenizer, None)
    assert name == "v1:<|eot_id|>"
    assert "this end mark is no token" in caplog.text
    spans = dialogue_spans(source(), get_template(name))
    assert [span.text for span in spans if span.trained] == [" a red star<|eot_id|>", " A blue one.\nSure.<|eot_id|>"]
    assert fit_template("plain", tokenizer, None) == "plain"  # captions end with a line break
    assert conv_templates["v1"].sep2 == "</s>"
    caplog.clear()
    no_end = SimpleNamespace(get_vocab=dict, unk_token_id=None, eos_token=None)
    with caplog.at_level("WARNING"):
        assert fit_template("v1", no_end, None) == "v1"  # type: ignore[arg-type]
    assert "it is trained as text" in caplog.text


def test_auto_needs_a_template_to_take(tmp_path: Path) -> None:
    (tmp_path / "mamba").mkdir()
    folder = save_base_tokenizer(tmp_path / "mamba", "mistral-v0.3")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template, and its type implies none"):
        name_template("auto", load_tokenizer(folder), {"model_type": "mamba"})


def train_on_one_answer(folder: Path, base: Path, *, version: str, **flags: Any) -> None:
    data = folder / "data.json"
    row = {"id": "1", "image": str(golden("images/grad_64x48.png")), "conversations": source(TURNS[:2])}
    data.write_text(json.dumps([row]))
    words = argv(
        folder / "run", model=str(base), version=version, data_path=data, image_folder=golden("images"),
        vision_tower=golden("checkpoints/vision/clip-tiny-28"), learning_rate="4e-3", max_steps=40,
        per_device_train_batch_size=1, lr_scheduler_type="constant", **flags,
    )  # fmt: skip
    run(*parse_train_args(words))


def save_base(folder: Path, name: str) -> Path:
    save_base_tokenizer(folder, name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("llama-3.1", "v1"),
        ("qwen3", "auto"),
        *(pytest.param(name, version, marks=pytest.mark.slow) for name in BASES for version in ("auto", "llava_v1")),
    ],
)
def test_a_trained_model_answers_and_stops(tmp_path: Path, name: str, version: str) -> None:
    """By `model.generate` as outside code calls it, and by the engine with the template that the result's folder says."""
    (tmp_path / "base").mkdir()
    base = save_base(tmp_path / "base", name)
    train_on_one_answer(tmp_path, base, version=version)
    tokenizer, model, image_processor, _ = load_pretrained_model(str(tmp_path / "run"), None, "llava", device="cpu")
    image = llava.load_image(golden("images/grad_64x48.png"))
    loaded = llava.load(tmp_path / "run", device="cpu")
    conv = get_template(loaded.conv_mode)
    asked = conv.copy()
    asked.append_message(conv.roles[0], TURNS[0][1])
    asked.append_message(conv.roles[1], None)
    ids = tokenizer_image_token(asked.get_prompt(), tokenizer, return_tensors="pt")[None]
    pixels = process_images([image], image_processor, model.config)
    new = model.generate(ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=60)[0]
    assert len(new) < 60
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert text.split("</think>")[-1].strip() == "a red star"
    with Engine(loaded.model, loaded.processor) as engine:
        result = engine.generate([Request(asked, [image], SamplingParams(max_new_tokens=60))])[0]
    assert result.text.split("</think>")[-1].strip() == "a red star"


def test_an_adapter_says_where_generation_stops(tmp_path: Path) -> None:
    """Its base stops at another token."""
    (tmp_path / "base").mkdir()
    base = save_base(tmp_path / "base", "phi-3")
    train_on_one_answer(tmp_path, base, version="auto", lora_enable=True, lora_r=4)
    vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
    stops = llava.load(tmp_path / "run", device="cpu").model.generation_config.eos_token_id
    assert stops == [vocabulary["<|endoftext|>"], vocabulary["<|end|>"]]
