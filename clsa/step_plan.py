"""One step as the scheduler plans it: whose tokens it computes, and which windows are copied around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from clsa.request import Request
from clsa.residency import Copy


class Chunk(NamedTuple):
    """Tokens start..stop-1 of one request in one step."""

    request: Request
    start: int
    stop: int
    wants_logits: bool  # it reaches the end of the request's tokens: one sample is wanted
    pending: int | None  # its only token is this row of the previous plan's samples, not read back yet


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step. `chunks`: decodes (one token, logits wanted) first, then prefill; no request twice.

    `restores` (snapshot slot, window slot) are copied before the step, `snapshots` (window slot, snapshot slot)
    after it. Plans run in the order in which they were made.
    """

    chunks: tuple[Chunk, ...]
    restores: tuple[Copy, ...]
    snapshots: tuple[Copy, ...]
    num_tokens: int


@dataclass(slots=True)
class Draft:
    """The plan under construction."""

    turn: int  # chunks of all earlier plans
    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    restores: list[Copy] = field(default_factory=list)
    snapshots: list[Copy] = field(default_factory=list)
    num_logits: int = 0
    closed: bool = False  # the head of the queue was not admitted, or shall wait, so nobody is

    def place(self, request: Request, stop: int, snapshot: Copy | None) -> None:
        start = request.num_computed
        wants_logits = stop == request.num_total
        pending = request.last_row if start >= len(request.tokens) else None
        self.chunks.append(Chunk(request, start, stop, wants_logits, pending))
        self.budget -= stop - start
        request.num_computed = stop
        request.in_flight += 1
        request.last_turn = self.turn + len(self.chunks)
        if wants_logits:
            request.num_total += 1
            request.last_row = self.num_logits
            self.num_logits += 1
        if snapshot is not None:
            self.snapshots.append(snapshot)
