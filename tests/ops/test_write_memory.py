"""write_memory: each token at its row, -1 nowhere, everything else untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clsa.ops import Memory, Ops
from tests.ops.cases import filled_memory, host, normal

ROWS = 128


def contents(ops: Ops, memory: Memory, dtype: str) -> list[np.ndarray]:
    arrays = [memory.k, memory.v] + ([] if memory.k_idx is None else [memory.k_idx])
    return [host(ops, array, dtype)[:ROWS] for array in arrays]


def test_a_new_memory_is_zero_and_large_enough(ops: Ops, dtype: str) -> None:
    memory = ops.new_memory(ROWS, 2, 8, 16, dtype)
    arrays: list[Any] = [memory.k, memory.v, memory.k_idx]
    assert [list(a.shape)[1:] for a in arrays] == [[2, 8], [2, 8], [16]]
    for array in contents(ops, memory, dtype):
        assert len(array) == ROWS and not array.any()
    assert ops.new_memory(ROWS, 2, 8, None, dtype).k_idx is None


@pytest.mark.parametrize("num_tokens", [1, 63, 65])
@pytest.mark.parametrize("with_index", [True, False])
def test_write(ops: Ops, dtype: str, num_tokens: int, with_index: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = [(2, 8), (2, 8)] + [(16,)] * with_index
    old = [normal(rng, ROWS, *shape, dtype=dtype) for shape in shapes]
    new = [normal(rng, num_tokens, *shape, dtype=dtype) for shape in shapes]
    slots = rng.permutation(ROWS)[:num_tokens].astype(np.int32)
    slots[rng.random(num_tokens) < 0.3] = -1
    want = [x.astype(np.float64) for x in old]
    for whole, part in zip(want, new):
        whole[slots[slots >= 0]] = part[slots >= 0]
        part[slots < 0] = np.nan  # what is written nowhere must be seen nowhere
    memory = filled_memory(ops, old[0], old[1], old[2] if with_index else None, dtype)
    k_idx = ops.asarray(new[2]) if with_index else None
    memory = ops.write_memory(memory, ops.asarray(new[0]), ops.asarray(new[1]), k_idx, ops.asarray(slots))
    for got, expected in zip(contents(ops, memory, dtype), want, strict=True):
        assert np.array_equal(got, expected)


def test_all_rows_padded(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    old = [normal(rng, ROWS, *shape, dtype=dtype) for shape in ((1, 4), (1, 4), (3,))]
    memory = filled_memory(ops, old[0], old[1], old[2], dtype)
    nan = [ops.asarray(np.full((5, *x.shape[1:]), np.nan, np.float32), dtype) for x in old]
    memory = ops.write_memory(memory, nan[0], nan[1], nan[2], ops.asarray(np.full(5, -1, np.int32)))
    for got, expected in zip(contents(ops, memory, dtype), old):
        assert np.array_equal(got, expected.astype(np.float64))
