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


@pytest.mark.parametrize(
    ("known", "sampled", "wanted"), [(1, 1, 1), (5, 0, 5), (0, 3, 2), (32, 4096, 32), (33, 7, 300)]
)
def test_take_of_two(ops: Ops, known: int, sampled: int, wanted: int) -> None:
    rng = np.random.default_rng(known)
    both = rng.integers(-1, 2**31 - 1, known + sampled, np.int32)
    source = rng.integers(0, known + sampled, wanted, np.int32)
    source[:2] = [known + sampled - 1, 0][: min(2, wanted)]
    out = ops.to_numpy(ops.take(*map(ops.asarray, (both[:known], source, both[known:]))))
    assert out.dtype == np.int32 and np.array_equal(out, both[source])


def test_take_of_two_kinds_of_rows(ops: Ops, dtype: str) -> None:
    x = normal(np.random.default_rng(0), 7, 3, dtype=dtype)
    rows = np.array([6, 0, 4, 3, 3], np.int32)
    out = host(ops, ops.take(ops.asarray(x[:4]), ops.asarray(rows), ops.asarray(x[4:])), dtype)
    assert np.array_equal(out, x[rows].astype(np.float64))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_take_selection(ops: Ops, rows: list[int]) -> None:
    rng = np.random.default_rng(0)
    fields = [rng.integers(-1, 99, shape).astype(np.int32) for shape in ((5, 7), (5, 7), (5,))]
    index = ops.asarray(np.array(rows, np.int32))
    taken = ops.take_selection(Selection(*(ops.asarray(field) for field in fields)), index)
    for got, field in zip((taken.positions, taken.rows, taken.lengths), fields):
        assert np.array_equal(integers(ops, got), field[rows])
