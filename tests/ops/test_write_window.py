"""write_window and copy_window: each token at its ring row, whole rings from slot to slot."""

from __future__ import annotations

import numpy as np
import pytest

from clsa.ops import Ops, Window
from tests.ops.cases import filled_window, host, normal

SLOTS = 5


def contents(ops: Ops, window: Window, dtype: str) -> list[np.ndarray]:
    return [host(ops, ring, dtype)[: SLOTS * window.size] for ring in (window.k, window.v)]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_new_window_is_zero(ops: Ops, dtype: str, size: int) -> None:
    window = ops.new_window(SLOTS, size, 2, 8, dtype)
    assert window.size == size and list(window.k.shape)[1:] == list(window.v.shape)[1:] == [2, 8]
    for ring in contents(ops, window, dtype):
        assert len(ring) == SLOTS * size and not ring.any()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_write(ops: Ops, dtype: str, size: int) -> None:
    rng = np.random.default_rng(0)
    rows = SLOTS * size
    old = [normal(rng, rows, 2, 8, dtype=dtype) for _ in range(2)]
    mapping = rng.permutation(rows)[: max(2, rows // 2)].astype(np.int32)
    mapping[::3] = -1
    new = [normal(rng, len(mapping), 2, 8, dtype=dtype) for _ in range(2)]
    want = [x.astype(np.float64) for x in old]
    for whole, part in zip(want, new):
        whole[mapping[mapping >= 0]] = part[mapping >= 0]
        part[mapping < 0] = np.nan
    window = filled_window(ops, old[0], old[1], size, dtype)
    window = ops.write_window(window, ops.asarray(new[0]), ops.asarray(new[1]), ops.asarray(mapping))
    for got, expected in zip(contents(ops, window, dtype), want):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("source, target", [([0], [4]), ([3, 1], [0, 2]), ([2, 2], [1, 3])])
def test_copy(ops: Ops, dtype: str, size: int, source: list[int], target: list[int]) -> None:
    rng = np.random.default_rng(0)
    old = [normal(rng, SLOTS * size, 2, 8, dtype=dtype) for _ in range(2)]
    window = filled_window(ops, old[0], old[1], size, dtype)
    slots = [ops.asarray(np.array(x, np.int32)) for x in (source, target)]
    window = ops.copy_window(window, slots[0], slots[1])
    for got, before in zip(contents(ops, window, dtype), old):
        want = before.astype(np.float64).reshape(SLOTS, size, 2, 8)
        want[target] = want[source]
        assert np.array_equal(got, want.reshape(-1, 2, 8))
