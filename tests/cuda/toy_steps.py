"""Decode steps of a toy whose results are known: for the recorder, on a GPU or in `FakeCuda`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clsa.batch import SequenceChunk, pack
from clsa.config import PAGE_SIZE, SamplingParams
from clsa.ops import Compute, RestInputs, Rows, Sampled, State, StepInputs
from clsa.sampling import SamplingRow, pack_sampling
from clsa.step import pad_decode
from clsa_cuda.recorder import Recorder
from clsa_cuda.transfer import start_fetch

MODULUS = 100_003
EMPTY = State((), ())
Launch = Callable[[Callable[[], object]], object]


def toy(launch: Launch, device: torch.device) -> Compute:
    """A step whose tokens depend on every token of the step before, and whose inputs are read early and late.

    The rest of a step takes its rows [R] int32 in their place.
    """

    def compute(inputs: StepInputs | RestInputs, previous: Any, state: State) -> tuple[Sampled | None, State]:
        queries = inputs.rows.queries if isinstance(inputs, RestInputs) else inputs.batch.queries
        rows = len(queries.positions)
        first, out = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        halves = torch.zeros(rows, dtype=torch.float32, device=device)

        def begin() -> None:
            if isinstance(inputs, RestInputs):
                torch.mul(inputs.rows.x, 5, out=first)
                return
            assert inputs.token_source is not None
            torch.mul(torch.cat([inputs.batch.tokens, previous])[inputs.token_source.long()], 5, out=first)

        def end() -> None:
            seen = first + 7 * queries.positions + queries.block_table.sum(1).int()
            torch.remainder(seen, MODULUS, out=out)

        for work in (begin, lambda: device.type == "cuda" and torch.cuda._sleep(20_000), end):
            launch(work)
        launch(lambda: torch.mul(out, 0.5, out=halves))
        return Sampled(out, halves, None, None), state

    return compute


def wanted(inputs: StepInputs, previous: np.ndarray | None, rows: np.ndarray | None = None) -> np.ndarray:
    """What `toy` gives; for `rows`, what it gives for the rest of such a step."""
    queries = inputs.batch.queries
    tokens = np.concatenate([inputs.batch.tokens, [] if previous is None else previous]).astype(np.int64)
    seen = 5 * (tokens[inputs.token_source] if rows is None else rows)
    return np.asarray((seen + 7 * queries.positions + queries.block_table.sum(1)) % MODULUS)


def step_inputs(rng: random.Random, rows: int, pages: int, before: int, position: int) -> StepInputs:
    """A decode step; `before` rows were sampled by the step before, and some tokens come from there."""
    tables = [np.array([rng.randrange(1000) for _ in range(pages)], np.int32) for _ in range(rows)]
    start = (pages - 1) * PAGE_SIZE + position % PAGE_SIZE
    chunks = [SequenceChunk([rng.randrange(1000)], start, table, i, "last") for i, table in enumerate(tables)]
    source = [rows + rng.randrange(before) if before and rng.random() < 0.8 else i for i in range(rows)]
    sampling, _ = pack_sampling([SamplingRow(SamplingParams(), start + 1, ()) for _ in range(rows)])
    return pad_decode(StepInputs(pack(chunks, 4), sampling, np.array(source, np.int32), None), 8)


class Run:
    """Steps of changing shapes, one behind the other, each checked when it is read."""

    def __init__(self, recorder: Recorder, launch: Launch, device: torch.device, seed: int) -> None:
        self.recorder, self.launch, self.device = recorder, launch, device
        self.rng = random.Random(seed)
        self.tokens: Tensor | None = None
        self.values: np.ndarray | None = None
        self.open: list[tuple[Callable[[], list[np.ndarray]], np.ndarray]] = []

    def steps(
        self, count: int, shapes: list[tuple[int, int]], ahead: int, foreign: float = 0.0, rests: float = 0.0
    ) -> None:
        for position in range(count):
            if self.rng.random() < foreign:
                self._sample_elsewhere()
            rows, pages = self.rng.choice(shapes)
            before = 0 if self.values is None else len(self.values)
            inputs = step_inputs(self.rng, rows, pages, before, position)
            values = wanted(inputs, self.values)
            step: StepInputs | RestInputs = inputs
            if self.rng.random() < rests:
                numbers, x = self._made_by_a_launch(len(values))
                queries, values = inputs.batch.queries, wanted(inputs, None, numbers)
                assert inputs.sampling is not None
                step = RestInputs(Rows(x, queries, None), inputs.sampling, None)
            sampled, _ = self.recorder(step, self.tokens, EMPTY)
            assert sampled is not None and sampled.logprobs is not None
            self.open.append((start_fetch([sampled.tokens, sampled.logprobs], self.device), values))
            self.tokens, self.values = sampled.tokens, values
            while len(self.open) > ahead:
                self.read()
        while self.open:
            self.read()

    def read(self) -> None:
        wait, values = self.open.pop(0)
        tokens, halves = wait()
        np.testing.assert_array_equal(tokens, values)
        np.testing.assert_array_equal(halves, values / np.float32(2))

    def _sample_elsewhere(self) -> None:
        """A step that is not recorded, as one with a prompt in it."""
        self.values, self.tokens = self._made_by_a_launch(5)

    def _made_by_a_launch(self, count: int) -> tuple[np.ndarray, Tensor]:
        values = np.array([self.rng.randrange(1000) for _ in range(count)], np.int32)
        made = torch.zeros(count, dtype=torch.int32, device=self.device)
        copy = torch.from_numpy(values).to(self.device)
        self.launch(lambda: torch.mul(copy, 1, out=made))
        return values, made
