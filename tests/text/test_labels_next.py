"""Samples to ids and labels in LLaVA-NeXT's templates, against recordings of LLaVA-NeXT.

Its ids and Gemma's labels are equal to ours. With Qwen and Llama 3 it also trains marks and line breaks everywhere, in the
user's text too, and the opening of each answer: there labels are compared with those that the ids alone imply.
"""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import pytest
from golden_data import golden

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.errors import InputError
from llava.text.labels import preprocess, preprocess_gemma, preprocess_llama3, preprocess_multimodal, preprocess_qwen
from llava.text.tokenization import load_tokenizer

DIRECT = {
    "preprocess_qwen": preprocess_qwen,
    "preprocess_llama3": preprocess_llama3,
    "preprocess_gemma": preprocess_gemma,
}
ARTEFACT = "QA_GT_caption_based_noisy"  # words of one data set that LLaVA-NeXT deletes from every text


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in golden(f"next/{name}").read_text(encoding="utf-8").splitlines()]


ROWS = [row for name in ("qwen", "llama3", "gemma") for row in read(f"preprocess_{name}.jsonl")]
by_case = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['version']}-{row['case']}")


@cache
def load(name: str):
    return load_tokenizer(golden(f"next/tokenizers/{name}"))


def prepare(row: dict):
    if not row["has_image"]:
        return row["sources"]
    data_args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=row["mm_use_im_start_end"])
    return preprocess_multimodal(row["sources"], data_args, conv=conv_templates[row["version"]])


def encode(row: dict) -> tuple[list[list[int]], list[list[int]]]:
    tokenizer = load(row["tokenizer"])
    tokenizer.model_max_length = row["model_max_length"]
    made = preprocess(
        prepare(row), tokenizer, row["has_image"], conv_templates[row["version"]], keep_empty_answers=True
    )
    return [ids.tolist() for ids in made["input_ids"]], [labels.tolist() for labels in made["labels"]]


def answers_by_their_marks(ids: list[int], tokenizer) -> list[int]:
    """Labels that need nothing but ids: an assistant's turn from the end of its header to its end mark, that included."""
    start, end = (
        tokenizer.convert_tokens_to_ids(pair)
        for pair in (
            ("<|im_start|>", "<|im_end|>") if "<|im_start|>" in tokenizer.get_vocab() else ("<|start_header_id|>", "<|eot_id|>")
        )
    )  # fmt: skip
    header = tokenizer("assistant\n", add_special_tokens=False).input_ids
    if "<|end_header_id|>" in tokenizer.get_vocab():
        header = tokenizer("assistant<|end_header_id|>\n\n", add_special_tokens=False).input_ids
    labels, at = [IGNORE_INDEX] * len(ids), 0
    while at < len(ids):
        at += 1
        if ids[at - 1] == start and ids[at : at + len(header)] == header:
            first = at + len(header)
            stop = ids.index(start, first) if start in ids[first:] else len(ids)
            last = max((place for place in range(first, stop) if ids[place] == end), default=stop - 1)
            labels[first : last + 1] = ids[first : last + 1]
            at = last + 1
    return labels


@by_case
def test_placeholders_move_as_recorded(row: dict) -> None:
    if row["has_image"] and row.get("after_multimodal") and ARTEFACT not in str(row["sources"]):
        assert prepare(row) == row["after_multimodal"]


@by_case
def test_ids_and_labels(row: dict) -> None:
    if row.get("error") or row["case"] in ("unknown_role", "mixed_keys_late"):
        check_unsound(row)
        return
    ids, labels = encode(row)
    if ARTEFACT in str(row["sources"]):
        assert all(len(ours) > len(theirs) for ours, theirs in zip(ids, row["input_ids"], strict=True))
        return
    if row["version"] == "gemma_instruct" and row["case"].startswith(
        "empty_"
    ):  # LLaVA-NeXT leaves such turns without end
        end = load(row["tokenizer"])("<end_of_turn>\n", add_special_tokens=False).input_ids
        assert (ids[0][-2:], labels[0][-2:]) == (end, end)
        return
    # LLaVA-NeXT cuts samples without images later, when they are collated.
    cut = None if row["has_image"] else row["model_max_length"]
    assert ids == [sample[:cut] for sample in row["input_ids"]]
    for ours, theirs, sample in zip(labels, [sample[:cut] for sample in row["labels"]], ids, strict=True):
        if row["version"] == "gemma_instruct":
            masked = all(label == IGNORE_INDEX for label in theirs)  # whole samples, where its lengths do not add up
            assert ours == theirs or masked
            continue
        assert ours == answers_by_their_marks(sample, load(row["tokenizer"]))
        # The place of an image is never trained, so its label has no effect.
        assert all(
            label in (IGNORE_INDEX, IMAGE_TOKEN_INDEX, recorded) for label, recorded in zip(ours, theirs, strict=True)
        )


def check_unsound(row: dict) -> None:
    """What LLaVA-NeXT fails on, or takes for a turn although it is none: refused in a sentence, or trained."""
    if row["case"] == "system_from":
        ids, _ = encode(row)
        assert row["sources"][0][0]["value"].strip() in load(row["tokenizer"]).decode(ids[0])
        return
    with pytest.raises(InputError, match=r"needs the keys 'from' and 'value'|known speakers are|is expected"):
        encode(row)


@pytest.mark.parametrize("row", read("preprocess_direct.jsonl"), ids=lambda row: f"{row['call']}-{row['names']}")
def test_functions_that_outside_code_calls(row: dict) -> None:
    tokenizer = load(row["tokenizer"])
    tokenizer.model_max_length = 2048
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {} if row.get("system_message") is None else {"system_message": row["system_message"]}
    made = DIRECT[row["call"]](row["sources"], tokenizer, has_image=row["has_image"], **options)
    assert len(made["input_ids"]) == len(made["labels"]) == len(row["sources"])  # of different lengths too: padded
    if row.get("error"):
        return
    ids = [sample.tolist() for sample in made["input_ids"]]
    if options.get("system_message") == "":  # an empty system text writes no system turn
        ids = [
            [*theirs[: len(theirs) - len(ours) + 1], *ours[1:]]
            for ours, theirs in zip(ids, row["input_ids"], strict=True)
        ]
    assert ids == row["input_ids"]


def test_more_special_tokens_than_two() -> None:
    """Qwen 2.5 has thirteen, which LLaVA-NeXT cannot unpack."""
    tokenizer = load_tokenizer(golden("next/tokenizers/qwen2-mini"))
    tokenizer.add_tokens([f"<|extra_{number}|>" for number in range(11)], special_tokens=True)
    source = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes.\nNo."}]
    made = preprocess_qwen([source], tokenizer)
    ids = made["input_ids"][0].tolist()
    assert made["labels"][0].tolist() == answers_by_their_marks(ids, tokenizer)
    assert ids == preprocess_qwen([source], load("qwen2-mini"))["input_ids"][0].tolist()
