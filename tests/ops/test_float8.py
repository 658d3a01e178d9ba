"""Memories and weights in float8 E4M3: the same bytes on every backend, read as the numbers they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.config import MemoryDtypes
from clsa.errors import BackendError
from clsa.float8 import FLOAT8, MAX_FLOAT8, float8_weight, to_float8
from clsa.ops import Memory, Ops, Selection
from tests.ops.cases import STEPS, Chunk, host, layout, normal, poisoned, rounded
from tests.ops.routing import arrays, assert_form
from tests.tolerance import assert_close, assert_equal

ROWS = 256
BOTH, KV, INDEX = MemoryDtypes("fp8", "fp8"), MemoryDtypes(kv="fp8"), MemoryDtypes(index="fp8")
CODES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def by_the_formula(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def test_what_the_codes_mean() -> None:
    np.testing.assert_array_equal(CODES, [by_the_formula(code) for code in range(256)])
    assert np.nanmax(CODES) == MAX_FLOAT8 and np.nanmin(np.where(CODES > 0, CODES, np.nan)) == 2.0**-9


def hard_numbers(dtype: str) -> np.ndarray:
    """Every code, what lies exactly between two and a little beside that, and what is out of range, in `dtype`."""
    finite = np.unique(CODES[np.isfinite(CODES)]).astype(np.float64)
    ties = (finite[1:] + finite[:-1]) / 2
    beside = np.concatenate([np.nextafter(rounded(ties, dtype), rounded(np.array(x), dtype)) for x in (-1e4, 1e4)])
    odd = [0.0, -0.0, 449, 463.9, 464, 465, 480, 6e4, -6e4, np.inf, -np.inf, np.nan, -np.nan, 2.0**-11, -(2.0**-12)]
    numbers = np.concatenate([CODES, ties, beside.astype(np.float64), odd])
    return rounded(np.pad(numbers, (0, -len(numbers) % 8)), dtype)


def nearest(x: np.ndarray) -> np.ndarray:
    """By search: the nearest of all finite codes, ties to the even mantissa."""
    x, finite = x.astype(np.float64), CODES[:127]
    magnitude = np.minimum(np.nan_to_num(np.abs(x), posinf=np.inf), MAX_FLOAT8)
    distance = np.abs(magnitude[:, None] - finite)
    distance += np.where(np.arange(127) % 2, 1e-12, 0)  # an odd code loses a tie
    return np.where(np.isnan(x), np.nan, np.copysign(finite[distance.argmin(axis=1)], x))


def test_rounding_on_the_host(dtype: str) -> None:
    x = hard_numbers(dtype)
    got = to_float8(x).astype(np.float32)
    np.testing.assert_array_equal(got, nearest(x))
    assert np.array_equal(np.signbit(got[got == 0]), np.signbit(x[got == 0]))


def filled(o: Ops, k: np.ndarray, v: np.ndarray, k_idx: np.ndarray, dtype: str, stored: MemoryDtypes) -> Memory:
    memory = o.new_memory(k.shape[0], k.shape[1], k.shape[2], k_idx.shape[1], dtype, stored)
    slots = o.asarray(np.arange(k.shape[0], dtype=np.int32))
    return o.write_memory(memory, o.asarray(k), o.asarray(v), o.asarray(k_idx), slots)


@pytest.mark.parametrize("stored", [BOTH, KV, INDEX], ids=str)
def test_write_rounds(ops: Ops, dtype: str, stored: MemoryDtypes) -> None:
    """NaN, saturation, subnormals, ties and -0, in the arrays that are E4M3 and only there."""
    x = hard_numbers(dtype).reshape(-1, 1, 8)
    memory = filled(ops, x, x[::-1].copy(), x[:, 0], dtype, stored)
    assert memory.k_idx is not None
    rows = ops.asarray(np.arange(len(x), dtype=np.int32))
    for array, written, is_float8 in (
        (memory.k, x, stored.kv),
        (memory.v, x[::-1], stored.kv),
        (memory.k_idx, x[:, 0], stored.index),
    ):
        got = ops.to_numpy(ops.take(array, rows)).astype(np.float32)
        want = (to_float8(written) if is_float8 else written).astype(np.float32)
        np.testing.assert_array_equal(got, want)
        assert np.array_equal(np.signbit(got[got == 0]), np.signbit(want[want == 0]))


def test_one_byte_a_number(ops: Ops, dtype: str) -> None:
    memory = ops.new_memory(ROWS, 2, 8, 16, dtype, BOTH)
    assert memory.k_idx is not None
    for array in (memory.k, memory.v, memory.k_idx):
        assert array.nbytes == np.prod(array.shape) and not ops.to_numpy(array).any()
    assert ops.itemsize("fp8") == spec.itemsize("fp8") == 1
    assert ops.no_fp8.keys() <= {"weights"}, "memories can be fp8 on all of these"


def test_written_nowhere_and_written_again(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    old = [normal(rng, ROWS, *shape, dtype=dtype) for shape in ((2, 8), (2, 8), (16,))]
    new = [normal(rng, 65, *shape, dtype=dtype) for shape in ((2, 8), (2, 8), (16,))]
    slots = rng.permutation(ROWS)[:65].astype(np.int32)
    slots[::3] = -1
    memory = filled(ops, old[0], old[1], old[2], dtype, BOTH)
    k, v, k_idx, mapping = (ops.asarray(x) for x in (*new, slots))
    memory = ops.write_memory(memory, k, v, k_idx, mapping)
    for array, before, after in zip((memory.k, memory.v, memory.k_idx), old, new):
        want = to_float8(before)
        want[slots[slots >= 0]] = to_float8(after[slots >= 0])
        np.testing.assert_array_equal(ops.to_numpy(array)[:ROWS], want.astype(np.float32))


@pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
def test_attention_reads_the_stored_numbers(ops: Ops, dtype: str, chunks: list[Chunk]) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    q = normal(rng, len(step.positions), 4, 16, dtype=dtype, scale=2.0)
    q[step.positions < 0] = np.nan
    kv = [poisoned(normal(rng, step.num_rows, 2, 16, dtype=dtype), step.readable) for _ in range(2)]
    k_idx = np.zeros((step.num_rows, 8), kv[0].dtype)
    rows = np.full((len(step.positions), 40), -1, np.int32)
    for t, (position, sequence) in enumerate(zip(step.positions, step.sequence)):
        seen = rng.permutation(position + 1)[:40]
        rows[t, : len(seen)] = step.rows_of(sequence, seen)
    results = {}
    for o in (ops, spec):
        memory = filled(o, kv[0], kv[1], k_idx, dtype, KV)
        selection = Selection(*(o.asarray(x) for x in (rows, rows, (rows >= 0).sum(1).astype(np.int32))))
        results[o.name] = (
            o.gather_attention(o.asarray(q), memory, selection),
            o.dense_attention(o.asarray(q), memory, step.queries(o)),
        )
    for name, got, want in zip(("gather_attention", "dense_attention"), results[ops.name], results["numpy"]):
        assert_close(name, dtype, host(ops, got, dtype), want)


@pytest.mark.parametrize("k, block_size", [(32, 1), (32, 8), (1000, 1)])
@pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
def test_select_reads_the_stored_numbers(ops: Ops, dtype: str, chunks: list[Chunk], k: int, block_size: int) -> None:
    """Products of small integers and E4M3 numbers: every score is exact in float32."""
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    q = rounded(rng.integers(-2, 3, (len(step.positions), 24)), dtype)
    k_idx = poisoned(normal(rng, step.num_rows, 24, dtype=dtype), step.readable)
    kv = rounded(np.zeros((step.num_rows, 1, 2)), dtype)
    got, want = (
        arrays(o, o.select(o.asarray(q), filled(o, kv, kv, k_idx, dtype, INDEX), step.queries(o), k, block_size))
        for o in (ops, spec)
    )
    assert_form(dtype, step, got, k, block_size)
    for name, a, b in zip(("positions", "rows", "lengths"), got, want):
        assert_equal(f"select {name}", a, b, (dtype, k, block_size))


def test_nan_in_a_memory_stays_with_those_who_read_it(ops: Ops) -> None:
    k = np.ones((64, 1, 8), np.float32)
    k[3] = np.nan
    memory = filled(ops, k, k, k[:, 0], "float32", BOTH)
    rows = np.array([[0, 1], [2, 3]], np.int32)
    selection = Selection(*(ops.asarray(x) for x in (rows, rows, np.full(2, 2, np.int32))))
    got = host(ops, ops.gather_attention(ops.asarray(np.ones((2, 1, 8), np.float32)), memory, selection), "float32")
    assert (got[0] == 1).all() and np.isnan(got[1]).all()


def test_state_moves_through_the_host_exactly(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [normal(rng, ROWS, *shape, dtype=dtype) for shape in ((2, 8), (2, 8), (16,))]
    memory = filled(ops, arrays[0], arrays[1], arrays[2], dtype, BOTH)
    rows = ops.asarray(np.arange(ROWS, dtype=np.int32))
    read = [ops.to_numpy(ops.take(x, rows)) for x in (memory.k, memory.v, memory.k_idx)]
    assert all(x.dtype == np.float32 for x in read)
    k, v, k_idx = (ops.asarray(x, dtype) for x in read)
    again = ops.write_memory(ops.new_memory(ROWS, 2, 8, 16, dtype, BOTH), k, v, k_idx, rows)
    for x, array in zip(read, (again.k, again.v, again.k_idx)):
        np.testing.assert_array_equal(ops.to_numpy(array)[:ROWS], x)


# -- weights ---------------------------------------------------------------------------------------------------------


def weight_of(rng: np.random.Generator, rows: int, width: int, dtype: str) -> np.ndarray:
    weight = normal(rng, rows, width, dtype=dtype) * rounded(0.1 * rng.lognormal(0, 1, (rows, 1)), dtype)
    weight[rows // 2] = 0  # a row whose scale divides nothing
    return weight


def skip_without_weights(ops: Ops) -> None:
    if "weights" in ops.no_fp8:
        with pytest.raises(BackendError, match="clsa convert --quantize 8"):
            ops.float8_weight(ops.asarray(np.ones((2, 2), np.float32)))
        pytest.skip(ops.no_fp8["weights"])


def test_weights_are_the_same_bytes_everywhere(ops: Ops, dtype: str) -> None:
    skip_without_weights(ops)
    weight = weight_of(np.random.default_rng(0), 63, 111, dtype)
    got, want = ops.float8_weight(ops.asarray(weight)), float8_weight(weight)
    assert np.array_equal(ops.to_numpy(got.scales), want.scales)
    assert np.array_equal(ops.to_numpy(got.values), want.values.astype(np.float32))
    assert np.abs(want.values.astype(np.float32)).max(1).tolist() == [0.0 if i == 31 else 448.0 for i in range(63)]
    error = np.abs(want.values.astype(np.float64) * want.scales[:, None] - weight.astype(np.float64))
    assert (error <= np.maximum(np.abs(weight.astype(np.float64)) / 16, want.scales[:, None] * 2.0**-10)).all()


@pytest.mark.parametrize("shape", [(1, 64, 111), (63, 65, 1), (65, 111, 63)])
def test_products(ops: Ops, dtype: str, shape: tuple[int, int, int]) -> None:
    """Every function that multiplies takes such weights."""
    skip_without_weights(ops)
    rows, width, out_width = shape
    rng = np.random.default_rng(0)
    x, norm = normal(rng, rows, width, dtype=dtype), normal(rng, width, dtype=dtype)
    host_weights = [weight_of(rng, n, width, dtype) for n in (out_width, out_width)]
    residual = normal(rng, rows, out_width, dtype=dtype)
    results = {}
    for o in (ops, spec):
        a, b = (o.float8_weight(o.asarray(w)) for w in host_weights)
        y, n = o.asarray(x), o.asarray(norm)
        results[o.name] = [
            ("linear", o.linear(y, a)),
            *(("linear", out) for out in o.linears(y, (a, b))),
            *(("norm_linears", out) for out in o.norm_linears(y, n, 1e-6, (a, b))),
            ("float8_swiglu", o.norm_swiglu(y, n, 1e-6, a, b)),
            ("add_linear", o.add_linear(o.asarray(residual), y, a)),
        ]
    for (op, got), (_, want) in zip(results[ops.name], results["numpy"], strict=True):
        name = "quantized" if op == "linear" else op
        assert_close(name, dtype, host(ops, got, dtype), want, shape)
