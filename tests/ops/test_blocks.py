"""What a block does in one op: norm and products, norm and feed-forward, product and residual."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops
from tests.ops.cases import host, normal
from tests.tolerance import assert_close

# Rows, width: one row, a few, more than a kernel for few rows takes; widths of no power of two.
SHAPES = [(1, 64), (5, 111), (3, 2560), (70, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_norm_linears(ops: Ops, dtype: str, shape: tuple[int, int], scale: float) -> None:
    rng = np.random.default_rng(0)
    x, norm = normal(rng, *shape, dtype=dtype, scale=scale), normal(rng, shape[1], dtype=dtype)
    weights = [normal(rng, rows, shape[1], dtype=dtype) for rows in (32, 8, 41)]
    got = ops.norm_linears(ops.asarray(x), ops.asarray(norm), 1e-6, [ops.asarray(w) for w in weights])
    want = spec.norm_linears(spec.asarray(x), spec.asarray(norm), 1e-6, [spec.asarray(w) for w in weights])
    for i in range(3):
        assert_close("norm_linears", dtype, host(ops, got[i], dtype), want[i], (shape, scale, i))


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_linears_in_float32(ops: Ops, dtype: str, shape: tuple[int, int]) -> None:
    """As logits are: whatever x is in, the results are float32, and at most as far off as in x's dtype."""
    rng = np.random.default_rng(0)
    x, norm = normal(rng, *shape, dtype=dtype), normal(rng, shape[1], dtype=dtype)
    weights = [normal(rng, rows, shape[1], dtype=dtype, scale=shape[1] ** -0.5) for rows in (16, 41)]
    given = ops.asarray(x), ops.asarray(norm), 1e-6, [ops.asarray(w) for w in weights]
    got = ops.norm_linears(*given, dtype="float32")
    want = spec.norm_linears(spec.asarray(x), spec.asarray(norm), 1e-6, [spec.asarray(w) for w in weights], "float32")
    for i in range(2):
        assert got[i].dtype == ops.cast(given[0], "float32").dtype
        assert_close("norm_linears", dtype, host(ops, got[i], "float32"), want[i], (shape, i))


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_swiglu(ops: Ops, dtype: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, norm = normal(rng, *shape, dtype=dtype), normal(rng, shape[1], dtype=dtype)
    gate, up = (normal(rng, 75, shape[1], dtype=dtype, scale=shape[1] ** -0.5) for _ in range(2))
    got, want = (
        o.norm_swiglu(o.asarray(x), o.asarray(norm), 1e-6, o.asarray(gate), o.asarray(up)) for o in (ops, spec)
    )
    assert_close("norm_swiglu", dtype, host(ops, got, dtype), want, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_linear(ops: Ops, dtype: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    y, weight = normal(rng, *shape, dtype=dtype), normal(rng, 41, shape[1], dtype=dtype, scale=shape[1] ** -0.5)
    x = normal(rng, shape[0], 41, dtype=dtype, scale=3.0)
    got, want = (o.add_linear(o.asarray(x), o.asarray(y), o.asarray(weight)) for o in (ops, spec))
    assert_close("add_linear", dtype, host(ops, got, dtype), want, shape)


@pytest.mark.parametrize("rows, hidden, attended, inner", [(1, 64, 64, 96), (5, 111, 70, 40), (33, 320, 640, 560)])
def test_close_layer(ops: Ops, dtype: str, rows: int, hidden: int, attended: int, inner: int) -> None:
    rng = np.random.default_rng(0)
    x, o = normal(rng, rows, hidden, dtype=dtype), normal(rng, rows, attended, dtype=dtype)
    shapes = {"o_proj": (hidden, attended), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    w = {name: normal(rng, *shape, dtype=dtype, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
    norm = normal(rng, hidden, dtype=dtype)
    for _ in range(2):  # a backend may prepare the weights in the first call
        got, want = (
            o_.close_layer(
                o_.asarray(x),
                o_.asarray(o),
                norm=o_.asarray(norm),
                eps=1e-6,
                **{name: o_.asarray(weight) for name, weight in w.items()},
            )
            for o_ in (ops, spec)
        )
        assert_close("close_layer", dtype, host(ops, got, dtype), want, (rows, hidden))


def test_a_row_without_numbers_stays_alone(ops: Ops, dtype: str) -> None:
    """A padded row may hold anything; the rows beside it must not notice."""
    rng = np.random.default_rng(0)
    x, norm, weight = (normal(rng, *shape, dtype=dtype) for shape in ((3, 64), (64,), (16, 64)))
    want = host(ops, ops.norm_linears(ops.asarray(x), ops.asarray(norm), 1e-6, [ops.asarray(weight)])[0], dtype)
    x[1] = np.nan
    got = host(ops, ops.norm_linears(ops.asarray(x), ops.asarray(norm), 1e-6, [ops.asarray(weight)])[0], dtype)
    assert np.array_equal(got[[0, 2]], want[[0, 2]])
