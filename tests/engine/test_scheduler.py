"""The rules of the scheduler, one by one."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import pytest

from clsa.config import PAGE_SIZE as P
from clsa.errors import RequestError
from clsa.request import Request
from clsa.scheduler import PATIENCE, Scheduler
from tests.engine.scheduling import add, complete, drain, make, must, request, shape, step

# -- admission ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("x", []), "request 'x' has an empty prompt"),
        (request("x", 200, 57), r"'x' needs 257 tokens \(200 of prompt and 57 of max_tokens\), max_model_len is 256"),
        (request("a"), "request id 'a' is in use"),
    ],
)
def test_refused_at_once(bad: Request, message: str) -> None:
    scheduler = make(max_model_len=256)
    add(scheduler, request("a"), request("fits", 200, 56))
    with pytest.raises(RequestError, match=message):
        scheduler.add(bad)
    assert scheduler.stats()["waiting"] == 2


def test_what_the_whole_memory_cannot_hold_is_refused() -> None:
    scheduler = make(num_pages=2)
    add(scheduler, request("fits", 100, 28))
    with pytest.raises(RequestError, match=r"needs 129 tokens .*, the whole memory holds 128"):
        scheduler.add(request("x", 100, 29))


def test_a_full_queue_refuses_and_takes_again_after_a_cancel() -> None:
    scheduler = make(max_waiting=2)
    add(scheduler, request("a"), request("b"))
    with pytest.raises(RequestError, match="2 requests wait already"):
        scheduler.add(request("c"))
    scheduler.cancel("a")
    add(scheduler, request("c"))


def test_an_id_is_free_again_after_the_end_but_a_request_runs_once() -> None:
    scheduler = make()
    (first,) = add(scheduler, request("a", max_tokens=1))
    drain(scheduler)
    with pytest.raises(RequestError, match="has run already"):
        scheduler.add(first)
    add(scheduler, request("a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 1 << 40}, "priority must be between"),
        ({"deadline": math.nan}, "deadline must be a finite number"),
        ({"prompt": [1, 2.5]}, "must be a list of token ids"),
        ({"prompt": [1 << 70]}, "must be a list of token ids"),
    ],
)
def test_values_out_of_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        request("x", **options)


def test_priority_then_arrival() -> None:
    scheduler = make(num_slots=1)
    add(scheduler, request("a", max_tokens=1), request("b", max_tokens=1), request("c", max_tokens=1, priority=-1))
    assert [step(scheduler)[0][0] for _ in range(3)] == ["c", "a", "b"]


def test_an_urgent_prompt_goes_before_the_rest_of_a_running_one() -> None:
    scheduler = make(max_tokens_per_step=P, num_snapshots=0)
    add(scheduler, request("long", 4 * P))
    assert step(scheduler) == [("long", 0, P)]
    add(scheduler, request("urgent", 40, priority=-1))
    assert step(scheduler) == [("urgent", 0, 40), ("long", P, P + 24)]


# -- steps -------------------------------------------------------------------------------------------------------


def test_prompts_are_packed_and_decodes_come_first() -> None:
    scheduler = make(num_snapshots=0)
    add(scheduler, request("a", 100), request("b", 50))
    assert step(scheduler) == [("a", 0, 100), ("b", 0, 50)]
    add(scheduler, request("c", 300))
    plan = must(scheduler.schedule())
    assert shape(plan) == [("a", 100, 101), ("b", 50, 51), ("c", 0, 254)]
    assert plan.num_tokens == 256
    assert [chunk.wants_logits for chunk in plan.chunks] == [True, True, False]
    complete(scheduler, plan)
    assert step(scheduler) == [("a", 101, 102), ("b", 51, 52), ("c", 254, 300)]


def begun(scheduler: Scheduler, steps: int = 2 * PATIENCE) -> int | None:
    """The first of so many steps with a prompt in it, from 0."""
    found = [i for i in range(steps) if any(stop - start > 1 for _, start, stop in step(scheduler))]
    return found[0] if found else None


def test_few_tokens_of_prompts_wait_for_more_while_others_decode() -> None:
    scheduler = make(num_slots=4, num_snapshots=0, min_prompt_tokens=100)
    add(scheduler, request("a", 10, max_tokens=100))
    assert step(scheduler) == [("a", 0, 10)], "nobody decodes"
    add(scheduler, request("b", 49, max_tokens=100))
    assert begun(scheduler) == PATIENCE, "and no longer than that"
    add(scheduler, request("c", 49, max_tokens=100))
    assert begun(scheduler, 3) is None
    add(scheduler, request("d", 49, max_tokens=100))
    assert begun(scheduler) == PATIENCE - 3, "the first has waited for so long"
    add(scheduler, request("e", 100, max_tokens=100), request("f", 100, max_tokens=100))
    assert begun(scheduler) is None, "no slot is free"


def test_enough_tokens_of_prompts_do_not_wait() -> None:
    scheduler = make(num_slots=4, num_snapshots=0, min_prompt_tokens=100)
    add(scheduler, request("a", 10, max_tokens=100))
    step(scheduler)
    add(scheduler, request("b", 60, max_tokens=100))
    assert begun(scheduler, 2) is None
    add(scheduler, request("c", 50, max_tokens=100))
    assert step(scheduler)[1:] == [("b", 0, 60), ("c", 0, 50)]
    add(scheduler, request("long", 500, max_tokens=100))
    assert begun(scheduler) == 0
    scheduler = make(num_snapshots=0, max_tokens_per_step=70, min_prompt_tokens=100)
    add(scheduler, request("a", 10, max_tokens=100))
    step(scheduler)
    add(scheduler, request("b", 70, max_tokens=100))
    assert begun(scheduler) == 0, "a step takes no more"


def test_short_prompts_join_one_that_is_on_its_way() -> None:
    scheduler = make(num_slots=4, num_snapshots=0, max_tokens_per_step=100, min_prompt_tokens=90)
    add(scheduler, request("a", 10, max_tokens=100))
    step(scheduler)
    add(scheduler, request("long", 120, max_tokens=100))
    step(scheduler)
    add(scheduler, request("b", 8, max_tokens=100))
    assert step(scheduler)[1:] == [("long", 99, 120), ("b", 0, 8)]


@pytest.mark.parametrize(("budget", "steps", "share"), [(4, 8, 8), (8, 4, 8), (2, 8, 4), (1, 16, 4), (6, 8, 12)])
def test_prefill_gets_a_quarter_when_decodes_would_fill_the_step(budget: int, steps: int, share: int) -> None:
    scheduler = make(max_tokens_per_step=256, num_slots=9, num_snapshots=0)
    add(scheduler, *(request(f"d{i}", max_tokens=100) for i in range(8)))
    step(scheduler)
    scheduler._max_tokens, scheduler._steps = budget, 0
    add(scheduler, request("p", 500))
    shapes = [step(scheduler) for _ in range(steps)]
    assert sum(stop - start for chunks in shapes for name, start, stop in chunks if name == "p") == share
    assert all(sum(stop - start for _, start, stop in chunks) == budget for chunks in shapes)


def test_decodes_get_the_whole_step_when_no_prefill_can_use_it() -> None:
    scheduler = make(num_slots=8, num_snapshots=0)
    add(scheduler, *(request(f"d{i}", max_tokens=100) for i in range(8)))
    step(scheduler)
    scheduler._max_tokens = 4
    add(scheduler, request("waits", 500))
    assert all(len(step(scheduler)) == 4 for _ in range(8))


def test_more_decodes_than_budget_take_turns() -> None:
    scheduler = make(num_slots=8)
    add(scheduler, *(request(f"d{i}", max_tokens=100) for i in range(8)))
    step(scheduler)
    scheduler._max_tokens = 3
    turns = [name for _ in range(16) for name, _, _ in step(scheduler)]
    assert {turns.count(f"d{i}") for i in range(8)} == {6}
    assert all(len(set(turns[i : i + 8])) == 8 for i in range(0, 48, 8))


def test_admission_takes_pages_for_the_next_chunk_only() -> None:
    scheduler = make(num_snapshots=0)
    add(scheduler, request("a", 1000))
    step(scheduler)
    assert scheduler.stats()["pages_free"] == 64 - 4


def test_a_chunk_is_cut_to_the_pages_that_are_left() -> None:
    scheduler = make(num_pages=6, num_snapshots=0)
    add(scheduler, request("a", 60, 100), request("b", 250, 2))
    assert step(scheduler) == [("a", 0, 60), ("b", 0, 196)]
    assert step(scheduler) == [("a", 60, 61), ("b", 196, 250)]
    scheduler = make(num_pages=4, max_tokens_per_step=P, num_snapshots=0)
    add(scheduler, request("a", 60, 68), request("b", 250, 2))
    assert step(scheduler) == [("a", 0, 60), ("b", 0, 4)]
    scheduler._max_tokens = 256
    assert step(scheduler) == [("a", 60, 61), ("b", 4, 192)]
    assert step(scheduler) == [("a", 61, 62)]


# -- speed -------------------------------------------------------------------------------------------------------


def median_step(waiting: int) -> float:
    """Seconds of schedule() and complete() at 32 decoding requests."""
    scheduler = make(num_pages=32 * 8, num_slots=32, max_tokens_per_step=2048, max_waiting=20_000)
    add(scheduler, *(request(f"r{i}", max_tokens=400) for i in range(32 + waiting)))
    step(scheduler)
    times = []
    for _ in range(300):
        start = time.perf_counter()
        step(scheduler)
        times.append(time.perf_counter() - start)
    assert scheduler.stats()["waiting"] == waiting
    return statistics.median(times)


def test_a_step_does_not_look_at_those_who_wait() -> None:
    alone, crowded = median_step(0), median_step(10_000)
    assert crowded < 3 * alone, f"{alone * 1e6:.0f} us with nobody waiting, {crowded * 1e6:.0f} us with 10,000"
