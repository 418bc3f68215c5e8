"""The engine's answers: those of `model.generate`, whoever else is being answered, and as each request asks."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import KINDS, alone, answers_together, expected, generated, greedy, loaded, mixed_requests, picture

from llava.conversation import get_template
from llava.engine.engine import Engine, EngineClosed, EngineConfig, EngineError, QueueFull, UnsupportedModelError
from llava.engine.request import Chunk, Request, SamplingParams, ScoreRequest
from llava.errors import InputError

WAYS = {
    "as it is": EngineConfig(),
    "in pieces": EngineConfig(max_step_tokens=7),
    "without prefixes": EngineConfig(prefix_cache=False, feature_cache_bytes=0),
    "a tiny pool": EngineConfig(num_blocks=46, block_size=4),
    "small blocks, few rows": EngineConfig(block_size=4, max_running=3, max_step_tokens=16),
    "guessing ahead": EngineConfig(speculation=5),
    "guessing, tiny pool, in pieces": EngineConfig(speculation=3, num_blocks=46, block_size=4, max_step_tokens=9),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_loaded(loaded("llama")) as engine:
        yield engine


# The same tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(kind: str, way: str) -> None:
    requests = mixed_requests()
    with Engine.from_loaded(loaded(kind), WAYS[way]) as engine:
        results = answers_together(engine, [*requests, *requests[::-1]])
        stats = engine.stats()
    for request, result, tokens in zip(
        [*requests, *requests[::-1]], results, [*expected(kind), *expected(kind)[::-1]], strict=True
    ):
        assert result.completions[0].token_ids == tokens, request.prompt
        reason = "stop" if tokens[-1] == 2 else "length"
        assert result.completions[0].finish_reason == reason
    assert stats.num_blocks_used == stats.num_running == stats.num_waiting == 0
    if "tiny" in way:
        assert stats.num_preemptions > 0
    if "prefixes" not in way:
        assert stats.num_cached_blocks_found > 0
    if "guessing" in way and kind == "llama":
        assert stats.num_steps < sum(map(len, expected(kind)))


@pytest.mark.parametrize("way", ["as it is", "a tiny pool", "small blocks, few rows"])
def test_steps_may_be_launched_before_the_last_one_is_read(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; here a launched step is over at once, but nobody looks at it until the next one is launched."""
    requests = mixed_requests()
    with Engine.from_loaded(loaded("llama"), WAYS[way]) as engine:
        monkeypatch.setattr(engine._loop, "_overlap", True)
        results = answers_together(engine, [*requests, *requests[::-1]])
        constrained = SamplingParams(max_new_tokens=20, regex="[a-c]{9}")
        assert re.fullmatch("[a-c]{9}", engine.generate([Request("x", sampling=constrained), *requests])[0].text)
        assert engine.stats().num_blocks_used == 0
    tokens = [*expected("llama"), *expected("llama")[::-1]]
    assert [result.completions[0].token_ids for result in results] == tokens


def test_the_model_goes_on_working_by_itself(engine: Engine, tmp_path: Any) -> None:
    """Its weights are views of the engine's: `generate` gives the same, and saving writes them all."""
    from safetensors.torch import load_file

    request, tokens = mixed_requests()[1], expected("llama")[1]
    assert tuple(generated("llama", request)) == tokens
    model = loaded("llama")
    model.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(stored[name], tensor), name


def test_pictures_with_equally_many_features_are_not_taken_for_each_other(engine: Engine) -> None:
    requests = [Request("<image>\nwhat is it, and what is beside it?", [picture(n)], greedy(16)) for n in (7, 8, 7)]
    first, second, again = (engine.generate(request) for request in requests)
    assert first.completions[0].token_ids == tuple(generated("llama", requests[0]))
    assert second.completions[0].token_ids == tuple(generated("llama", requests[1]))
    assert first.text != second.text
    assert second.usage.num_cached_tokens == 0
    assert again.text == first.text
    assert again.usage.num_cached_tokens == 32
    assert again.usage.num_prompt_tokens == first.usage.num_prompt_tokens


