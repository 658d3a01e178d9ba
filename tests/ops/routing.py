"""When a selection is right: exactly the best visible positions, with an allowance for scores that tie."""

from __future__ import annotations

import numpy as np

from clsa.ops import Ops, Selection
from tests.ops.cases import Layout, integers
from tests.tolerance import assert_equal

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # positions, rows, lengths


def arrays(ops: Ops, selection: Selection) -> Arrays:
    return integers(ops, selection.positions), integers(ops, selection.rows), integers(ops, selection.lengths)


def assert_form(case: object, step: Layout, got: Arrays, k: int, block_size: int) -> None:
    """What holds whatever the scores are: counts, order, padding, whole blocks, rows of the page table."""
    positions, rows, lengths = got
    num_queries = len(step.positions)
    assert positions.shape == rows.shape == (num_queries, k) and lengths.shape == (num_queries,), case
    for t, last in enumerate(step.positions):
        where, n = f"{case}: query {t} at position {last}", lengths[t]
        chosen = positions[t, :n]
        assert (positions[t, n:] == -1).all() and (rows[t, n:] == -1).all(), f"{where}: not padded with -1"
        assert n == 0 or (chosen[0] >= 0 and (np.diff(chosen) > 0).all()), f"{where}: not ascending: {chosen}"
        assert n == 0 or chosen[-1] <= last, f"{where}: sees the future: {chosen}"
        blocks = np.unique(chosen // block_size)
        assert len(blocks) == min(k // block_size, -(-(last + 1) // block_size)), f"{where}: {len(blocks)} blocks"
        whole = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
        assert_equal("select", chosen, whole[whole <= last], where)
        assert_equal("select rows", rows[t, :n], step.rows_of(step.sequence[t], chosen), where)


def assert_best(where: object, chosen: np.ndarray, scores: np.ndarray, k: int, block_size: int, slack: float) -> None:
    """`chosen` are the best of float64 `scores` [S]; scores within `slack` of each other may be exchanged."""
    num_blocks = -(-len(scores) // block_size)
    padded = np.full(num_blocks * block_size, -np.inf)
    padded[: len(scores)] = scores
    best = padded.reshape(num_blocks, block_size).max(axis=1)
    is_chosen = np.zeros(num_blocks, bool)
    is_chosen[chosen // block_size] = True
    if is_chosen.all():
        return
    worst_chosen, best_left = best[is_chosen].min(), best[~is_chosen].max()
    taken = np.flatnonzero(is_chosen)[best[is_chosen].argmin()]
    left = np.flatnonzero(~is_chosen)[best[~is_chosen].argmax()]
    assert worst_chosen >= best_left - slack, (
        f"{where}: block {left} was left out with score {best_left:.9g}, "
        f"block {taken} was taken with {worst_chosen:.9g}"
    )
