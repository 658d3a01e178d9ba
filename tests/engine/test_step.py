"""Step plans as arrays, the same as packing their chunks one by one; and how they are padded: to few sizes."""

from __future__ import annotations

import random
from dataclasses import fields

import numpy as np

from clsa.batch import SequenceChunk, pack
from clsa.config import PAGE_SIZE, SamplingParams
from clsa.request import Request
from clsa.step import PageTables, bucket, step_inputs
from clsa.step_plan import Chunk, StepPlan

WINDOW = 16


class Running:
    """Requests whose page lists grow, begin anew, and come and go."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.requests: list[Request] = []
        self.made = 0

    def step(self) -> StepPlan:
        rng = self.rng
        for request in list(self.requests):
            if rng.random() < 0.1:
                self.requests.remove(request)
            elif rng.random() < 0.1:  # pre-empted, and back with other pages
                request.pages, request.num_computed = [], 0
        while len(self.requests) < rng.choice((2, 12)) and rng.random() < 0.9:
            tokens = [rng.randrange(1000) for _ in range(rng.choice((3, 70, 700)))]
            self.requests.append(Request(str(self.made), tokens, SamplingParams()))
            self.requests[-1].window_slot = self.made = self.made + 1
        chosen = [request for request in self.requests if rng.random() < 0.8] or self.requests
        return StepPlan(tuple(self.chunk(request) for request in chosen), (), (), 0)

    def chunk(self, request: Request) -> Chunk:
        start, length = request.num_computed, self.rng.choice((1, 1, 5, 100))
        stop = min(start + length, len(request.tokens))
        pending = None
        if start == stop:
            stop, pending = start + 1, self.rng.choice((None, 3))
            request.tokens.append(7)
        ahead = self.rng.choice((0, 0, 2))  # pages beyond those that the chunk needs
        while len(request.pages) * PAGE_SIZE < stop + ahead * PAGE_SIZE:
            request.pages.append(self.rng.randrange(10_000))
        request.num_computed = stop
        return Chunk(request, start, stop, stop == len(request.tokens), pending)


def packed(plan: StepPlan) -> object:
    chunks = [
        SequenceChunk(
            [0] if pending is not None else request.tokens[start:stop],
            start,
            request.pages,
            request.window_slot,
            "last" if wants else "none",
        )
        for request, start, stop, wants, pending in plan.chunks
    ]
    return pack(chunks, WINDOW)


def assert_same(got: object, want: object) -> None:
    if isinstance(want, np.ndarray):
        assert isinstance(got, np.ndarray) and got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    elif hasattr(want, "__dataclass_fields__"):
        for field in fields(want):  # type: ignore[arg-type]
            assert_same(getattr(got, field.name), getattr(want, field.name))
    else:
        assert got == want


def test_buckets_of_rows() -> None:
    sizes = {rows: bucket(rows) for rows in range(1, 4097)}
    assert all(size >= rows and bucket(size) == size for rows, size in sizes.items())
    assert all(size - rows < 0.2 * size for rows, size in sizes.items() if rows > 32)
    assert [sizes[rows] for rows in (1, 3, 32, 33, 64, 358)] == [1, 4, 32, 40, 64, 384]
    assert len(set(sizes.values())) <= 40, "each size is recorded once for every size of page table"


def test_plans_as_arrays() -> None:
    """Whatever happened to the page lists before."""
    for seed in range(6):
        running, tables = Running(seed), PageTables()
        for _ in range(60):
            plan = running.step()
            inputs = step_inputs(plan, WINDOW, tables)
            assert_same(inputs.batch, packed(plan))
            assert tables._known.keys() == {chunk.request.id for chunk in plan.chunks}
            wanted = [chunk for chunk in plan.chunks if chunk.wants_logits]
            positions = [] if inputs.sampling is None else inputs.sampling.positions.tolist()
            assert positions == [chunk.stop for chunk in wanted]
            total, pending = len(inputs.batch.tokens), [chunk.pending for chunk in plan.chunks]
            source = range(total) if inputs.token_source is None else inputs.token_source.tolist()
            firsts = inputs.batch.queries.cu_seqlens
            given = {first: total + row for first, row in zip(firsts, pending, strict=False) if row is not None}
            assert list(source) == [given.get(t, t) for t in range(total)]
        assert len(tables._table) <= 32, "rows of requests that are gone are used again"
