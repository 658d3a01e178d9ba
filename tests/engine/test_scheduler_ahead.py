"""The scheduler one step ahead of what it knows, and when pages run out."""

from __future__ import annotations

import pytest

from clsa.config import PAGE_SIZE as P
from clsa.request import State
from tests.engine.fake_device import check_ownership
from tests.engine.scheduling import TOKEN, add, complete, drain, make, must, request, shape, step

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
