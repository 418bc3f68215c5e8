"""Clients that share an engine take turns: none waits for all answers of another, and answers stay what they are."""

from __future__ import annotations

from collections import Counter

import pytest
from engine_kit import loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.engine import Engine, EngineConfig, Request, SamplingParams
from llava.engine.fair_queue import QUANTUM, FairQueue
from llava.engine.kv_cache import BlockPool
from llava.engine.prompt import Prompt
from llava.engine.scheduler import Scheduler
from llava.engine.sequence import Sequence


def waiting(client: str, size: int = 100) -> Sequence:
    return Sequence(Prompt([1] * 4, ()), max_total=size, client=client)


def drained(queue: FairQueue, *, num: int) -> list[Sequence]:
    """The first so many sequences in the order of admission, of which each ends before the next."""
    taken = []
    for _ in range(num):
        sequence = queue.next({}, 1)
        queue.remove(sequence)
        taken.append(sequence)
    return taken


def test_one_client_is_served_in_the_order_of_arrival() -> None:
    queue = FairQueue()
    sequences = [waiting("a", size) for size in (5000, 10, 300)]
    for sequence in sequences:
        queue.append(sequence)
    assert list(queue) == sequences
    assert drained(queue, num=3) == sequences
    assert not queue


def test_a_client_with_one_request_waits_for_few_of_another_with_a_thousand() -> None:
    queue = FairQueue()
    for _ in range(1000):
        queue.append(waiting("many", 500))
    queue.append(waiting("one", 500))
    assert [sequence.client for sequence in drained(queue, num=4)].count("one") == 1


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(
    st.lists(st.integers(1, 3000), min_size=60, max_size=60), st.lists(st.integers(1, 3000), min_size=60, max_size=60)
)
def test_positions_are_shared_evenly_whatever_the_sizes(first: list[int], second: list[int]) -> None:
    """While both wait, neither gets ahead by more than two quanta and a sequence."""
    queue = FairQueue()
    for client, sizes in (("a", first), ("b", second)):
        for size in sizes:
            queue.append(waiting(client, size))
    got: Counter[str] = Counter()
    while len({sequence.client for sequence in queue}) == 2:
        (sequence,) = drained(queue, num=1)
        got[sequence.client] += sequence.max_total
        assert abs(got["a"] - got["b"]) <= 2 * QUANTUM + 2 * 3000


def scheduler(max_running: int, num_blocks: int = 1000) -> Scheduler:
    return Scheduler(BlockPool(num_blocks), block_size=4, max_running=max_running, max_step_tokens=64)


def step(scheduler: Scheduler) -> None:
    """One step whose tokens are all known after it."""
    for chunk in scheduler.schedule().chunks:
        if chunk.samples:
            chunk.sequence.num_pending = 0
            chunk.sequence.ids.append(7)


def running(scheduler: Scheduler) -> Counter[str]:
    return Counter(sequence.client for sequence in scheduler.running)


@pytest.mark.parametrize("num_blocks", [1000, 8])  # slots are what lacks, or blocks
def test_a_client_that_runs_everything_gives_slots_to_another(num_blocks: int) -> None:
    few = scheduler(4, num_blocks)
    for _ in range(20):
        few.add(waiting("many", 8))
    step(few)
    assert running(few) == {"many": 4}
    first = few.running[0]
    few.add(waiting("one", 8))
    step(few)
    step(few)
    assert running(few)["one"] == 1
    assert few.running[0] is first
    for _ in range(5):
        few.add(waiting("one", 8))
    for _ in range(4):
        step(few)
    assert running(few) == {"many": 2, "one": 2}  # half each, and no more is taken


def test_one_client_alone_uses_all_slots_and_nothing_is_preempted_for_equals() -> None:
    few = scheduler(3)
    for _ in range(9):
        few.add(waiting("alone", 50))
    step(few)
    assert running(few) == {"alone": 3}
    many = scheduler(3)
    for number in range(9):
        many.add(waiting(f"client {number}", 50))
    for _ in range(5):
        step(many)
    assert many.num_preemptions == 0


def test_answers_are_the_same_among_clients_that_displace_each_other() -> None:
    config = EngineConfig(max_running=2, context_len=256)
    prompts = [f"why {number}? " * (number + 1) for number in range(6)]
    params = SamplingParams(max_new_tokens=180, ignore_eos=True, temperature=1.0, seed=5)
    with Engine.from_loaded(loaded("llama"), config) as engine:
        alone = [engine.generate(Request(prompt, sampling=params)).text for prompt in prompts]
        handles = [engine.submit(Request(prompt, sampling=params, client="many")) for prompt in prompts[:5]]
        next(iter(handles[0]))
        handles.append(engine.submit(Request(prompts[5], sampling=params, client="one")))
        assert handles[5].result(60).text == alone[5]
        assert not all(handle.done for handle in handles)
        assert [handle.result(60).text for handle in handles] == alone
        assert engine.stats().num_preemptions > 0
        assert (engine.stats().num_blocks_used, engine.stats().num_running, engine.stats().num_waiting) == (0, 0, 0)


def test_a_newcomer_s_prompt_waits_for_no_decoding_of_others_who_then_go_on() -> None:
    shared = scheduler(8)
    for _ in range(4):
        shared.add(waiting("many"))
    step(shared)
    assert len(shared.schedule().decode) == 4
    for sequence in shared.running:
        sequence.num_pending, sequence.ids = 0, [*sequence.ids, 7]
    kinds = []
    for _ in range(4):  # one comes in each step
        shared.add(waiting("one"))
        planned = shared.schedule()
        kinds.append((len(planned.decode), [chunk.sequence.client for chunk in planned.prefill]))
        for chunk in planned.chunks:
            chunk.sequence.num_pending, chunk.sequence.ids = 0, [*chunk.sequence.ids, 7]
    assert kinds[0] == (0, ["one"])
    assert kinds[1] == (5, ["one"])  # no client decodes less often than in every second step
    assert [num_decoded > 0 for num_decoded, _ in kinds] == [False, True] * 2


def test_a_newcomer_takes_a_slot_in_the_step_that_frees_it() -> None:
    full = scheduler(4)
    for _ in range(20):
        full.add(waiting("many"))
    step(full)
    full.add(waiting("one"))
    planned = full.schedule()
    assert [chunk.sequence.client for chunk in planned.chunks] == ["one"]
    assert running(full) == {"many": 3, "one": 1}
