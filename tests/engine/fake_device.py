"""A device that remembers, for every row and ring, the exact tokens it stands for, and a loop that drives it.

The state of a token is a number that depends on the whole prefix up to it, and so does the next sample. Each chunk is
checked on its way in: what it will read must be the state of its own prefix and of nothing else.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import clsa.prefix
import clsa.residency
import clsa.scheduler
from clsa.config import PAGE_SIZE
from clsa.request import Request, State
from clsa.scheduler import Scheduler
from clsa.step_plan import StepPlan

PAGED_MODULES = (clsa.prefix, clsa.residency, clsa.scheduler)
VOCABULARY = 5  # few tokens, so that prefixes meet


def advance(state: int, token: int) -> int:
    return hash((state, token))


def sample(state: int) -> int:
    return state % VOCABULARY


def alone(prompt: list[int], max_tokens: int, stop_ids: frozenset[int]) -> tuple[list[int], str]:
    """Tokens and finish reason that a request gets when nothing else runs."""
    state = 0
    for token in prompt:
        state = advance(state, token)
    output: list[int] = []
    while True:
        output.append(sample(state))
        state = advance(state, output[-1])
        if output[-1] in stop_ids:
            return output, "stop"
        if len(output) == max_tokens:
            return output, "length"


class FakeDevice:
    """Runs plans in the order in which they come, and checks them."""

    def __init__(self, scheduler: Scheduler, page_size: int, num_slots: int, budget: int, sliding: bool) -> None:
        self.scheduler, self.page_size, self.num_slots, self.budget = scheduler, page_size, num_slots, budget
        self.sliding = sliding
        self.pages: dict[int, list[Any]] = {}
        self.rings: dict[int, Any] = {}
        self.states: dict[Request, list[int]] = {}  # state after 0, 1, ... tokens of each request
        self.residency: dict[Request, tuple[int, int]] = {}  # pre-emptions so far, next position
        self.previous: list[int] = []  # samples of the latest plan
        self.broken: set[Request] = set()  # those whose state is garbage
        self.computed = 0

    def run(
        self, plan: StepPlan, broken_rows: frozenset[int] = frozenset(), failed: bool = False
    ) -> list[int | Exception]:
        """Samples of a plan; a broken row writes garbage and gives an error, a failed step is garbage throughout."""
        self._check_plan(plan)
        for source, target in plan.restores:
            assert source >= self.num_slots > target >= 0
            self.rings[target] = self.rings[source]
        samples: list[int] = []
        results: list[int | Exception] = []
        for chunk in plan.chunks:
            if failed or (chunk.wants_logits and len(samples) in broken_rows):
                self.broken.add(chunk.request)
            broken = chunk.request in self.broken
            states = self._states(chunk.request, chunk.start, chunk.stop, chunk.pending)
            if not broken:
                self._read(chunk.request, chunk.start, states)
            self._write(chunk.request, chunk.start, chunk.stop, states, broken)
            if chunk.wants_logits:
                samples.append(sample(states[chunk.stop]))
                results.append(ValueError("logits are not finite") if broken else samples[-1])
        for source, target in plan.snapshots:
            assert target >= self.num_slots > source >= 0
            self.rings[target] = self.rings[source]
        assert len({target for _, target in plan.snapshots}) == len(plan.snapshots)
        self.previous = samples
        return results

    def _check_plan(self, plan: StepPlan) -> None:
        lengths = [chunk.stop - chunk.start for chunk in plan.chunks]
        assert plan.num_tokens == sum(lengths) <= self.budget
        assert min(lengths) > 0
        assert len({chunk.request for chunk in plan.chunks}) == len(plan.chunks)
        decodes = [length == 1 and chunk.wants_logits for chunk, length in zip(plan.chunks, lengths)]
        prefills = decodes[decodes.index(False) :] if False in decodes else []
        # A prompt of which one token is left may also stand among the prefills, but nothing that decodes already.
        for chunk, decode in zip(plan.chunks[len(decodes) - len(prefills) :], prefills):
            assert not decode or chunk.stop == chunk.request.num_prompt_tokens or chunk.request.preemptions
        stops = {chunk.request.window_slot: chunk.stop for chunk in plan.chunks}
        assert len(stops) == len(plan.chunks) and min(stops) >= 0 and max(stops) < self.num_slots
        for chunk in plan.chunks:
            assert chunk.stop < chunk.request.max_total, "the last token that may be sampled is never an input"
        for window, _ in plan.snapshots:
            assert stops[window] % self.page_size == 0, "snapshots fall on page boundaries"

    def _states(self, request: Request, start: int, stop: int, pending: int | None) -> list[int]:
        states = self.states.setdefault(request, [0])
        tokens = request.tokens
        assert (pending is None) == (stop <= len(tokens)), "a token is pending if and only if the host does not know it"
        for i in range(len(states) - 1, stop):
            states.append(advance(states[-1], self.previous[pending] if i >= len(tokens) else tokens[i]))  # type: ignore[index]
        return states

    def _read(self, request: Request, start: int, states: list[int]) -> None:
        size = self.page_size
        for i, page in enumerate(request.pages[: -(-start // size)]):
            expected = states[i * size + 1 : min((i + 1) * size, start) + 1]
            assert self.pages[page][: len(expected)] == expected, f"page {i} of {request.id} holds something else"
        if start and self.sliding:
            assert self.rings[request.window_slot] == states[start], f"the window of {request.id} is of something else"
        preemptions, position = self.residency.get(request, (-1, 0))
        if preemptions != request.preemptions:
            position = request.num_hit * size
        assert start == position, "positions are computed once, in order"

    def _write(self, request: Request, start: int, stop: int, states: list[int], broken: bool) -> None:
        size, pool = self.page_size, self.scheduler._state.pool
        for i in range(start, stop):
            page = request.pages[i // size]
            assert pool.count(page) == 1, "a page that is written belongs to one request and is not cached"
            self.pages.setdefault(page, [None] * size)[i % size] = None if broken else states[i + 1]
        self.rings[request.window_slot] = None if broken else states[stop]
        self.residency[request] = request.preemptions, stop
        self.computed += stop - start


def check_ownership(scheduler: Scheduler, requests: list[Request], page_size: int = PAGE_SIZE) -> None:
    """Every page and slot has exactly the owners that the counts say; who does not run holds nothing."""
    state, pool, prefix = scheduler._state, scheduler._state.pool, scheduler._state.prefix
    counts = [0] * pool.num_pages
    windows, snapshots = list(state.free_slots), list(prefix._free_snapshots)
    for request in requests:
        if request.state is State.RUNNING or request.leaving:
            windows.append(request.window_slot)
            snapshots += request.snapshots.values()
            assert len(set(request.pages)) == len(request.pages)
            for page in request.pages:
                counts[page] += 1
        else:
            assert not request.pages and not request.snapshots and request.window_slot == -1 and not request.in_flight
    held = list(counts)
    below: Counter[int] = Counter(id(entry.parent) for entry in prefix._entries.values())
    errors = any(request.finish_reason == "error" for request in requests)
    for key, entry in prefix._entries.items():
        assert entry.key == key
        assert pool._cached[entry.page]
        counts[entry.page] += 1
        snapshots += [] if entry.snapshot is None else [entry.snapshot]
        assert (entry.snapshot is not None) == (key in prefix._with_snapshot)
        assert len(entry.tokens) == page_size and entry.children == below[id(entry)]
        assert entry.parent is None or errors or prefix._entries.get(entry.parent.key) is entry.parent, "an orphan"
        assert entry.parent is None or held[entry.parent.page] >= bool(held[entry.page]), "idle above a held page"
    assert counts == pool._counts
    assert sorted(pool._free) == [page for page, count in enumerate(counts) if not count]
    assert pool.num_idle == sum(1 for entry in prefix._entries.values() if not held[entry.page])
    assert len(prefix) <= prefix.max_pages
    assert sorted(windows) == list(range(state.num_slots))
    assert sorted(snapshots) == list(range(state.num_slots, state.num_slots + prefix._num_snapshots))
    assert [request.key for request in scheduler._running] == sorted(request.key for request in scheduler._running)
