"""Nothing leaks and every request ends, whatever arrives: random requests, aborts and tiny pools, and the parts alone."""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import greedy, loaded, mixed_requests, random_image
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.engine.config import EngineConfig
from llava.engine.encoder_cache import EncoderCache
from llava.engine.engine import Engine
from llava.engine.kv_cache import BlockPool, block_hash
from llava.engine.ngram import NgramProposer
from llava.engine.prompt import Prompt, PromptImage
from llava.engine.request import Request, SamplingParams, ScoreRequest
from llava.engine.scheduler import Scheduler, SchedulerOutput
from llava.engine.sequence import GenerationState, Sequence


class Plan:
    """Any schedule of arrivals, in steps: (when, prompt length, new tokens, when to abort)."""

    arrivals = st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(1, 30), st.none() | st.integers(0, 40)),
        min_size=1,
        max_size=12,
    )


def in_use(scheduler: Scheduler) -> None:
    """Every block is counted as often as sequences have it, and no sequence shares a block that it writes."""
    pool = scheduler.pool
    users: dict[int, int] = {}
    for sequence in scheduler.running:
        assert len(sequence.blocks) * scheduler.block_size >= sequence.num_computed
        for block in sequence.blocks:
            users[block] = users.get(block, 0) + 1
    assert pool.num_used == len(users)
    assert {block: count for block, count in enumerate(pool._num_users) if count} == users
    rows = [sequence.slot for sequence in scheduler.running]
    assert len(set(rows)) == len(rows)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=Plan.arrivals,
    num_blocks=st.integers(18, 40),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(1, 64),
    caching=st.booleans(),
    lag=st.booleans(),
    num_drafts=st.integers(0, 3),
    num_clients=st.integers(1, 4),
)
def test_every_sequence_ends_and_nothing_leaks(
    arrivals: list[Any],
    num_blocks: int,
    max_running: int,
    max_step_tokens: int,
    caching: bool,
    lag: bool,
    num_drafts: int,
    num_clients: int,
) -> None:
    """A run of the scheduler with tokens made up; with `lag`, a step is launched before the last one's tokens are known."""
    lag = lag and not num_drafts
    pool = BlockPool(num_blocks, caching=caching)
    chosen = random.Random(0)

    def draft(sequence: Sequence) -> tuple[int, ...]:
        return tuple(chosen.randrange(5) for _ in range(chosen.randrange(num_drafts + 1)))

    scheduler = Scheduler(
        pool,
        block_size=4,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        draft=draft if num_drafts else None,
    )
    sequences, aborts = [], {}
    coming = deque(sorted(arrivals, key=lambda arrival: arrival[0]))
    under_way: SchedulerOutput | None = None

    def read(step: SchedulerOutput | None) -> None:
        for chunk in step.chunks if step else []:
            sequence = chunk.sequence
            if chunk.samples and not sequence.done:
                sequence.num_pending -= 1 + len(chunk.drafts)
                num_accepted = chosen.randrange(len(chunk.drafts) + 1)
                sequence.ids += [*chunk.drafts[:num_accepted], chosen.randrange(5)]
                assert len(sequence.ids) <= sequence.max_total
                if chunk.drafts:
                    sequence.num_computed = len(sequence.ids) - 1
                scheduler.cache_full_blocks(sequence)
                if len(sequence.ids) == sequence.max_total:
                    scheduler.remove(sequence)
            elif not sequence.done:
                scheduler.cache_full_blocks(sequence)

    for now in range(5000):
        while coming and coming[0][0] <= now:
            _, num_prompt, num_new, abort = coming.popleft()
            ids = [chosen.randrange(2) for _ in range(num_prompt)]  # alike often enough to be shared
            client = str(chosen.randrange(num_clients))
            sequence = Sequence(Prompt(ids, ()), max_total=num_prompt + num_new, client=client)
            sequences.append(sequence)
            scheduler.add(sequence)
            if abort is not None:
                aborts[now + abort] = sequence
        if now in aborts and not aborts[now].done:
            scheduler.remove(aborts[now])
            assert aborts[now].blocks == []
        if not coming and not scheduler.has_work:
            break
        step = scheduler.schedule()
        in_use(scheduler)
        assert sum(chunk.count for chunk in step.prefill if not chunk.drafts) <= max_step_tokens
        for chunk in step.chunks:
            assert 0 <= chunk.start < chunk.stop <= len(chunk.sequence.blocks) * 4
        if not lag:
            read(step)
        else:
            read(under_way)
            under_way = step
    assert all(sequence.done for sequence in sequences)
    read(under_way)
    assert pool.num_used == 0
    assert sorted(scheduler._free_slots) == list(range(max_running))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_blocks=st.integers(36, 60), max_step_tokens=st.integers(3, 40), data=st.data())