def test_little_detail_is_the_overview_alone() -> None:
    """Where pictures are cut into tiles: the tokens of `generate` with one tile of pixels, beside the same one in full."""
    whole = loaded("anyres")
    prompt, image = "USER: <image>\nWell? ASSISTANT:", picture(1)
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    inputs = whole.processor(prompt, [image])
    assert inputs.pixels[0].dim() == 4
    with torch.inference_mode():
        tokens = whole.model.generate(
            inputs.input_ids[None], images=[inputs.pixels[0][:1]], image_sizes=[image.size], do_sample=False,
            max_new_tokens=12, min_new_tokens=12,
        )  # fmt: skip
    with Engine.from_loaded(whole) as engine:
        low, full = answers_together(
            engine,
            [Request(prompt, [image], sampling, details=["low"]), Request(prompt, [image], sampling, details=["auto"])],
        )
        with pytest.raises(InputError, match="2 details were given for 1 images"):
            engine.generate(Request(prompt, [image], details=["low", "low"]))
    assert low.completions[0].token_ids == tuple(tokens[0].tolist())
    assert low.usage.num_image_tokens == whole.processor.plan([image.size], ["low"])[0].num_features
    assert full.usage.num_image_tokens == inputs.num_image_tokens > low.usage.num_image_tokens


def test_a_follow_up_pays_for_its_new_tokens_only() -> None:
    with Engine.from_loaded(loaded("llama"), EngineConfig(block_size=4)) as engine:
        first = engine.generate(Request("<image>\nwhat is it?", [picture(4)], greedy(30)))
        inputs = loaded("llama").processor("<image>\nwhat is it?", [picture(4)])
        ids = [*inputs.input_ids.tolist(), *first.completions[0].token_ids, 5, 6, 7]
        following = Request(ids, [picture(4)], greedy(5))
        second = engine.generate(following)
    new = second.usage.num_prompt_tokens - second.usage.num_cached_tokens
    assert new <= 3 + 1 + 4  # the new ones, the answer's last, whose keys nobody needed, and what does not fill a block
    assert second.completions[0].token_ids == tuple(alone("llama", torch.tensor(ids), inputs, 5))


# Sampling


