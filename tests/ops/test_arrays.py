"""asarray, to_numpy, cast, itemsize, concat, memory_stats: what goes in comes out, and nothing is shared."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from clsa.ops import Ops
from tests.ops.cases import NUMPY_DTYPES, host, rounded
from tests.tolerance import assert_equal

VALUES = np.array([0.0, -1.5, 3.1415927, 65000.0, 1e-3, -np.inf, np.inf], np.float32)


def test_float_round_trip(ops: Ops, dtype: str) -> None:
    x = rounded(VALUES, dtype)
    assert np.array_equal(host(ops, ops.asarray(x), dtype), x.astype(np.float64))
    assert np.array_equal(host(ops, ops.asarray(VALUES, dtype), dtype), x.astype(np.float64))
    assert np.array_equal(host(ops, ops.cast(ops.asarray(VALUES), dtype), dtype), x.astype(np.float64))
    assert ops.itemsize(dtype) == x.itemsize


def test_nan_survives(ops: Ops, dtype: str) -> None:
    assert np.isnan(host(ops, ops.asarray(np.array([np.nan], np.float32), dtype), dtype)).all()


def test_float64_becomes_float32(ops: Ops) -> None:
    assert host(ops, ops.asarray(np.array([0.1])), "float32")[0] == np.float32(0.1)


def test_int32(ops: Ops) -> None:
    x = np.array([[-(2**31), -1, 0], [1, 7, 2**31 - 1]], np.int32)
    out = ops.to_numpy(ops.asarray(x))
    assert out.dtype == np.int32
    assert_equal("asarray", out, x)
    cast = ops.to_numpy(ops.cast(ops.asarray(np.array([2.0, -3.0], np.float32)), "int32"))
    assert cast.dtype == np.int32 and cast.tolist() == [2, -3]


def test_uint32_keeps_its_value(ops: Ops) -> None:
    x = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    assert ops.to_numpy(ops.asarray(x)).astype(np.int64).tolist() == x.tolist()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (63, 65)])
def test_shapes(ops: Ops, dtype: str, shape: tuple[int, ...]) -> None:
    x = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape) % 17
    assert np.array_equal(host(ops, ops.asarray(x, dtype), dtype), x)


@pytest.mark.parametrize("dtype_in", [np.float32, np.int32, np.uint32, ml_dtypes.bfloat16])
def test_read_only_and_strided_inputs_are_taken_without_a_warning(ops: Ops, dtype_in: Any) -> None:
    x: np.ndarray = np.arange(24).reshape(4, 6).astype(dtype_in)[::-1, ::2]
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = ops.to_numpy(ops.asarray(x))
    assert np.array_equal(out.astype(np.float64), x.astype(np.float64))


def test_nothing_is_shared_with_the_host(ops: Ops) -> None:
    x = np.ones(5, np.float32)
    array = ops.asarray(x)
    x[:] = 7
    out = ops.to_numpy(array)
    assert out.tolist() == [1] * 5
    memory = ops.new_memory(64, 1, 2, None, "float32")
    before = ops.to_numpy(memory.k)
    one = ops.asarray(np.ones((1, 1, 2), np.float32))
    ops.evaluate(ops.write_memory(memory, one, one, None, ops.asarray(np.array([3], np.int32))))
    assert not before.any(), "a copy on the host changed when the device wrote"


def test_concat(ops: Ops, dtype: str) -> None:
    parts = [np.full((n, 3), n, np.float32).astype(NUMPY_DTYPES[dtype]) for n in (1, 63, 2)]
    out = host(ops, ops.concat([ops.asarray(part) for part in parts]), dtype)
    assert np.array_equal(out, np.concatenate(parts).astype(np.float64))


def test_memory_stats(ops: Ops) -> None:
    stats = ops.memory_stats()
    assert set(stats) == {"total", "free", "peak"}
    assert all(type(value) is int for value in stats.values())
    assert 0 < stats["free"] <= stats["total"] and 0 <= stats["peak"] <= stats["total"]
