"""The rules of the scheduler, one by one."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import pytest

from clsa.config import PAGE_SIZE as P
from clsa.errors import RequestError
from clsa.request import Request, RequestQueue, State
from clsa.scheduler import PATIENCE, Scheduler
from tests.engine.fake_device import check_ownership
from tests.engine.scheduling import TOKEN, add, complete, drain, make, must, request, shape, step

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


# -- how requests end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "token", "reason", "length"),
    [
        ({}, 0, "stop", 1),
        ({"ignore_eos": True}, 0, "length", 16),
        ({"stop_token_ids": (5,)}, 5, "stop", 1),
        ({"stop_token_ids": (5,), "ignore_eos": True}, 5, "stop", 1),
        ({}, TOKEN, "length", 16),
    ],
)
def test_stop_and_length(options: dict[str, Any], token: int, reason: str, length: int) -> None:
    scheduler = make()
    (a,) = add(scheduler, request("a", **options))
    drain(scheduler, token)
    assert (a.finish_reason, a.output_tokens, a.state) == (reason, [token] * length, State.FINISHED)


def test_complete_tells_who_changed() -> None:
    scheduler = make(max_tokens_per_step=64, num_snapshots=0)
    a, b, _ = add(scheduler, request("a"), request("b", max_tokens=1), request("c", 100))
    assert complete(scheduler, must(scheduler.schedule())) == [a, b]


def test_the_engine_may_end_a_request() -> None:
    scheduler = make()
    a, b = add(scheduler, request("a"), request("b"))
    step(scheduler)
    scheduler.finish(a, "stop")
    scheduler.finish(a, "error", "too late")
    assert (a.finish_reason, a.error) == ("stop", None)
    assert step(scheduler) == [("b", 8, 9)]
    check_ownership(scheduler, [a, b])


def test_an_error_ends_its_request_and_no_other() -> None:
    scheduler = make()
    a, b = add(scheduler, request("a"), request("b"))
    assert scheduler.complete(must(scheduler.schedule()), [ValueError("not finite"), TOKEN]) == [a, b]
    assert (a.finish_reason, a.error, a.output_tokens) == ("error", "not finite", [])
    assert step(scheduler) == [("b", 8, 9)]
    check_ownership(scheduler, [a, b])


def test_a_failed_step_ends_all_its_requests_also_those_in_mid_prompt() -> None:
    scheduler = make()
    requests = add(scheduler, request("a"), request("b", 1000), request("later", 1000))
    plan = must(scheduler.schedule())
    assert shape(plan) == [("a", 0, 8), ("b", 0, 248)]
    assert scheduler.complete(plan, MemoryError("out of memory")) == list(requests[:2])
    assert [one.finish_reason for one in requests] == ["error", "error", None]
    check_ownership(scheduler, list(requests))


@pytest.mark.parametrize("outstanding", [0, 1, 2])
@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_cancel_in_every_state(when: str, outstanding: int) -> None:
    scheduler = make(num_slots=1, max_tokens_per_step=64)
    a, b = add(scheduler, request("a", 200), request("b", 200))
    for _ in range({"waiting": 0, "prefill": 1, "decode": 6}[when]):
        step(scheduler)
    computed = a.num_computed
    plans = [must(scheduler.schedule()) for _ in range(outstanding)]
    cancelled = b if when == "waiting" else a
    assert scheduler.cancel(cancelled.id) is cancelled
    assert (cancelled.state, cancelled.finish_reason) == (State.FINISHED, "cancelled")
    check_ownership(scheduler, [a, b])
    for plan in plans:
        assert bool(cancelled.pages) == (cancelled in [chunk.request for chunk in plan.chunks])
        complete(scheduler, plan)
        check_ownership(scheduler, [a, b])
    assert not cancelled.pages
    assert cancelled is b or cancelled.num_computed <= computed + 64 * outstanding
    assert scheduler.cancel(cancelled.id) is None
    drain(scheduler)
    stats = scheduler.stats()
    assert stats["pages_free"] + stats["pages_cached"] == 64 and stats["slots_free"] == 1


def test_deadlines_in_every_state() -> None:
    scheduler = make(num_slots=1)
    a, b, c, d = add(
        scheduler, request("a", deadline=5.0), request("b", deadline=4.0), request("c"), request("d", deadline=9.0)
    )
    step(scheduler)
    assert scheduler.expire(3.9) == []
    assert scheduler.expire(5.0) == [b, a]
    assert (a.finish_reason, b.finish_reason) == ("deadline", "deadline")
    assert scheduler.expire(5.0) == []
    assert step(scheduler) == [("c", 0, 8)]
    scheduler.cancel("d")
    assert scheduler.expire(100.0) == []
    check_ownership(scheduler, [a, b, c, d])


def test_queues_do_not_grow_by_what_has_ended() -> None:
    scheduler = make(num_slots=1)
    add(scheduler, request("first", 1000))
    step(scheduler)
    for i in range(5000):
        add(scheduler, request(f"r{i}", deadline=1e9))
        scheduler.cancel(f"r{i}")
    for queue in (scheduler._waiting, scheduler._deadlines):
        assert len(queue) == 0
        assert len(queue._heap) < 64


def test_queue_order() -> None:
    queue = RequestQueue()
    requests = [request(f"r{i}") for i in range(4)]
    for arrival, (one, rank) in enumerate(zip(requests, (2.0, 1.0, 2.0, 0.0), strict=True)):
        one.key = (0, arrival)
        queue.push(rank, one)
    served = []
    while (head := queue.peek()) is not None:
        served.append(head.id)
        queue.pop()
    assert served == ["r3", "r1", "r0", "r2"]


# -- one step ahead ----------------------------------------------------------------------------------------------


def test_one_step_ahead_names_the_row_of_the_unread_sample() -> None:
    scheduler = make(num_snapshots=0)
    a, b, c = add(scheduler, request("a", 300), request("b", 40), request("c", 40))
    step(scheduler)
    first = must(scheduler.schedule())
    assert shape(first) == [("a", 256, 300), ("b", 0, 40), ("c", 0, 40)]
    assert [chunk.pending for chunk in first.chunks] == [None, None, None]
    scheduler.cancel("b")
    second = must(scheduler.schedule())
    assert shape(second) == [("a", 300, 301), ("c", 40, 41)]
    assert [chunk.pending for chunk in second.chunks] == [0, 2]
    assert scheduler.complete(first, [3, 4, 5]) == [a, c]
    assert (a.output_tokens, b.output_tokens, c.output_tokens) == ([3], [], [5])
    third = must(scheduler.schedule())
    assert [chunk.pending for chunk in third.chunks] == [0, 1]
    complete(scheduler, second)
    complete(scheduler, third)
    assert [chunk.pending for chunk in must(scheduler.schedule()).chunks] == [None, None]


def test_a_stop_found_late_wastes_one_row_and_frees_when_that_is_done() -> None:
    scheduler = make()
    a, b = add(scheduler, request("a"), request("b"))
    first, second = must(scheduler.schedule()), must(scheduler.schedule())
    assert scheduler.complete(first, [0, TOKEN]) == [a, b]
    assert (a.state, a.finish_reason) == (State.FINISHED, "stop")
    assert a.pages and a.window_slot >= 0
    third = must(scheduler.schedule())
    assert [chunk.request.id for chunk in third.chunks] == ["b"]
    assert scheduler.complete(second, [3, TOKEN]) == [b]
    assert a.output_tokens == [0]
    check_ownership(scheduler, [a, b])
    assert not a.pages


def test_the_last_token_is_known_to_be_the_last() -> None:
    scheduler = make()
    (a,) = add(scheduler, request("a", max_tokens=2))
    first, second = must(scheduler.schedule()), must(scheduler.schedule())
    complete(scheduler, first)
    assert scheduler.schedule() is None
    complete(scheduler, second)
    assert (a.finish_reason, scheduler.has_work) == ("length", False)


def test_plans_are_completed_in_order_with_the_right_number_of_samples() -> None:
    scheduler = make()
    add(scheduler, request("a"))
    first, second = must(scheduler.schedule()), must(scheduler.schedule())
    with pytest.raises(AssertionError, match="two plans outstanding"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="oldest outstanding plan"):
        complete(scheduler, second)
    with pytest.raises(AssertionError, match="wanted 1 samples, got 0"):
        scheduler.complete(first, [])
    complete(scheduler, first)


# -- pre-emption -------------------------------------------------------------------------------------------------


def test_the_last_in_order_is_preempted_and_keeps_what_it_had_sampled() -> None:
    scheduler = make(num_pages=12, num_snapshots=0)
    _, b, c = add(scheduler, request("a", 63, 400), request("b", 60, 8, priority=1), request("c", 40, 8))
    step(scheduler)
    scheduler._state.pool.allocate(8)  # the memory is small all of a sudden
    assert step(scheduler) == [("a", 63, 64), ("c", 40, 41), ("b", 60, 61)]
    scheduler._state.pool.allocate(1)
    assert step(scheduler) == [("a", 64, 65), ("c", 41, 42)]
    assert (b.preemptions, b.state, b.output_tokens) == (1, State.WAITING, [TOKEN] * 2)
    assert (c.preemptions, scheduler.stats()["preemptions"], b.pages) == (0, 1, [])
    while c.state is State.RUNNING:
        assert [name for name, _, _ in step(scheduler)] == ["a", "c"]
    assert step(scheduler) == [("a", 70, 71)]
    scheduler.cancel("a")
    assert step(scheduler) == [("b", 0, 62)]
    drain(scheduler)
    assert (b.finish_reason, b.output_tokens) == ("length", [TOKEN] * 8)


def test_the_last_in_order_waits_instead_of_preempting_others() -> None:
    scheduler = make(num_pages=3, num_snapshots=0)
    a, b = add(scheduler, request("a", 64, 20), request("b", 63, 100))
    assert step(scheduler) == [("a", 0, 64), ("b", 0, 63)]
    assert step(scheduler) == [("a", 64, 65), ("b", 63, 64)]
    (c,) = add(scheduler, request("c", 8))
    while a.state is State.RUNNING:
        assert [name for name, _, _ in step(scheduler)] == ["a"]
        assert c.state is State.WAITING, "nobody is admitted while somebody has no page"
    assert step(scheduler) == [("b", 64, 65)]
    drain(scheduler)
    assert (b.preemptions, c.finish_reason) == (0, "length")


def test_one_step_ahead_preempts_one_at_a_time_and_keeps_samples_under_way() -> None:
    scheduler = make(num_pages=8, num_snapshots=0)
    requests = add(scheduler, request("a", 63, 60), *(request(f"r{i}", 40, 60) for i in range(3)))
    first, second = must(scheduler.schedule()), must(scheduler.schedule())
    scheduler._state.pool.allocate(4)
    complete(scheduler, first)
    third = must(scheduler.schedule())
    assert [name for name, _, _ in shape(third)] == ["r0", "r1"]
    assert [one.leaving for one in requests] == [False, False, False, True]
    complete(scheduler, second)
    assert [one.preemptions for one in requests] == [0, 0, 0, 1]
    assert (requests[3].output_tokens, requests[3].pages) == ([TOKEN] * 2, [])
    assert [name for name, _, _ in shape(scheduler.schedule())] == ["a", "r0", "r1"]


def test_a_preempted_request_comes_back_only_when_all_of_it_fits() -> None:
    scheduler = make(num_pages=8, num_snapshots=0)
    _, b = add(scheduler, request("a", 2 * P, 6 * P), request("b", 2 * P - 2, 10))
    step(scheduler)
    scheduler._max_tokens = P
    scheduler._state.pool.allocate(4)
    assert step(scheduler) == [("a", 128, 129)]
    assert (b.preemptions, scheduler.stats()["pages_free"]) == (1, 1)
    scheduler._state.pool.release([5])
    step(scheduler)
    assert (b.state, scheduler.stats()["pages_free"]) == (State.WAITING, 2)
    scheduler._state.pool.release([6])
    assert step(scheduler) == [("a", 130, 131), ("b", 0, 63)]


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
