"""Stopping at keywords against recordings, and inside transformers' own bookkeeping."""

from __future__ import annotations

import json

import pytest
import torch
from golden_data import fullest, golden, require_golden

from llava.text.stopping import KeywordsStoppingCriteria
from llava.text.tokenization import load_tokenizer

ROWS = [
    row
    for row in json.loads(fullest("tokenize_image_token.json").read_text(encoding="utf-8"))["keywords_stopping"]
    if "stop_at_each_step" in row
]


@pytest.fixture
def mini():
    return load_tokenizer(golden("tokenizers/llama-mini1k-legacy"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['tokenizer']}-{'+'.join(row['keywords'])}")
def test_every_step_is_the_recorded_one(row):
    tokenizer = load_tokenizer(require_golden(f"tokenizers/{row['tokenizer']}"))
    prompt = torch.tensor([row["prompt_ids"]])
    criteria = KeywordsStoppingCriteria(row["keywords"], tokenizer, prompt)
    assert [ids.tolist() for ids in criteria.keyword_ids] == row["keyword_ids"]
    assert criteria.max_keyword_len == row["max_keyword_len"]
    steps = []
    for step in range(len(row["generated_ids"])):
        ids = torch.tensor([row["prompt_ids"] + row["generated_ids"][: step + 1]])
        steps.append(bool(criteria(ids, None)))
    assert steps == row["stop_at_each_step"]


def test_new_tokens_only_are_judged_like_prompt_and_new_tokens(mini):
    prompt = torch.tensor([mini("A long question, </s> and STOP in it.").input_ids])
    new = mini("and then we STOP").input_ids[1:]
    criteria = KeywordsStoppingCriteria(["STOP"], mini, prompt)
    for length in range(1, len(new) + 1):
        alone = torch.tensor([new[:length]])
        assert bool(criteria(alone, None)) == bool(criteria(torch.cat([prompt, alone], 1), None))
    assert bool(criteria(torch.tensor([new]), None))


def test_a_batch_is_done_when_all_of_its_rows_are(mini):
    prompt = torch.tensor([mini("x").input_ids] * 2)
    stop = mini("###").input_ids[1:]
    rows = torch.tensor([stop, [5] * len(stop)])
    criteria = KeywordsStoppingCriteria(["###"], mini, prompt)
    assert criteria(torch.cat([prompt, rows], 1), None).tolist() == [True, False]
    assert criteria(torch.cat([prompt, rows[:1].expand(2, -1)], 1), None).all()


def test_rows_of_a_beam_search_share_their_prompt(mini):
    prompt = torch.tensor([mini("STOP").input_ids])
    criteria = KeywordsStoppingCriteria(["STOP"], mini, prompt)
    beams = torch.cat([prompt.expand(3, -1), torch.tensor([[260], [280], [300]])], 1)
    assert criteria(beams, None).tolist() == [False] * 3


def test_an_empty_keyword_never_stops(mini):
    prompt = torch.tensor([mini("x").input_ids])
    criteria = KeywordsStoppingCriteria([""], mini, prompt)
    assert not criteria(torch.cat([prompt, prompt], 1), None).any()


def test_generate_takes_it(mini):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([mini("hello there").input_ids])
    free = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    new = free[0, prompt.shape[1] :].tolist()
    keyword = mini.decode(new[:4]).split()[-1]
    criteria = KeywordsStoppingCriteria([keyword], mini, prompt)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "stopping_criteria": [criteria]}
    stopped = model.generate(prompt, max_new_tokens=12, **options)
    embeds = model.get_input_embeddings()(prompt)
    from_embeds = model.generate(inputs_embeds=embeds, max_new_tokens=12, **options)
    assert stopped.shape[1] < free.shape[1]
    assert stopped[0].tolist() == free[0, : stopped.shape[1]].tolist()
    assert from_embeds[0].tolist() == stopped[0, prompt.shape[1] :].tolist()


def test_an_end_mark_that_only_the_vocabulary_calls_special_ends_an_answer():
    """MPT's `<|im_end|>` is special in tokenizer.json and not among all_special_ids; decoding hides it all the same."""
    from llava.text.detokenizer import IncrementalDetokenizer

    tokenizer = load_tokenizer(golden("checkpoints/llava-tiny-mpt"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in tokenizer.all_special_ids
    word = tokenizer("yellow").input_ids
    reader = IncrementalDetokenizer(tokenizer, ["<|im_end|>"])
    assert reader.read([*word, end, *word]) + reader.finish() == "yellow"
    assert reader.stopped
