"""The rules of the scheduler about prefixes that requests share."""

from __future__ import annotations

from clsa.config import PAGE_SIZE as P
from clsa.request import State
from clsa.step_plan import StepPlan
from tests.engine.scheduling import TOKEN, add, complete, distinct, drain, make, must, request, shape, step


def test_chunks_stop_where_a_snapshot_is_due() -> None:
    scheduler = make(max_tokens_per_step=1024, snapshot_every=4)
    add(scheduler, request("a", 600, 4))
    plans: list[StepPlan] = []
    while not plans or not plans[-1].chunks[-1].wants_logits:
        plans.append(must(scheduler.schedule()))
        complete(scheduler, plans[-1])
    assert [shape(plan)[0][2] for plan in plans] == [256, 512, 576, 600]
    assert [bool(plan.snapshots) for plan in plans] == [True, True, True, False]


def test_a_budget_that_ends_inside_a_page_ends_the_chunk_at_its_beginning() -> None:
    scheduler = make(max_tokens_per_step=250, snapshot_every=4)
    add(scheduler, request("a", 1000, 4))
    assert [step(scheduler)[0][2] for _ in range(4)] == [192, 384, 576, 768]


def test_no_snapshots_no_stops() -> None:
    for sizes in ({"window": 0}, {"num_snapshots": 0}, {"max_cached_pages": 0}):
        scheduler = make(max_tokens_per_step=1024, snapshot_every=4, **sizes)
        add(scheduler, request("a", 600, 4))
        plan = must(scheduler.schedule())
        assert (shape(plan), plan.snapshots) == ([("a", 0, 600)], ())


def test_the_same_prompt_again_computes_its_last_page_only() -> None:
    scheduler = make(num_slots=2)
    add(scheduler, request("a", 200, 4))
    first = must(scheduler.schedule())
    (window, snapshot) = first.snapshots[0]
    assert window < 2 <= snapshot
    complete(scheduler, first)
    drain(scheduler)
    (b,) = add(scheduler, request("b", 200, 4))
    plan = must(scheduler.schedule())
    assert shape(plan) == [("b", 192, 200)]
    assert plan.restores == ((snapshot, b.window_slot),)
    assert b.cached_tokens == 192
    assert scheduler.stats()["prefix_tokens_hit"] == 192


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    scheduler = make()
    (a,) = add(scheduler, request("a", 100, 200))
    drain(scheduler)
    (b,) = add(scheduler, request("b", [*a.tokens, 9, 9], 4))
    step(scheduler)
    assert b.cached_tokens == 256
    assert scheduler.stats()["snapshots_cached"] == 2


def test_other_tenants_find_nothing() -> None:
    scheduler = make()
    add(scheduler, request("a", 200, 4, salt="a"))
    drain(scheduler)
    b, c = add(scheduler, request("b", 200, 4, salt="b"), request("c", 200, 4, salt="a"))
    step(scheduler)
    assert (b.cached_tokens, c.cached_tokens) == (0, 192)


def test_a_shared_beginning_gets_a_snapshot_when_it_is_met_the_second_time() -> None:
    scheduler = make(max_tokens_per_step=1024)
    system = [1] * 2 * P
    starts = []
    for i in range(3):
        add(scheduler, request(f"r{i}", [*system, *[2 + i] * 3 * P], 2))
        starts.append([start for _, start, _ in [step(scheduler)[0], step(scheduler)[0]]])
        drain(scheduler)
    assert starts == [[0, 256], [0, 128], [128, 256]]


def test_one_step_ahead_each_boundary_of_a_prompt_has_a_snapshot_of_its_own() -> None:
    scheduler = make(snapshot_every=1, max_tokens_per_step=P)
    (a,) = add(scheduler, request("a", 4 * P, 2))
    first, second = must(scheduler.schedule()), must(scheduler.schedule())
    slots = [snapshot for plan in (first, second) for _, snapshot in plan.snapshots]
    assert len(set(slots)) == 2
    complete(scheduler, first)
    assert list(a.snapshots) == [2 * P]
    complete(scheduler, second)
    assert scheduler.stats()["snapshots_cached"] == 2


