"""The check that parity rests on: tied selections may be exchanged, blocks of other visible size too; no others."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Memory, Queries, Selection
from tests.ops.replay import replaying

LAST = 20  # blocks of 16: a full one, and one of which 5 tokens are visible


def select_other_block(score: float, chosen: np.ndarray) -> Selection:
    """The specification would take the first block, whose best score is 1; the backend says it took `chosen`."""
    keys = np.zeros((64, 1))
    keys[3], keys[18] = 1.0, score
    memory = Memory(np.zeros((64, 1, 2)), np.zeros((64, 1, 2)), keys)
    one = np.zeros(1, np.int32)
    queries = Queries(np.array([LAST], np.int32), one, np.zeros((1, 1), np.int32), one, (0, 1), (LAST + 1,))
    row = np.full((1, 16), -1, np.int32)
    row[0, : len(chosen)] = chosen
    theirs = Selection(row, row, np.array([len(chosen)], np.int32))
    result: Selection = replaying(spec, [theirs]).select(np.ones((1, 1)), memory, queries, 16, 16)
    return result


def test_a_tied_partial_block_is_accepted() -> None:
    result = select_other_block(1.0, np.arange(16, 21))
    assert result.lengths.tolist() == [5]


def test_the_block_of_the_specification_is_accepted() -> None:
    assert select_other_block(0.5, np.arange(16)).lengths.tolist() == [16]


@pytest.mark.parametrize("chosen", [np.arange(16, 20), np.arange(15, 20), np.arange(5), np.arange(0)])
def test_parts_of_blocks_are_refused(chosen: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        select_other_block(1.0, chosen)


def test_a_worse_block_is_refused() -> None:
    with pytest.raises(AssertionError, match="was left out"):
        select_other_block(0.999, np.arange(16, 21))
