"""What the next step computes: continuous batching over pages, window slots and snapshots, all of them integers.

The engine calls `schedule()`, runs the plan, and calls `complete(plan, samples)`. It may ask for one more plan before
it completes the last; what an unread sample decides is then corrected one step later. A request holds its pages
and its slot until no plan under way refers to them, so a plan never has to be taken back.

Order of service is priority, then arrival; `_running` is sorted by it. Who needs a page takes a free one, then an
idle one of the prefix cache, and then pre-empts the last in order. The last in order itself just waits. As the first
in order can take from all others, and `add` made sure that it fits alone, somebody always goes on.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence

from clsa.config import MAX_TOKENS, PAGE_SIZE, check_int
from clsa.errors import RequestError
from clsa.request import FinishReason, Request, RequestQueue, State
from clsa.residency import Residency, num_pages
from clsa.step_plan import Draft, StepPlan

PREFILL_SHARE = 4  # one token in so many is kept for prefill when decodes would fill the step
PATIENCE = 8  # steps that too few tokens of prompts wait for more to come, while others decode


class Scheduler:
    """Decides who computes what, with whose memory.

    Args: `num_pages` of the memory; `num_slots` window slots, 0..num_slots-1, one per running request;
    `num_snapshots` window snapshots, the ids after those; `max_tokens_per_step`; `max_model_len` of prompt and
    answer; `window` of the sliding layers, 0 if there are none; `max_waiting` requests in the queue;
    `min_prompt_tokens` of prompts that are worth a step with prompts while others decode (fewer wait for PATIENCE
    steps); `snapshot_every` pages at most between two snapshots of a prompt; `max_cached_pages` of the prefix cache
    (None: no bound but the memory); `eos_token_ids` that end a request.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        num_slots: int,
        num_snapshots: int,
        max_tokens_per_step: int,
        max_model_len: int,
        window: int,
        max_waiting: int,
        min_prompt_tokens: int = 1,
        snapshot_every: int = 16,
        max_cached_pages: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._max_tokens = check_int("max_tokens_per_step", max_tokens_per_step, 1, 1 << 20)
        self._max_model_len = check_int("max_model_len", max_model_len, 1, MAX_TOKENS)
        self._max_waiting = check_int("max_waiting", max_waiting, 1, 1 << 24)
        self._min_prompt_tokens = min(check_int("min_prompt_tokens", min_prompt_tokens, 1, 1 << 20), self._max_tokens)
        self._eos = frozenset(eos_token_ids)
        self._state = Residency(
            pages=check_int("num_pages", num_pages, 1, 1 << 32),
            slots=check_int("num_slots", num_slots, 1, 1 << 20),
            snapshots=check_int("num_snapshots", num_snapshots, 0, 1 << 20),
            max_cached_pages=num_pages if max_cached_pages is None else max_cached_pages,
            sliding=window > 0,
            snapshot_every=check_int("snapshot_every", snapshot_every, 1, MAX_TOKENS),
        )
        self._requests: dict[str, Request] = {}  # not finished
        self._waiting = RequestQueue()
        self._deadlines = RequestQueue()
        self._running: list[Request] = []  # by key; without those that are leaving
        self._leaving = 0
        self._outstanding: deque[StepPlan] = deque()
        self._refused: tuple[Request, int, int] | None = None  # who was not admitted, and with what around
        self._held = 0  # steps since somebody could have been admitted, if only the prompt had been longer
        self._arrivals = self._steps = self._turns = self._preemptions = self._tokens_hit = self._tokens_admitted = 0

    # -- requests ------------------------------------------------------------------------------------------------
    def add(self, request: Request) -> None:
        """Put a request into the queue. Raises RequestError if it can never run or the queue is full."""
        self.check(request)
        if len(self._waiting) >= self._max_waiting:
            raise RequestError(
                f"request {request.id!r} is refused because {self._max_waiting} requests wait already (max_waiting); "
                "try again later"
            )
        self._arrivals += 1
        request.key = (request.priority, self._arrivals)
        eos = frozenset() if request.params.ignore_eos else self._eos
        request.stop_ids = eos.union(request.params.stop_token_ids)
        self._requests[request.id] = request
        self._waiting.push(request.priority, request)
        if request.deadline is not None:
            self._deadlines.push(request.deadline, request)

    def check(self, request: Request) -> None:
        """Raise RequestError, with the sizes, if a request can never run here."""
        limit, memory = self._max_model_len, self._state.pool.num_pages * PAGE_SIZE
        if request.id in self._requests:
            raise RequestError(f"request id {request.id!r} is in use; give each request an id of its own")
        if request.state is not State.WAITING:
            raise RequestError(f"request {request.id!r} has run already; make a new one")
        if not request.tokens:
            raise RequestError(f"request {request.id!r} has an empty prompt; give at least one token")
        sizes = (
            f"request {request.id!r} needs {request.max_total} tokens ({request.num_prompt_tokens} of prompt and "
            f"{request.params.max_tokens} of max_tokens)"
        )
        if request.max_total > limit:
            raise RequestError(f"{sizes}, max_model_len is {limit}; shorten the prompt or lower max_tokens")
        if request.max_total > memory:
            raise RequestError(f"{sizes}, the whole memory holds {memory}; shorten it or enlarge the memory")

    def cancel(self, request_id: str) -> Request | None:
        """End a request in whatever state it is. Returns it, or None if there is none of that id."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "cancelled")
        return request

    def expire(self, now: float) -> list[Request]:
        """End the requests whose deadline is not after `now`, and return them."""
        ended = []
        while (request := self._deadlines.peek()) and request.deadline is not None and request.deadline <= now:
            self.finish(request, "deadline")
            ended.append(request)
        return ended

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request; samples still under way are dropped. Does nothing if it has ended."""
        if self._requests.get(request.id) is not request:
            return
        del self._requests[request.id]
        was_waiting = request.state is State.WAITING
        request.state, request.finish_reason, request.error = State.FINISHED, reason, error
        if request.deadline is not None:
            self._deadlines.forget()
        if was_waiting:
            self._waiting.forget()
        elif not request.leaving:
            self._running.remove(request)
            self._leave(request)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def residency(self) -> Residency:
        """Pages, slots and the prefix cache, for those who move a prefix in or out between two steps."""
        return self._state

    @property
    def has_work(self) -> bool:
        """Whether a request has not finished or a plan has not been completed."""
        return bool(self._requests or self._outstanding)

    def stats(self) -> dict[str, int]:
        """Counts, by name."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            **self._state.stats(),
            "prompt_tokens": self._tokens_admitted,
            "prefix_tokens_hit": self._tokens_hit,
            "preemptions": self._preemptions,
            "steps": self._steps,
        }

    # -- steps ---------------------------------------------------------------------------------------------------
    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute before the outstanding plan is completed."""
        if len(self._outstanding) > 1:
            raise AssertionError("schedule() was called with two plans outstanding; complete the older one first")
        decodes: list[Request] = []
        prefills: list[Request] = []
        for request in self._running:
            if request.num_total < request.max_total:
                one = request.num_total - request.num_computed == 1
                (decodes if one else prefills).append(request)
        draft = Draft(self._turns, self._max_tokens)
        reserve = self._reserve() if prefills or (self._waiting and self._state.free_slots) else 0
        late = self._decode(draft, decodes, reserve)
        before = draft.budget
        draft.closed = not prefills and bool(draft.chunks) and self._waits_for_more()
        self._prefill(draft, prefills)
        if draft.budget == before:  # nobody could use the reserve
            self._decode(draft, late, 0)
        if not draft.chunks:
            return None
        self._steps += 1
        self._turns += len(draft.chunks)
        num_tokens = self._max_tokens - draft.budget
        plan = StepPlan(tuple(draft.chunks), tuple(draft.restores), tuple(draft.snapshots), num_tokens)
        self._outstanding.append(plan)
        return plan

    def complete(self, plan: StepPlan, samples: Sequence[int | Exception] | Exception) -> list[Request]:
        """Take the results of the oldest outstanding plan.

        Args: `samples` one token, or an exception that ends the request, per chunk that wants logits, in order;
        or one exception if the step failed as a whole, which ends all its requests.
        Returns the requests that got a token or ended, in order; samples of requests that had ended are dropped.
        """
        if not self._outstanding or self._outstanding[0] is not plan:
            raise AssertionError("complete() takes the oldest outstanding plan")
        results = _results(plan, samples)
        failed = isinstance(samples, Exception)
        self._outstanding.popleft()
        changed = []
        for request, start, stop, wants_logits, _ in plan.chunks:
            request.in_flight -= 1
            if (wants_logits or failed) and self._accept(request, next(results)):
                changed.append(request)
            if request.leaving:
                if not request.in_flight:
                    self._settle(request)
            elif (stop - start > 1 or not wants_logits) and request.state is State.RUNNING:
                self._state.publish(request, stop, final=False)
        return changed

    def _accept(self, request: Request, result: int | Exception) -> bool:
        if request.state is State.FINISHED:
            request.tainted |= isinstance(result, Exception)
            return False
        if isinstance(result, Exception):
            self.finish(request, "error", str(result))
            return True
        request.tokens.append(result)
        if result in request.stop_ids:
            self.finish(request, "stop")
        elif len(request.tokens) >= request.max_total:
            self.finish(request, "length")
        return True

    def _reserve(self) -> int:
        """Prefill's share of this step in whole tokens, right on average for budgets smaller than the share too."""
        return (self._steps + 1) * self._max_tokens // PREFILL_SHARE - self._steps * self._max_tokens // PREFILL_SHARE

    def _decode(self, draft: Draft, decodes: list[Request], reserve: int) -> list[Request]:
        """One token each, as far as the budget goes; those who have waited longest first if it does not reach.

        Returns those whom it did not reach.
        """
        if len(decodes) > draft.budget - reserve:
            decodes = sorted(decodes, key=_last_turn)
        for i, request in enumerate(decodes):
            if draft.budget <= reserve:
                return decodes[i:]
            if request.leaving or request.state is not State.RUNNING:  # pre-empted in this very step
                continue
            stop = request.num_computed + 1
            if stop > len(request.pages) * PAGE_SIZE:
                if not self._find_pages(request, 1):
                    continue
                self._state.grow(request, stop)
            draft.place(request, stop, None if stop % PAGE_SIZE else self._state.snapshot(request, stop, move=True))
        return []

    def _waits_for_more(self) -> bool:
        """Whether what could be admitted now is too little for a step, and has not waited for long.

        How much that is is estimated from the head of the queue, which is all that is looked at of it.
        """
        head = self._waiting.peek()
        free = len(self._state.free_slots)
        if head is None or not free:
            return False
        self._held += 1
        tokens = head.num_total * min(free, len(self._waiting))
        if self._held > PATIENCE or tokens >= self._min_prompt_tokens:
            self._held = 0
            return False
        return True

    def _prefill(self, draft: Draft, prefills: list[Request]) -> None:
        """Chunks of running prompts and of newly admitted ones, merged in the order of service."""
        rest = iter(prefills)
        running = next(rest, None)
        while draft.budget:
            head = self._waiting.peek() if self._state.free_slots and not draft.closed else None
            if head is not None and (running is None or head.key < running.key):
                if self._admit(draft, head):
                    self._chunk(draft, head)
            elif running is not None:
                if running.state is State.RUNNING and not running.leaving:
                    self._chunk(draft, running)
                running = next(rest, None)
            else:
                break

    def _chunk(self, draft: Draft, request: Request) -> None:
        """As much of a prompt as budget and pages allow."""
        stop = min(request.num_total, request.num_computed + draft.budget)
        missing = num_pages(stop) - len(request.pages)
        if missing > 0:
            stop = min(stop, (len(request.pages) + self._find_pages(request, missing)) * PAGE_SIZE)
            if stop <= request.num_computed:
                return
        stop, due = self._state.cut(request, stop)
        self._state.grow(request, stop)
        draft.place(request, stop, self._state.snapshot(request, stop, move=False) if due else None)

    def _admit(self, draft: Draft, request: Request) -> bool:
        """Let the head of the queue run if pages for its next chunk, and one for each running request, are there.

        One that was pre-empted must find room for all it has to compute again, lest it be thrown out again.
        """
        state = self._state
        around = (request, len(self._running), state.pool.num_available)
        if self._refused == around:
            draft.closed = True
            return False
        hit = state.prefix.match(request.chain)
        goal = request.num_total if request.preemptions else min(request.num_total, hit.num_tokens + draft.budget)
        needed = num_pages(goal) - len(hit.pages) + len(self._running) if self._running else 1
        if needed > state.pool.num_available:
            state.pool.release(hit.pages)
            self._refused = around
            draft.closed = True
            return False
        self._waiting.pop()
        request.state = State.RUNNING
        if (restore := state.enter(request, hit)) is not None:
            draft.restores.append(restore)
        if not request.preemptions:
            request.cached_tokens = hit.num_tokens
            self._tokens_hit += hit.num_tokens
            self._tokens_admitted += request.num_prompt_tokens
        insort(self._running, request, key=_key)
        return True

    def _find_pages(self, request: Request, wanted: int) -> int:
        """How many of `wanted` pages the request may take now; pre-empts only if it would be none."""
        while not self._state.pool.num_available:
            victim = self._running[-1]
            if self._leaving or victim is request:  # pages are on their way, or it is not its turn
                return 0
            self._running.pop()
            self._leave(victim)
        return min(wanted, self._state.pool.num_available)

    def _leave(self, request: Request) -> None:
        """Give everything back, now or as soon as no plan under way refers to it."""
        self._leaving += 1
        request.leaving = True
        if not request.in_flight:
            self._settle(request)

    def _settle(self, request: Request) -> None:
        self._leaving -= 1
        request.leaving = False
        self._state.release(request)
        if request.state is State.RUNNING:  # pre-empted: all its tokens are to be computed again
            self._preemptions += 1
            request.preemptions += 1
            request.state = State.WAITING
            request.num_computed, request.num_total = 0, len(request.tokens)
            self._waiting.push(request.priority, request)


def _key(request: Request) -> tuple[int, int]:
    return request.key


def _last_turn(request: Request) -> int:
    return request.last_turn


def _results(plan: StepPlan, samples: Sequence[int | Exception] | Exception) -> Iterator[int | Exception]:
    """One result per chunk that wants logits; one per chunk if the step failed."""
    if isinstance(samples, Exception):
        return iter([samples] * len(plan.chunks))
    wanted = sum(chunk.wants_logits for chunk in plan.chunks)
    if len(samples) != wanted:
        raise AssertionError(f"the step wanted {wanted} samples, got {len(samples)}")
    return iter(samples)