def sampled(seed: int | None, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_new_tokens": 24, "ignore_eos": True} | changes)


def test_a_seed_gives_the_same_answer_in_any_company(engine: Engine) -> None:
    prompt, params = "<image>\nwhat is it?", sampled(11, top_p=0.9, n=3)
    alone = engine.generate(Request(prompt, [picture(0)], params))
    assert len({completion.token_ids for completion in alone.completions}) == 3
    others = [replace(request, sampling=sampled(5)) for request in mixed_requests()]
    for config in (EngineConfig(), EngineConfig(max_step_tokens=5, num_blocks=24), EngineConfig(prefix_cache=False)):
        with Engine.from_loaded(loaded("llama"), config) as fresh:
            *_, among = fresh.generate([*others, Request(prompt, [picture(0)], params)])
            assert among.completions == alone.completions
            assert among.usage.num_new_tokens == 3 * 24
    unseeded = [engine.generate(Request(prompt, [picture(0)], replace(params, seed=None))) for _ in range(2)]
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
    prompts = [("<image>\nwhat is it?", [picture(0)], " a dog, I think"), ("hello", [], [70, 71, 72, 300])]
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


def test_a_greedy_answer_scores_as_greedy(engine: Engine) -> None:
    request, tokens = mixed_requests()[1], expected("llama")[1]
    assert engine.score(ScoreRequest(request.prompt, tokens, request.images)).is_greedy
    with pytest.raises(InputError, match="continuation is empty"):
        engine.score(ScoreRequest("hello", ""))


# Streams, aborts, faults


def joined(chunks: list[Chunk], index: int = 0) -> tuple[str, tuple[int, ...]]:
    own = [chunk for chunk in chunks if chunk.index == index]
    assert [chunk.finish_reason is not None for chunk in own] == [False] * (len(own) - 1) + [True]
    return "".join(chunk.text for chunk in own), tuple(token for chunk in own for token in chunk.token_ids)


def test_a_stream_is_the_result_in_pieces(engine: Engine) -> None:
    request = replace(mixed_requests()[1], sampling=sampled(4, n=2, logprobs=1))
    handle = engine.stream(request)
    chunks = list(handle)
    result = handle.result()
    assert list(handle) == []
    assert len(chunks) > 20
    for completion in result.completions:
        assert joined(chunks, completion.index) == (completion.text, completion.token_ids)
        own = [entry for chunk in chunks if chunk.index == completion.index for entry in chunk.logprobs]
        assert tuple(own) == completion.logprobs
    # The second time the prompt is found in the cache, which moves the last digits of log probabilities.
    for again, first in zip(engine.generate(request).completions, result.completions, strict=True):
        assert (again.text, again.token_ids, again.finish_reason) == (first.text, first.token_ids, first.finish_reason)
        values = [[entry.logprob for entry in completion.logprobs] for completion in (again, first)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert 0 <= result.timings.queued_s <= result.timings.first_token_s <= result.timings.total_s


def test_streams_in_an_event_loop(engine: Engine) -> None:
    async def read(request: Request) -> tuple[str, str]:
        handle = engine.stream(request)
        text = "".join([chunk.text async for chunk in handle])
        return text, (await handle.wait()).text

    async def all_of_them() -> list[tuple[str, str]]:
        return await asyncio.gather(*[read(request) for request in mixed_requests()])

    answers = asyncio.run(all_of_them())
    assert [text for text, _ in answers] == [result.text for result in engine.generate(mixed_requests())]
    assert all(text == result for text, result in answers)


def test_an_abort_keeps_what_has_come_and_frees_the_rest(engine: Engine) -> None:
    handle = engine.stream(Request("hello", sampling=greedy(1500, ignore_eos=True, n=2), request_id="mine"))
    first = next(iter(handle))
    engine.abort("mine")
    chunks = [first, *handle]
    result = handle.result(timeout=30)
    assert [completion.finish_reason for completion in result.completions] == ["cancelled", "cancelled"]
    assert joined(chunks) == (result.completions[0].text, result.completions[0].token_ids)
    assert 0 < result.usage.num_new_tokens < 3000
    engine.generate(Request("x", sampling=greedy(1)))  # one step later
    assert engine.stats().num_blocks_used == 0
    engine.abort("nobody")


def test_a_full_queue_is_refused_and_waited_for() -> None:
    long = Request("hello", sampling=greedy(1500, ignore_eos=True))
    with Engine.from_loaded(loaded("llama"), EngineConfig(max_running=1, max_waiting=2)) as engine:
        running = engine.submit(long)
        next(iter(running))
        waiting = [engine.submit(long) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            engine.submit(long)
        for handle in [running, *waiting]:
            handle.abort()
        assert [handle.result(30).completions[0].finish_reason for handle in waiting] == ["cancelled"] * 2
        assert len(engine.generate([Request("x", sampling=greedy(2))] * 9)) == 9  # waits for room by itself


def test_wrong_requests_are_refused_where_they_are_made(engine: Engine) -> None:
    wrong = [
        (Request("<image> what?"), "marks"),
        (Request([1, 5000]), "token id 5000"),
        (Request([]), "empty"),
        (Request([1, -200]), "1 <image> mark for 0 images"),
        (Request("x", sampling=SamplingParams(logit_bias={320: 1.0})), "logit_bias names token 320"),
        (Request("x", sampling=SamplingParams(stop_token_ids=(999,))), "stop_token_ids names token 999"),
        (Request("word " * 1000), "too long"),
    ]
    for request, words in wrong:
        with pytest.raises(InputError, match=words):
            engine.submit(request)
    handle = engine.submit(Request("x", sampling=greedy(1500, ignore_eos=True), request_id="twice"))
    with pytest.raises(InputError, match="twice"):
        engine.submit(Request("x", request_id="twice"))
    handle.abort()
    handle.result(30)
    assert engine.generate(Request("x", sampling=greedy(1), request_id="twice")).request_id == "twice"


def test_a_fault_reaches_its_request_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    with Engine.from_loaded(model, EngineConfig(feature_cache_bytes=0, prefix_cache=False)) as engine:
        runner = engine._loop.runner
        launch, read_pictures = runner.launch, runner.read_pictures
        bad = picture(9, 44, 33)

        def unreadable(work: Any) -> None:
            if any(image.size == bad.size for image in work.sequence.images):
                raise OSError("the picture is gone")
            read_pictures(work)

        monkeypatch.setattr(runner, "read_pictures", unreadable)
        good, broken = engine.submit(mixed_requests()[1]), engine.submit(Request("<image>", [bad], greedy(5, n=2)))
        with pytest.raises(EngineError, match="the picture is gone"):
            broken.result(30)
        with pytest.raises(EngineError, match="the picture is gone"):
            list(broken)
        assert good.result(30).completions[0].token_ids == expected("llama")[1]

        def breaks(step: Any) -> Any:
            monkeypatch.setattr(runner, "launch", launch)
            raise RuntimeError("out of memory, say")

        monkeypatch.setattr(runner, "launch", breaks)
        with pytest.raises(EngineError, match="RuntimeError: out of memory, say"):
            engine.generate(mixed_requests()[0])
        assert engine.generate(mixed_requests()[0]).completions[0].token_ids == expected("llama")[0]
        assert engine.stats().num_blocks_used == 0


def test_a_fault_of_the_scheduler_s_ends_the_engine_and_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine.from_loaded(loaded("llama")) as engine:
        running = engine.submit(Request("hello", sampling=greedy(1500, ignore_eos=True)))
        next(iter(running))

        def breaks() -> Any:
            raise ZeroDivisionError("a count went wrong")

        monkeypatch.setattr(engine._loop.scheduler, "schedule", breaks)
        with pytest.raises(EngineError, match="the engine stopped: ZeroDivisionError: a count went wrong"):
            running.result(30)
        with pytest.raises(EngineClosed):
            engine.submit(Request("hello"))
    assert "the engine stopped" in caplog.text


def test_a_closed_engine_says_so() -> None:
    engine = Engine.from_loaded(loaded("llama"))
    handle = engine.submit(Request("hello", sampling=greedy(1500, ignore_eos=True)))
    next(iter(handle))
    engine.close()
    engine.close()
    assert handle.result(30).completions[0].finish_reason == "cancelled"
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit(Request("hello"))
    assert not any(thread.name == "llava-engine" and thread is engine._loop._thread for thread in threading.enumerate())


# Models


def test_models_that_the_engine_has_no_arithmetic_for(tmp_path: Any) -> None:
    import tiny

    from llava.model.builder import load

    gemma = load(tiny.build(tmp_path / "gemma", "gemma2", head_dim=16, query_pre_attn_scalar=16), device="cpu")
    with pytest.raises(UnsupportedModelError, match="'gemma2'"):
        Engine.from_loaded(gemma)


@pytest.mark.parametrize(("weights", "dtype"), [("int8", "fp32"), ("fp8", "fp32"), ("int8", "bf16"), (None, "bf16")])
def test_rounded_weights_answer_about_the_same(weights: str | None, dtype: str, tmp_path: Any) -> None:
    import tiny

    from llava.model.builder import load

    folder = tiny.build(tmp_path / "m")
    request = ScoreRequest("<image>\nwhat is it?", " a dog", [picture(0)])
    with Engine.from_loaded(load(folder, device="cpu")) as engine:
        whole = engine.score(request)
    with Engine.from_loaded(load(folder, device="cpu", dtype=dtype), EngineConfig(weights=weights)) as engine:
        rounded = engine.score(request)
        assert rounded.logprobs == pytest.approx(whole.logprobs, abs=0.1)
        assert rounded.logprobs != whole.logprobs
        assert engine.generate(mixed_requests()[1]).usage.num_new_tokens > 0
