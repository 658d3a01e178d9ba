"""The small fused kernels against the specification: odd sizes, rows that are parts of wider rows, poisoned outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clsa import spec
from clsa_cuda.kernels import fused, linear
from clsa_cuda.kernels.linears import linears
from tests.cuda.conftest import DEVICE
from tests.tolerance import assert_close

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPES = [(1, 1), (3, 63), (2, 64), (5, 111), (2, 2560)]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    if request.param == "bfloat16" and DEVICE == "cpu":
        pytest.skip("bfloat16 in Triton's interpreter")
    return str(request.param)


def array(rng: np.random.Generator, dtype: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(DEVICE, DTYPES[dtype])


def wide(x: torch.Tensor) -> Any:
    return x.double().cpu().numpy()


def part(x: torch.Tensor) -> torch.Tensor:
    """The same values inside wider rows, everything beside them NaN."""
    held = torch.full((x.shape[0], x.shape[1] + 7), torch.nan, dtype=x.dtype, device=x.device)
    held[:, 3:-4] = x
    return held[:, 3:-4]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, weight = array(rng, dtype, *shape), array(rng, dtype, shape[1])
    want = spec.rms_norm(wide(x), wide(weight), 1e-6)
    for given in (x, part(x)):
        assert_close("rms_norm", dtype, wide(fused.rms_norm(given, weight, 1e-6)), want, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(dtype: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, y, weight = array(rng, dtype, *shape), array(rng, dtype, *shape), array(rng, dtype, shape[1])
    total, normed = fused.add_rms_norm(x, part(y), weight, 1e-6)
    assert torch.equal(total, x + y)
    want = spec.rms_norm(wide(total), wide(weight), 1e-6)
    assert_close("rms_norm", dtype, wide(normed), want, shape)


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 64), (5, 80), (20, 128)])
def test_norm_rope(dtype: str, heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(0)
    flat, weight = array(rng, dtype, 5, heads * head_dim), array(rng, dtype, head_dim)
    positions = np.array([0, 1, 17, 999, -1], np.int32)
    want = spec.norm_rope(wide(flat).reshape(5, heads, head_dim), wide(weight), 1e-6, positions, 1e4)
    for given in (flat, part(flat)):
        x = given.reshape(5, heads, head_dim)
        got = fused.norm_rope(x, weight, 1e-6, torch.from_numpy(positions).to(DEVICE), 1e4)
        assert_close("norm_rope", dtype, wide(got)[:4], want[:4], (heads, head_dim))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1025)])
def test_swiglu(dtype: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    gate, up = 4 * array(rng, dtype, *shape), array(rng, dtype, *shape)
    want = spec.swiglu(wide(gate), wide(up))
    for g, u in ((gate, up), (part(gate), part(up))):
        assert_close("swiglu", dtype, wide(fused.swiglu(g, u)), want, shape)


def test_linears_move_the_weights_once_and_change_nothing() -> None:
    rng = np.random.default_rng(0)
    x = array(rng, "float32", 3, 64)
    weights = [array(rng, "float32", rows, 64) for rows in (32, 8, 40)]
    before = [weight.clone() for weight in weights]
    for call in range(3):
        places = [weight.data_ptr() for weight in weights]
        for got, weight in zip(linears(x, weights), before, strict=True):
            assert_close("linear", "float32", wide(got), wide(x) @ wide(weight).T, call)
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
        assert (places == [weight.data_ptr() for weight in weights]) == (call > 0)


@pytest.mark.parametrize(
    "rows, out_size, in_size", [(1, 1, 8), (1, 64, 128), (3, 65, 1000), (17, 130, 260), (64, 33, 2048)]
)
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_linear(rows: int, out_size: int, in_size: int, splits: int) -> None:
    rng = np.random.default_rng(0)
    dtype = "bfloat16" if DEVICE != "cpu" else "float16"
    x, weight = array(rng, dtype, rows, in_size), array(rng, dtype, out_size, in_size)
    for given in (x, part(x)):
        got = linear.linear(given, weight, linear.LinearTiles(64, 128, splits, num_warps=4, num_stages=3))
        assert_close("linear", dtype, wide(got), wide(x) @ wide(weight).T, (rows, out_size, in_size, splits))


def test_linear_of_many_rows_or_float32_is_left_to_torch() -> None:
    rng = np.random.default_rng(0)
    for dtype, rows in (("float32", 3), ("float16", linear.MAX_ROWS + 1)):
        x, weight = array(rng, dtype, rows, 64), array(rng, dtype, 32, 64)
        assert not linear.takes(x, weight)
        assert_close("linear", dtype, wide(linear.linear(x, weight)), wide(x) @ wide(weight).T, dtype)