def test_an_engine_ends_every_request(seed: int, num_blocks: int, max_step_tokens: int, data: Any) -> None:
    chosen = random.Random(seed)
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=4,
        max_running=chosen.randrange(1, 6),
        max_step_tokens=max_step_tokens,
        prefix_cache=chosen.random() < 0.7,
        speculation=chosen.choice([0, 0, 3]),
        feature_cache_bytes=chosen.choice([0, 700, 10**6]),
    )
    with Engine.from_loaded(loaded("llama"), config) as engine:
        handles, scores = [], []
        for _ in range(chosen.randrange(1, 10)):
            images = [random_image(chosen.randrange(3)) for _ in range(chosen.randrange(3))]
            params = SamplingParams(
                temperature=chosen.choice([0.0, 1.0]),
                max_new_tokens=chosen.randrange(1, 60),
                n=chosen.choice([1, 1, 3]),
                stop=("a",) if chosen.random() < 0.3 else (),
            )
            prompt = "<image>" * len(images) + "why? " * chosen.randrange(12)
            handles.append(engine.submit(Request(prompt, images, params)))
            if chosen.random() < 0.4:
                scores.append(engine.submit_score(ScoreRequest(prompt, "because " * chosen.randrange(1, 8), images)))
            if chosen.random() < 0.3:
                chosen.choice(handles).abort()
        for handle in handles:
            result = handle.result(60)
            assert len(result.completions) >= 1
            for completion in result.completions:
                text = "".join(chunk.text for chunk in list(handle._chunks) if chunk.index == completion.index)
                assert text == completion.text
        for handle in scores:
            score = handle.score(60)
            assert len(score.logprobs) == len(score.token_ids)
        engine.generate(Request("x", sampling=SamplingParams(max_new_tokens=1)))
        stats = engine.stats()
        assert (stats.num_blocks_used, stats.num_running, stats.num_waiting) == (0, 0, 0)
        assert stats.feature_cache_bytes <= config.feature_cache_bytes


def test_the_first_of_the_queue_is_never_passed_over() -> None:
    """A long prompt at the head waits for room, and short ones behind it wait too."""
    scheduler = Scheduler(BlockPool(8), block_size=4, max_running=4, max_step_tokens=64)
    running, long, short = (
        Sequence(Prompt([token] * length, ()), max_total=length + 2) for token, length in ((1, 20), (2, 24), (3, 2))
    )
    for sequence in (running, long, short):
        scheduler.add(sequence)
    assert [chunk.sequence for chunk in scheduler.schedule().chunks] == [running]
    assert list(scheduler.waiting) == [long, short]
    scheduler.remove(running)
    assert [chunk.sequence for chunk in scheduler.schedule().chunks] == [long, short]


