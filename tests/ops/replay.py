"""Ops that record, replay or measure the selections of a run, so that two backends can go through the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from clsa import spec
from clsa.ops import Memory, Ops, Queries, Selection
from tests.ops.cases import integers
from tests.ops.routing import assert_best
from tests.tolerance import assert_equal

# Share of the largest score of a query by which float32 activations may move a score, layers of rounding included.
ROUTING_SLACK = 2e-5


def recording(ops: Ops, record: list[Selection]) -> Any:
    """`ops` that also keep each selection they make."""

    def select(*args: Any) -> Selection:
        record.append(ops.select(*args))
        return record[-1]

    functions = {name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")}
    return SimpleNamespace(**(functions | {"select": select}))


def replaying(ops: Ops, record: Sequence[Selection]) -> Any:
    """The specification, going on with the backend's selections after checking each of them."""
    remaining = iter(record)

    def select(q_idx: Any, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
        own = spec.select(q_idx, memory, queries, k, block_size)
        assert memory.k_idx is not None
        theirs = next(remaining)
        positions, rows, lengths = (integers(ops, x) for x in (theirs.positions, theirs.rows, theirs.lengths))
        differs = (positions != own.positions).any(axis=1)
        assert_equal("lengths", lengths[~differs], own.lengths[~differs])
        for t in np.flatnonzero(differs):
            last, sequence = queries.positions[t], queries.sequence[t]
            keys = memory.k_idx[spec.physical_rows(queries, sequence, np.arange(last + 1))]
            scores = keys @ q_idx[t]
            slack = ROUTING_SLACK * np.linalg.norm(q_idx[t]) * np.linalg.norm(keys, axis=1).max()
            chosen = positions[t, : lengths[t]]
            # Whole blocks, as many as there should be; where two tie, one may be the last, of which less is visible.
            blocks = np.unique(chosen // block_size)
            whole = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
            assert len(blocks) == min(k // block_size, last // block_size + 1)
            assert_equal("chosen", chosen, whole[whole <= last].astype(chosen.dtype))
            assert (positions[t, lengths[t] :] == -1).all()
            assert_best(f"query {t}", chosen, scores, k, block_size, slack)
            assert_equal("rows", rows[t, : lengths[t]], spec.physical_rows(queries, sequence, chosen).astype(np.int32))
        return Selection(positions, rows, lengths)

    return SimpleNamespace(**(vars(spec) | {"select": select}))


def measuring(margins: list[float]) -> Any:
    """The specification, which also notes how far the worst chosen score of each query is from the best one left."""

    def select(q_idx: Any, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
        selection = spec.select(q_idx, memory, queries, k, block_size)
        assert memory.k_idx is not None
        for t, (last, sequence) in enumerate(zip(queries.positions, queries.sequence)):
            keys = memory.k_idx[spec.physical_rows(queries, sequence, np.arange(last + 1))]
            scores = np.full(-(-len(keys) // block_size) * block_size, -np.inf)
            scores[: len(keys)] = keys @ q_idx[t]
            best = np.sort(scores.reshape(-1, block_size).max(axis=1))[::-1]
            if (chosen := k // block_size) < len(best):
                scale = np.linalg.norm(q_idx[t]) * np.linalg.norm(keys, axis=1).max()
                margins.append((best[chosen - 1] - best[chosen]) / scale)
        return selection

    return SimpleNamespace(**(vars(spec) | {"select": select}))


def following(ops: Ops, record: Sequence[Selection]) -> Any:
    """The specification with the backend's selections, unchecked."""
    remaining = iter(record)

    def select(*args: Any) -> Selection:
        theirs = next(remaining)
        return Selection(*(ops.to_numpy(x) for x in (theirs.positions, theirs.rows, theirs.lengths)))

    return SimpleNamespace(**(vars(spec) | {"select": select}))
