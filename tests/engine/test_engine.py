"""The engine's answers: those of `model.generate`, whoever else is being answered, and as each request asks."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import (
    KINDS,
    WAYS,
    alone,
    answers_together,
    expected,
    generated,
    greedy,
    loaded,
    mixed_requests,
    random_image,
    sampled,
)

from llava.engine.config import EngineClosed, EngineConfig, EngineError, QueueFull, UnsupportedModelError
from llava.engine.engine import Engine
from llava.engine.request import Chunk, Request, SamplingParams, ScoreRequest
from llava.errors import InputError


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
        monkeypatch.setattr(engine._worker, "_overlap", True)
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


def test_images_with_equally_many_features_are_not_taken_for_each_other(engine: Engine) -> None:
    requests = [
        Request("<image>\nwhat is it, and what is beside it?", [random_image(n)], greedy(16)) for n in (7, 8, 7)
    ]
    first, second, again = (engine.generate(request) for request in requests)
    assert first.completions[0].token_ids == tuple(generated("llama", requests[0]))
    assert second.completions[0].token_ids == tuple(generated("llama", requests[1]))
    assert first.text != second.text
    assert second.usage.num_cached_tokens == 0
    assert again.text == first.text
    assert again.usage.num_cached_tokens == 32
    assert again.usage.num_prompt_tokens == first.usage.num_prompt_tokens


def test_little_detail_is_the_overview_alone() -> None:
    """Where images are cut into tiles: the tokens of `generate` with one tile of pixels, beside the same one in full."""
    whole = loaded("anyres")
    prompt, image = "USER: <image>\nWell? ASSISTANT:", random_image(1)
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
        first = engine.generate(Request("<image>\nwhat is it?", [random_image(4)], greedy(30)))
        inputs = loaded("llama").processor("<image>\nwhat is it?", [random_image(4)])
        ids = [*inputs.input_ids.tolist(), *first.completions[0].token_ids, 5, 6, 7]
        following = Request(ids, [random_image(4)], greedy(5))
        second = engine.generate(following)
    new = second.usage.num_prompt_tokens - second.usage.num_cached_tokens
    assert new <= 3 + 1 + 4  # the new ones, the answer's last, whose keys nobody needed, and what does not fill a block
    assert second.completions[0].token_ids == tuple(alone("llama", torch.tensor(ids), inputs, 5))


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
    result = handle.result(timeout=300)
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
        (Request("<image> what?"), "placeholder"),
        (Request([1, 5000]), "token id 5000"),
        (Request([]), "empty"),
        (Request([1, -200]), "1 <image> placeholder for 0 images"),
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
        runner = engine._worker.runner
        launch, read_images = runner.launch, runner.read_images
        bad = random_image(9, 44, 33)

        def unreadable(work: Any) -> None:
            if any(image.size == bad.size for image in work.sequence.images):
                raise OSError("the image is gone")
            read_images(work)

        monkeypatch.setattr(runner, "read_images", unreadable)
        good, broken = engine.submit(mixed_requests()[1]), engine.submit(Request("<image>", [bad], greedy(5, n=2)))
        with pytest.raises(EngineError, match="the image is gone"):
            broken.result(30)
        with pytest.raises(EngineError, match="the image is gone"):
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

        monkeypatch.setattr(engine._worker.scheduler, "schedule", breaks)
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
    assert not any(
        thread.name == "llava-engine" and thread is engine._worker._thread for thread in threading.enumerate()
    )


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
    request = ScoreRequest("<image>\nwhat is it?", " a dog", [random_image(0)])
    with Engine.from_loaded(load(folder, device="cpu")) as engine:
        whole = engine.score(request)
    with Engine.from_loaded(load(folder, device="cpu", dtype=dtype), EngineConfig(weights=weights)) as engine:
        rounded = engine.score(request)
        assert rounded.logprobs == pytest.approx(whole.logprobs, abs=0.1)
        assert rounded.logprobs != whole.logprobs
        assert engine.generate(mixed_requests()[1]).usage.num_new_tokens > 0