def test_running_answers_go_on_while_a_long_prompt_is_computed() -> None:
    scheduler = Scheduler(BlockPool(100), block_size=4, max_running=4, max_step_tokens=10)
    first, long = Sequence(Prompt([1] * 4, ()), max_total=50), Sequence(Prompt([2] * 95, ()), max_total=100)
    scheduler.add(first)
    assert [chunk.sequence for chunk in scheduler.schedule().prefill] == [first]
    first.num_pending, first.ids = 0, [*first.ids, 7]
    scheduler.add(long)
    pieces = []
    while not long.has_token_in_slot:
        step = scheduler.schedule()
        assert [chunk.sequence for chunk in step.decode] == [first]
        first.num_pending, first.ids = 0, [*first.ids, 7]
        pieces += [chunk.count for chunk in step.prefill]
    assert pieces == [10] * 9 + [5]


def test_a_request_that_is_over_needs_no_garbage_collector() -> None:
    """A cycle would keep its images until a full collection, which takes a server a third of a second."""
    requests = mixed_requests()

    def alive() -> list[object]:
        return [thing for thing in gc.get_objects() if type(thing) in (GenerationState, Sequence, PromptImage)]

    with Engine.from_loaded(loaded("llama")) as engine:
        engine.generate(requests)
        gc.collect()
        before = alive()  # of this engine's last request, and of engines of other tests
        gc.disable()
        try:
            engine.generate(requests)
            handle = engine.submit(replace(requests[0], sampling=greedy(64)))
            handle.abort()
            handle.wait_until_done()
            engine.generate(requests[0])  # the thread has let go of what was before
            deadline = time.monotonic() + 120
            while len(alive()) > len(before) + 3:  # those of the last one
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            gc.enable()


# The parts


def test_a_pool_allocates_evictable_blocks_last_and_the_oldest_first() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    for place, block in enumerate(first):
        pool.register_hash(block, bytes([place]))
    pool.release(first)
    assert (pool.num_used, pool.num_available) == (0, 4)
    assert pool.find([b"\0", b"\1", b"\7"]) == [0, 1]
    assert pool.allocate(1) == [3]  # free, before any whose content is known
    pool.incref([0])
    assert pool.allocate(1) == [2]  # the end of the released sequence goes first
    assert pool.find([b"\0", b"\1", b"\2"]) == [0, 1]
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [1]
    assert pool.find([b"\0", b"\1"]) == [0]
    with pytest.raises(AssertionError, match="more often"):
        pool.release([0, 0])


def test_a_block_s_hash_is_that_of_all_before_it_and_of_its_images() -> None:
    ids = [-1, -2, 5, 6]
    keys = {
        block_hash(b"", ids, [b"a" * 32]),
        block_hash(b"", ids, [b"b" * 32]),
        block_hash(b"p", ids, [b"a" * 32]),
        block_hash(b"", [-1, -2, 5, 7], [b"a" * 32]),
    }
    assert len(keys) == 4
    assert block_hash(b"", ids, [b"a" * 32]) in keys


def test_features_are_bounded_in_bytes_and_the_oldest_go_first() -> None:
    cache = EncoderCache(100)
    for name in (b"a", b"b"):
        cache.put(name, torch.zeros(10))
    assert cache.get(b"a") is not None
    cache.put(b"c", torch.zeros(10))
    assert [name in cache for name in (b"a", b"b", b"c")] == [True, False, True]
    cache.put(b"d", torch.zeros(1000))
    assert cache.num_bytes == 80


def test_draft_tokens_are_what_followed_the_last_time() -> None:
    proposer = NgramProposer()
    assert proposer.propose([1, 2, 3, 4, 1, 2, 3], 2) == (4, 1)
    assert proposer.propose([1, 2, 3, 4, 1, 2, 3, 9], 2) == ()
    assert proposer.propose([1, 2, 3, 4, 1, 2, 3, 9, 1, 2, 3], 5) == (9, 1, 2, 3)  # the newest place
    assert NgramProposer().propose([1, 2, 8, -1, -2, 5, 1, 2], 4) == (8,)  # an image's features cannot be proposed