def test_prompts_that_creep_are_published_too() -> None:
    scheduler = make(snapshot_every=1, max_tokens_per_step=1)
    add(scheduler, request("a", 4 * P, 2))
    for _ in range(2 * P):
        step(scheduler)
    assert scheduler.stats()["snapshots_cached"] == 2


def test_what_cannot_be_shared_while_another_runs_is_shared_at_the_end() -> None:
    scheduler = make(max_tokens_per_step=1024)
    stem = [1] * 2 * P
    a, b = add(scheduler, request("a", [*stem, 2], 1000), request("b", [*stem, *[3] * P, 4], 2))
    while b.state is not State.FINISHED:
        step(scheduler)
    (c,) = add(scheduler, request("c", [*stem, *[3] * P, 5], 2))
    step(scheduler)
    assert (a.state, c.cached_tokens) == (State.RUNNING, 3 * P)


def test_a_decoding_request_owns_one_snapshot_and_moves_it() -> None:
    scheduler = make()
    (a,) = add(scheduler, request("a", 10, 400))
    moved: list[tuple[int, int]] = []
    while len(a.tokens) < 300:
        plan = must(scheduler.schedule())
        moved += plan.snapshots
        complete(scheduler, plan)
    assert len(moved) == 4 and len(set(moved)) == 1
    assert list(a.snapshots) == [4 * P]


def test_the_cache_gives_way_to_requests_before_anybody_is_preempted() -> None:
    scheduler = make(num_pages=6)
    add(scheduler, request("a", 5 * P, 2))
    drain(scheduler)
    assert (scheduler.stats()["pages_cached"], scheduler.stats()["pages_free"]) == (5, 1)
    add(scheduler, request("b", distinct(2, 4 * P), 2 * P))
    drain(scheduler)
    stats = scheduler.stats()
    assert (stats["preemptions"], stats["prefix_evictions"] > 0) == (0, True)


def test_a_preempted_request_finds_its_own_pages_again() -> None:
    scheduler = make(num_pages=8)
    a, b = add(scheduler, request("a", P, 6 * P), request("b", distinct(2, 3 * P + 1), 4 * P))
    while len(b.tokens) < 3 * P + 2:
        step(scheduler)
    taken = scheduler._state.pool.allocate(scheduler.stats()["pages_free"])
    while not b.preemptions:
        step(scheduler)
    assert taken is not None and scheduler.stats()["pages_cached"] == 3
    scheduler._state.pool.release(taken)
    scheduler.cancel(a.id)
    step(scheduler)
    assert (b.state, b.num_hit, b.cached_tokens) == (State.RUNNING, 3, 0)


def test_what_an_errored_request_computed_is_not_found() -> None:
    scheduler = make()
    add(scheduler, request("good", 130, 2))
    drain(scheduler)
    add(scheduler, request("bad", [1] * 130 + [2] * 300, 50))
    while scheduler.stats()["prefix_pages"] < 5:
        step(scheduler)
    plan = must(scheduler.schedule())
    while not plan.chunks[0].wants_logits:
        complete(scheduler, plan)
        plan = must(scheduler.schedule())
    scheduler.complete(plan, [ValueError("not finite")])
    again, other = add(scheduler, request("again", [1] * 130 + [2] * 300, 2), request("other", 130, 2))
    step(scheduler)
    step(scheduler)
    assert (again.cached_tokens, other.cached_tokens) == (128, 128)


def test_a_wasted_row_that_went_wrong_is_not_shared() -> None:
    for result, cached in ((TOKEN, 2 * P), (ValueError("not finite"), P)):
        scheduler = make()
        (a,) = add(scheduler, request("a", 2 * P - 1, 8))
        step(scheduler)  # up to the last boundary of the prompt
        first, second = must(scheduler.schedule()), must(scheduler.schedule())
        complete(scheduler, first, 0)
        scheduler.complete(second, [result])
        (b,) = add(scheduler, request("b", [*a.tokens, 9], 2))
        step(scheduler)
        assert b.cached_tokens == cached
