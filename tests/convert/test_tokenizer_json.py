"""Tokenizers written as tokenizer.json give our ids, `<image>` among them; checked against recordings of the original too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden_data import golden, require_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llava.assets import embedded_model_path
from llava.constants import IMAGE_TOKEN_INDEX
from llava.convert.tokenizer_json import TEXTS, convert_tokenizer, differences, save_tokenizer
from llava.text.tokenization import load_tokenizer, tokenizer_image_token

FOLDERS = ["llama-mini1k-legacy", "llama-mini1k-nonlegacy", "neox2k-plain", "neox2k-chatml"]
REAL = ["llama32k-legacy", "llama32k-nonlegacy"]  # LLaMA-2's own, which is not kept here
RECORDED = json.loads(golden("tokenize_image_token.json").read_text())


def folder_of(name: str) -> Path:
    if name == "embedded":
        return embedded_model_path()
    if name == "with markers":
        return golden("checkpoints/llava-v1-tiny-linear")
    return require_golden(f"tokenizers/{name}") if name in REAL else golden(f"tokenizers/{name}")


def ids_of(fast: Tokenizer, text: str) -> list[int]:
    image = fast.token_to_id("<image>")
    return [IMAGE_TOKEN_INDEX if index == image else index for index in fast.encode(text).ids]


@pytest.mark.parametrize("name", [*FOLDERS, *REAL, "embedded", "with markers"])
def test_ids_and_text_are_ours(name: str) -> None:
    tokenizer = load_tokenizer(folder_of(name))
    fast = convert_tokenizer(tokenizer)
    assert differences(tokenizer, fast) == []
    found = differences(tokenizer, fast, RECORDED["prompts"])
    # Nothing but spaces, and spaces that some tokenizers clean up after decoding, which the library leaves to others.
    assert {(difference.what, difference.text) for difference in found} <= {
        ("decoded text", "   "),
        ("decoded text", ". . ."),
    }
    assert fast.get_vocab_size() == len(tokenizer) + 2


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_the_original_s(name: str) -> None:
    """Not by way of our own tokenizer: what the original gave for the same prompts."""
    fast = convert_tokenizer(load_tokenizer(folder_of(name)))
    rows = RECORDED["tokenizers"][name]["rows"]
    for prompt, row in zip(RECORDED["prompts"], rows, strict=True):
        assert ids_of(fast, prompt) == row["ids"], prompt


ALPHABET = st.sampled_from([*"abcXYZ 0.,\n\t▁é中🐈", "  ", "<s>", "</s>", "<unk>", "<image>", "ASSISTANT:", "USER"])


@pytest.mark.parametrize("name", ["llama-mini1k-legacy", "llama-mini1k-nonlegacy", "embedded"])
def test_any_text(name: str) -> None:
    tokenizer = load_tokenizer(folder_of(name))
    tokenizer.model_max_length = 10**9
    fast = convert_tokenizer(tokenizer)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(ALPHABET, max_size=12).map("".join))
    def check(text: str) -> None:
        assert ids_of(fast, text) == tokenizer_image_token(text, tokenizer), text

    check()


@pytest.mark.parametrize("name", ["llama-mini1k-nonlegacy", "neox2k-chatml"])
def test_files_that_transformers_reads(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(folder_of(name))
    save_tokenizer(convert_tokenizer(tokenizer), tokenizer, tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)
    image = theirs.convert_tokens_to_ids("<image>")
    for text in TEXTS:
        assert theirs(text).input_ids == tokenizer_image_token(text, tokenizer, image), text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (tokenizer.bos_token, tokenizer.eos_token, "<pad>")


def test_a_difference_is_reported() -> None:
    """The comparison itself: another rule for spaces is found."""
    legacy = load_tokenizer(folder_of("llama-mini1k-legacy"))
    other = convert_tokenizer(load_tokenizer(folder_of("llama-mini1k-nonlegacy")))
    found = differences(legacy, other)
    assert {difference.what for difference in found} >= {"ids"}
    assert "</s>" in str(found[0])
