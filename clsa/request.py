"""One request as the scheduler sees it, and the queues that hold requests. Integers and lists only."""

from __future__ import annotations

import enum
import heapq
from array import array
from dataclasses import InitVar, dataclass, field
from typing import Literal

from clsa.config import SamplingParams, check_float, check_int, show
from clsa.errors import RequestError
from clsa.prefix import Chain

MAX_SALT = 1024
FinishReason = Literal["stop", "length", "cancelled", "error", "deadline"]


class State(enum.Enum):
    WAITING = "waiting"  # holds nothing
    RUNNING = "running"  # holds pages and a window slot
    FINISHED = "finished"  # holds nothing as soon as no step that is under way refers to it


class Distinct:
    """The distinct values of a list that only grows, in the order in which they appear."""

    def __init__(self, source: list[int]) -> None:
        self._source, self._read = source, 0
        self._known: set[int] = set()
        self._values = array("i")

    def values(self) -> array[int]:
        for value in self._source[self._read :]:
            if value not in self._known:
                self._known.add(value)
                self._values.append(value)
        self._read = len(self._source)
        return self._values


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, how to continue it, and how far it has come.

    Args: `prompt` token ids; `priority` lower first; `salt` the tenant whose prefixes it may share; `deadline` in
    the clock that the caller of `Scheduler.expire` uses. Everything below `deadline` is the scheduler's to write.
    Raises RequestError for a priority, a salt or a deadline out of bounds.
    """

    id: str
    prompt: InitVar[list[int]]
    params: SamplingParams
    priority: int = 0
    salt: str = ""
    deadline: float | None = None

    chain: Chain = field(init=False)  # the tokens, and the keys of their full pages
    tokens: list[int] = field(init=False)  # prompt, then every sampled token that was read back
    num_prompt_tokens: int = field(init=False)
    state: State = field(init=False, default=State.WAITING)
    finish_reason: FinishReason | None = field(init=False, default=None)
    error: str | None = field(init=False, default=None)
    cached_tokens: int = field(init=False, default=0)  # prompt tokens that were not computed
    preemptions: int = field(init=False, default=0)
    key: tuple[int, int] = field(init=False, default=(0, 0))  # priority, arrival: the order of service
    stop_ids: frozenset[int] = field(init=False, default=frozenset())

    num_computed: int = field(init=False, default=0)  # tokens whose state is in memory or in a step under way
    num_total: int = field(init=False)  # tokens known, and samples of steps under way
    max_total: int = field(init=False)  # tokens of prompt and answer at which it ends by length
    pages: list[int] = field(init=False, default_factory=list)
    window_slot: int = field(init=False, default=-1)
    snapshots: dict[int, int] = field(init=False, default_factory=dict)  # tokens -> slot, not yet in the cache
    num_hit: int = field(init=False, default=0)  # pages that came from the cache
    num_published: int = field(init=False, default=0)  # pages that went to the cache
    branch: int = field(init=False, default=0)  # boundary up to which others have had the same tokens
    last_snapshot: int = field(init=False, default=0)  # boundary of the latest snapshot, taken or given up
    in_flight: int = field(init=False, default=0)  # steps under way that refer to it
    leaving: bool = field(init=False, default=False)  # gives everything back when in_flight is 0
    tainted: bool = field(init=False, default=False)  # a step went wrong after the end: nothing may be shared
    last_turn: int = field(init=False, default=0)  # of its latest chunk, among all chunks there have been
    last_row: int = field(init=False, default=0)  # of its latest sample, among the logits of that step
    _distinct: Distinct | None = field(init=False, default=None)

    def __post_init__(self, prompt: list[int]) -> None:
        check_int("priority", self.priority, -(1 << 31), 1 << 31, RequestError)
        if not isinstance(self.salt, str) or len(self.salt) > MAX_SALT:
            raise RequestError(f"salt must be a text of at most {MAX_SALT} characters, got {show(self.salt)}")
        if self.deadline is not None:
            self.deadline = check_float("deadline", self.deadline, -1e18, 1e18, RequestError)
        try:
            self.chain = Chain(array("q", prompt).tolist(), self.salt)
        except (TypeError, OverflowError) as e:
            raise RequestError(f"the prompt of request {self.id!r} must be a list of token ids: {e}") from e
        self.tokens = self.chain.tokens
        self.num_prompt_tokens = self.num_total = len(self.tokens)
        self.max_total = self.num_prompt_tokens + self.params.max_tokens

    @property
    def output_tokens(self) -> list[int]:
        """A copy of the tokens sampled so far, a stop token included."""
        return self.tokens[self.num_prompt_tokens :]

    def distinct_tokens(self) -> array[int]:
        """Each token of prompt and answer once; not to be changed. Costs only what is new since the last call."""
        if self._distinct is None:
            self._distinct = Distinct(self.tokens)
        return self._distinct.values()


class RequestQueue:
    """A heap of requests in which the finished ones vanish by themselves: O(log n) each, no scans."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def push(self, rank: float, request: Request) -> None:
        """Add a request; equal ranks are served in the order of arrival."""
        heapq.heappush(self._heap, (rank, request.key[1], request))

    def peek(self) -> Request | None:
        """The first unfinished request, left in place."""
        while self._heap and self._heap[0][2].state is State.FINISHED:
            heapq.heappop(self._heap)
            self._dead -= 1
        return self._heap[0][2] if self._heap else None

    def pop(self) -> None:
        """Remove the request that `peek` returned."""
        heapq.heappop(self._heap)

    def forget(self) -> None:
        """Note that one request in the queue has finished. The heap never holds more than twice what lives."""
        self._dead += 1
        if self._dead > 16 and 2 * self._dead > len(self._heap):
            self._heap = [item for item in self._heap if item[2].state is not State.FINISHED]
            heapq.heapify(self._heap)
            self._dead = 0
