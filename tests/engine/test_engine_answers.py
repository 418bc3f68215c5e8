"""What requests ask of their answers: how tokens are chosen, where they end, grammars, probabilities."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engine_kit import (
    WAYS,
    answers_together,
    expected,
    greedy,
    loaded,
    mixed_requests,
    random_image,
    sampled,
)

from llava.conversation import get_template
from llava.engine.config import EngineConfig
from llava.engine.engine import Engine
from llava.engine.request import Request, SamplingParams, ScoreRequest
from llava.errors import InputError


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_loaded(loaded("llama")) as engine:
        yield engine


# Sampling


def test_a_seed_gives_the_same_answer_in_any_company(engine: Engine) -> None:
    prompt, params = "<image>\nwhat is it?", sampled(11, top_p=0.9, n=3)
    alone = engine.generate(Request(prompt, [random_image(0)], params))
    assert len({completion.token_ids for completion in alone.completions}) == 3
    others = [replace(request, sampling=sampled(5)) for request in mixed_requests()]
    for config in (EngineConfig(), EngineConfig(max_step_tokens=5, num_blocks=24), EngineConfig(prefix_cache=False)):
        with Engine.from_loaded(loaded("llama"), config) as fresh:
            *_, among = fresh.generate([*others, Request(prompt, [random_image(0)], params)])
            assert among.completions == alone.completions
            assert among.usage.num_new_tokens == 3 * 24
    unseeded = [engine.generate(Request(prompt, [random_image(0)], replace(params, seed=None))) for _ in range(2)]
    assert unseeded[0].completions != unseeded[1].completions


def test_top_k_of_one_is_greedy(engine: Engine) -> None:
    request = mixed_requests()[0]
    hot = engine.generate(replace(request, sampling=SamplingParams(temperature=2.0, top_k=1, max_new_tokens=24)))
    assert hot.completions[0].token_ids == expected("llama")[0]


def next_logits(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return loaded("llama").model(torch.tensor([ids])).logits[0, -1]


def test_penalties_and_biases_against_their_formulas(engine: Engine) -> None:
    params = SamplingParams(
        max_new_tokens=30, ignore_eos=True, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={70: 0.3, 80: -100.0},
    )  # fmt: skip
    tight = EngineConfig(num_blocks=14, block_size=4)  # counts survive being displaced
    with Engine.from_loaded(loaded("llama"), tight) as small:
        requests = [Request(f"hello {number}", sampling=params) for number in range(5)]
        results = answers_together(small, requests)
        assert small.stats().num_preemptions > 0
    for request, result in zip(requests, results, strict=True):
        prompt = loaded("llama").processor(request.prompt).input_ids.tolist()
        answer: list[int] = []
        for token in result.completions[0].token_ids:
            logits = next_logits(prompt + answer)
            for seen in set(prompt + answer):
                logits[seen] = logits[seen] / 1.3 if logits[seen] > 0 else logits[seen] * 1.3
            for seen in set(answer):
                logits[seen] -= 0.4 + 0.3 * answer.count(seen)
            logits[70] += 0.3
            logits[80] -= 100.0
            assert token == int(logits.argmax())
            answer.append(token)


def test_logprobs_are_the_model_s(engine: Engine) -> None:
    params = SamplingParams(
        max_new_tokens=6, logprobs=3, ignore_eos=True, temperature=0.7, seed=3, logit_bias={9: 50.0}
    )
    result = engine.generate(Request("hello", sampling=params)).completions[0]
    ids = loaded("llama").processor("hello").input_ids.tolist()
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    for entry in result.logprobs:  # before temperature and bias
        logprobs = next_logits(ids).log_softmax(dim=-1)
        assert entry.logprob == pytest.approx(float(logprobs[entry.token_id]), abs=1e-4)
        top = logprobs.topk(3)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        ids.append(entry.token_id)


# Ends


def test_stop_strings_and_ids_end_an_answer(engine: Engine) -> None:
    request = mixed_requests()[3]
    whole = engine.generate(request)
    text, tokens = whole.text, whole.completions[0].token_ids
    stop = text[10:13]
    cut = engine.generate(replace(request, sampling=greedy(40, stop=(stop, "never this"))))
    assert cut.text == text[: text.index(stop)].rstrip()
    assert cut.completions[0].finish_reason == "stop"
    assert cut.usage.num_new_tokens < len(tokens)
    by_id = engine.generate(replace(request, sampling=greedy(40, stop_token_ids=(tokens[7],))))
    assert by_id.completions[0].token_ids == tokens[: tokens.index(tokens[7]) + 1]
    later = engine.generate(replace(request, sampling=greedy(40, stop_token_ids=(tokens[7],), min_new_tokens=15)))
    assert later.usage.num_new_tokens > 15
    assert tokens[7] not in later.completions[0].token_ids[:15]


def test_the_end_token_ends_and_can_be_ignored(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=20, logit_bias={2: 100.0})
    ended = engine.generate(Request("hello", sampling=params)).completions[0]
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((2,), "", "stop")
    late = engine.generate(Request("hello", sampling=replace(params, min_new_tokens=4))).completions[0]
    assert len(late.token_ids) == 5
    assert 2 not in late.token_ids[:4]
    ignored = engine.generate(Request("hello", sampling=replace(params, ignore_eos=True))).completions[0]
    assert (ignored.token_ids, ignored.finish_reason) == ((2,) * 20, "length")


def test_a_conversation_ends_where_its_template_says(engine: Engine) -> None:
    conversation = get_template("v0")  # its answers end with "###"
    conversation.append_message(conversation.roles[0], "Hi")
    conversation.append_message(conversation.roles[1], None)
    place = 5
    force = SamplingParams(max_new_tokens=20, logit_bias={3 + place: 100.0})
    result = engine.generate(Request(conversation, sampling=force))
    sharp = loaded("llama").tokenizer("###", add_special_tokens=False).input_ids[0]
    ended = engine.generate(
        Request(conversation, sampling=SamplingParams(max_new_tokens=20, logit_bias={sharp: 100.0}))
    )
    assert result.completions[0].finish_reason == "length"
    assert ended.completions[0].finish_reason == "stop"
    assert ended.text == ""
    assert ended.usage.num_new_tokens == 3


def test_answers_end_with_the_context(engine: Engine) -> None:
    with Engine.from_loaded(loaded("llama"), EngineConfig(context_len=40)) as short:
        result = short.generate(Request("hello", sampling=greedy(500, ignore_eos=True)))
        assert result.usage.num_prompt_tokens + result.usage.num_new_tokens == 40
        assert result.completions[0].finish_reason == "length"
        with pytest.raises(InputError, match="context holds 40"):
            short.generate(Request("hello " * 10))


# Grammars


def test_answers_obey_a_regular_expression_and_a_schema(engine: Engine) -> None:
    pytest.importorskip("llguidance")
    by_regex = SamplingParams(temperature=1.0, seed=1, max_new_tokens=40, regex=r"(yes|no), [0-9]{3}!")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    by_schema = SamplingParams(temperature=1.0, seed=1, max_new_tokens=200, json_schema=schema)
    free = mixed_requests()[0]
    yes, answer, other = engine.generate(
        [Request("Well?", sampling=by_regex), Request("Say it.", sampling=by_schema), free]
    )
    assert re.fullmatch(r"(yes|no), [0-9]{3}!", yes.text)
    assert yes.completions[0].finish_reason == "stop"
    value = json.loads(answer.text)
    assert value["colour"] in ("red", "blue")
    assert value["count"] <= 99
    assert other.completions[0].token_ids == expected("llama")[0]
    with pytest.raises(InputError, match="regex"):
        engine.generate(Request("Well?", sampling=SamplingParams(regex="(")))
    with pytest.raises(InputError, match="json_schema"):
        engine.generate(Request("Well?", sampling=SamplingParams(json_schema="{")))


# Scores


@pytest.mark.parametrize("way", ["as it is", "in pieces", "a tiny pool"])
def test_scores_are_the_model_s_log_probabilities(way: str) -> None:
    model = loaded("llama")
    prompts = [("<image>\nwhat is it?", [random_image(0)], " a dog, I think"), ("hello", [], [70, 71, 72, 300])]
    requests = [ScoreRequest(prompt, continuation, images) for prompt, images, continuation in prompts]
    with Engine.from_loaded(model, WAYS[way]) as engine:
        scores = engine.score([*requests, *requests])
        follow = engine.generate(mixed_requests()[1])
    assert follow.completions[0].token_ids == expected("llama")[1]
    for (prompt, images, continuation), score, again in zip(prompts, scores[:2], scores[2:], strict=True):
        tokens = (
            model.tokenizer(continuation, add_special_tokens=False).input_ids
            if isinstance(continuation, str)
            else continuation
        )
        assert list(score.token_ids) == tokens
        inputs = model.processor(prompt, images)
        ids = torch.cat([inputs.input_ids, torch.tensor(tokens)])[None]
        with torch.inference_mode():
            logits = model.model(ids, images=inputs.images, image_sizes=inputs.image_sizes or None).logits[0]
        logprobs = logits[-len(tokens) - 1 : -1].log_softmax(dim=-1)
        expected_values = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert score.logprobs == pytest.approx(expected_values, abs=1e-4)
        assert again.logprobs == pytest.approx(expected_values, abs=1e-4)
        assert score.total_logprob == pytest.approx(math.fsum(expected_values), abs=1e-3)
        assert score.is_greedy == (logprobs.argmax(dim=-1).tolist() == tokens)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_score_that_is_preempted_in_the_middle_is_the_same(engine: Engine, prefix_cache: bool) -> None:
    request = ScoreRequest("hello", [10 + 7 * number % 290 for number in range(60)])
    whole = engine.score(request)
    num_preemptions = 0
    for num_blocks in (21, 24, 27):
        config = EngineConfig(num_blocks=num_blocks, block_size=4, max_step_tokens=7, prefix_cache=prefix_cache)
        with Engine.from_loaded(loaded("llama"), config) as small:
            params = SamplingParams(max_new_tokens=60, ignore_eos=True)
            with small._worker._changed:  # all in the first step
                others = [small.submit(Request(f"hello {number}", sampling=params)) for number in range(3)]
                handle = small.submit_score(request)
            assert handle.score(60).logprobs == pytest.approx(whole.logprobs, abs=1e-4)
            for other in others:
                other.result(60)
            num_preemptions += small.stats().num_preemptions
    assert num_preemptions > 0


def test_a_greedy_answer_scores_as_greedy(engine: Engine) -> None:
    request, tokens = mixed_requests()[1], expected("llama")[1]
    assert engine.score(ScoreRequest(request.prompt, tokens, request.images)).is_greedy
    with pytest.raises(InputError, match="continuation is empty"):
        engine.score(ScoreRequest("hello", ""))
