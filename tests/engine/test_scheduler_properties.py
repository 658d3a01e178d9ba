"""Random schedules: arrivals, lengths, cancels, pre-emptions, prefix hits, evictions, errors, one step ahead or not.

The environment variable CLSA_SCHEDULES sets how many (2,000 unless given).
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clsa.config import SamplingParams
from clsa.errors import RequestError
from clsa.request import Request, State
from clsa.scheduler import Scheduler
from clsa.step_plan import StepPlan
from tests.engine.fake_device import PAGED_MODULES, VOCABULARY, FakeDevice, alone, check_ownership

SCHEDULES = int(os.environ.get("CLSA_SCHEDULES", "2000"))
SEEN: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def coverage() -> Iterator[None]:
    """The schedules must have met everything that they are there for."""
    SEEN.clear()
    yield
    if SEEN["schedules"] >= 1000:
        steps = "hits restored preemptions evictions moved packed crowded pending wasted"
        ends = "stop length cancelled error deadline"
        assert not [name for name in f"{steps} {ends}".split() if SEEN[name] < SEEN["schedules"] // 50], SEEN


class Run:
    """One schedule, driven as the engine drives it."""

    def __init__(self, seed: int, num_requests: int, page_size: int) -> None:
        self.random = rng = random.Random(seed)
        self.page_size = page_size
        self.memory = page_size * (num_pages := rng.choice((3, 5, 8, 12, 20)))
        num_slots, budget = rng.choice((1, 3, 4, 6)), rng.choice((1, 2, 3, 5, 8, 16, 40))
        sliding = rng.random() < 0.8
        self.scheduler = Scheduler(
            num_pages=num_pages,
            num_slots=num_slots,
            num_snapshots=rng.choice((0, 1, 3, 6, 12)),
            max_tokens_per_step=budget,
            max_model_len=rng.choice((8 * page_size, 40 * page_size, 40 * page_size)),
            window=8 if sliding else 0,
            max_waiting=rng.choice((2, 100, 100, 100)),
            min_prompt_tokens=rng.choice((1, 1, 1, 2 * page_size, 1 << 20)),
            snapshot_every=rng.choice((1, 2, 4)),
            max_cached_pages=rng.choice((None, None, None, 0, 2, 5)),
            eos_token_ids=(0,) if rng.random() < 0.4 else (),
        )
        self.device = FakeDevice(self.scheduler, page_size, num_slots, budget, sliding)
        self.ahead = rng.choice((0.0, 0.5, 1.0))
        self.trouble = rng.choice((0.0, 0.0, 0.05))
        self.arrival = rng.choice((0.1, 0.3, 0.9))
        self.prompt_pages, self.answer_pages = rng.choice(((3, 4), (3, 4), (5, 1), (0, 10)))
        self.todo = num_requests
        self.requests: list[Request] = []
        self.running: deque[tuple[StepPlan, list[int | Exception], bool]] = deque()
        self.clock = 0

    def go(self) -> None:
        limit = 300 + 40 * self.todo * self.memory
        while self.todo or self.scheduler.has_work:
            self.clock += 1
            assert self.clock < limit, "somebody waits for ever"
            if self.todo and self.random.random() < self.arrival:
                self.add()
            self.disturb()
            launched = self.launch()
            if self.running and (not launched or len(self.running) == 2 or self.random.random() >= self.ahead):
                self.complete()
        self.check_end()

    def add(self) -> None:
        rng = self.random
        self.todo -= 1
        stem = [1] * rng.randint(0, self.prompt_pages * self.page_size)
        if self.requests and rng.random() < 0.5:  # the next turn of a conversation
            stem = list(rng.choice(self.requests).tokens)
        prompt = stem + [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, self.page_size))]
        if rng.random() < 0.9:  # the others may be longer than the memory
            prompt = prompt[: self.memory * 2 // 3]
        request = Request(
            f"r{self.todo}",
            prompt,
            SamplingParams(
                max_tokens=rng.randint(1, self.answer_pages * self.page_size), ignore_eos=rng.random() < 0.5
            ),
            priority=rng.choice((0, 0, 1)),
            salt=rng.choice(("", "", "", "a")),
            deadline=float(self.clock + rng.randint(0, 30)) if rng.random() < 0.1 else None,
        )
        try:
            self.scheduler.add(request)
        except RequestError:
            SEEN["refused"] += 1
        else:
            self.requests.append(request)

    def disturb(self) -> None:
        rng = self.random
        if self.trouble and self.requests and rng.random() < self.trouble:
            request = rng.choice(self.requests)
            if rng.random() < 0.5:
                self.scheduler.cancel(request.id)
            else:
                self.scheduler.finish(request, "stop")
            assert request.state is State.FINISHED
        for request in self.scheduler.expire(float(self.clock)):
            assert request.deadline is not None and request.deadline <= self.clock
        check_ownership(self.scheduler, self.requests, self.page_size)

    def launch(self) -> bool:
        plan = self.scheduler.schedule()
        check_ownership(self.scheduler, self.requests, self.page_size)
        if plan is None:
            assert self.running or not any(r.state is not State.FINISHED for r in self.requests), "nobody goes on"
            return False
        rows = sum(chunk.wants_logits for chunk in plan.chunks)
        broken = frozenset(row for row in range(rows) if self.random.random() < self.trouble / 2)
        failed = self.random.random() < self.trouble / 10 or bool(self.running and self.running[-1][2])
        results = self.device.run(plan, broken, failed)
        self.running.append((plan, results, failed))
        windows = {window for window, _ in plan.snapshots}
        SEEN["restored"] += bool(plan.restores)
        SEEN["moved"] += any(c.wants_logits and c.request.window_slot in windows for c in plan.chunks)
        SEEN["crowded"] += plan.num_tokens == self.device.budget < len(self.scheduler._running)
        SEEN["packed"] += sum(c.stop - c.start > 1 for c in plan.chunks) > 1
        SEEN["pending"] += any(c.pending is not None for c in plan.chunks)
        SEEN["wasted"] += any(c.request.state is State.FINISHED for p, _, _ in self.running for c in p.chunks)
        return True

    def complete(self) -> None:
        plan, results, failed = self.running.popleft()
        if failed:  # what was launched on top of a failed step is lost too
            self.running = deque((later, more, True) for later, more, _ in self.running)
        lengths = {chunk.request: len(chunk.request.tokens) for chunk in plan.chunks}
        live = [chunk.request for chunk in plan.chunks if chunk.request.state is not State.FINISHED]
        changed = self.scheduler.complete(plan, ValueError("the step failed") if failed else results)
        for request in changed:
            assert request in live
            assert len(request.tokens) == lengths[request] + 1 or request.finish_reason == "error"
        assert not failed or all(request.finish_reason == "error" for request in live)
        check_ownership(self.scheduler, self.requests, self.page_size)

    def check_end(self) -> None:
        stats, prefix = self.scheduler.stats(), self.scheduler._state.prefix
        assert not stats["running"] and not stats["waiting"] and stats["slots_free"] == stats["slots_total"]
        assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
        assert stats["snapshots_free"] + stats["snapshots_cached"] == stats["snapshots_total"]
        SEEN.update(schedules=1, hits=bool(stats["prefix_tokens_hit"]), preemptions=bool(stats["preemptions"]))
        SEEN.update(evictions=bool(stats["prefix_evictions"]))
        assert prefix.evict(stats["pages_total"]) == stats["pages_cached"] == stats["prefix_pages"]
        assert self.scheduler._state.pool.num_free == stats["pages_total"]
        assert self.scheduler._state.prefix.stats()["snapshots_free"] == stats["snapshots_total"]
        for request in self.requests:
            reason = str(request.finish_reason)
            SEEN[reason] += 1
            tokens, expected = alone(
                request.tokens[: request.num_prompt_tokens], request.params.max_tokens, request.stop_ids
            )
            assert request.output_tokens == tokens[: len(request.output_tokens)], "company changed the answer"
            if reason == "length" or (reason == "stop" and not self.trouble):
                assert (request.output_tokens, reason) == (tokens, expected)


@settings(
    max_examples=SCHEDULES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
@given(
    seed=st.integers(0, (1 << 32) - 1),
    num_requests=st.integers(3, 16),
    page_size=st.sampled_from((2, 3, 4, 5, 8, 16, 64)),
)
def test_random_schedules(seed: int, num_requests: int, page_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in PAGED_MODULES:
            patch.setattr(module, "PAGE_SIZE", page_size)
        Run(seed, num_requests, page_size).go()
