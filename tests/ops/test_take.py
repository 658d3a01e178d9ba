"""take and take_selection: rows in any order, also twice."""

from __future__ import annotations

import numpy as np
import pytest

from clsa.ops import Ops, Selection
from tests.ops.cases import host, integers, normal

ROWS = {"all": [0, 1, 2, 3, 4], "last": [4], "none": [], "again": [3, 0, 3]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("shape", [(5,), (5, 63), (5, 3, 4)])
def test_take(ops: Ops, dtype: str, shape: tuple[int, ...], rows: list[int]) -> None:
    x = normal(np.random.default_rng(0), *shape, dtype=dtype)
    out = host(ops, ops.take(ops.asarray(x), ops.asarray(np.array(rows, np.int32))), dtype)
    assert np.array_equal(out, x[rows].astype(np.float64))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_take_selection(ops: Ops, rows: list[int]) -> None:
    rng = np.random.default_rng(0)
    fields = [rng.integers(-1, 99, shape).astype(np.int32) for shape in ((5, 7), (5, 7), (5,))]
    index = ops.asarray(np.array(rows, np.int32))
    taken = ops.take_selection(Selection(*(ops.asarray(field) for field in fields)), index)
    for got, field in zip((taken.positions, taken.rows, taken.lengths), fields):
        assert np.array_equal(integers(ops, got), field[rows])
