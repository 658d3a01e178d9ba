"""How requests end in the scheduler: by themselves, with an error, called off, or too late."""

from __future__ import annotations

from typing import Any

import pytest

from clsa.request import RequestQueue, State
from tests.engine.fake_device import check_ownership
from tests.engine.scheduling import TOKEN, add, complete, drain, make, must, request, shape, step


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
