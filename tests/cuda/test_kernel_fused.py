"""The small fused kernels against the specification: odd sizes, rows that are parts of wider rows, poisoned outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clsa import spec
from clsa.ops import Float8Weight
from clsa_cuda import plain
from clsa_cuda.kernels import fused, linear
from clsa_cuda.kernels.blocks import linears, norm_linears, norm_swiglu
from clsa_cuda.kernels.float8_product import float8_tiles
from clsa_cuda.kernels.product import MAX_ROWS, ProductTiles, product_tiles
from clsa_cuda.kernels.tiles import Limits
from tests.cuda.conftest import DEVICE
from tests.tolerance import assert_close

FLOAT8 = torch.float8_e4m3fn
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


@pytest.mark.parametrize("num_tokens, size", [(0, 8), (1, 1), (5, 63), (3, 2560)])
def test_embed(dtype: str, num_tokens: int, size: int) -> None:
    weight = array(np.random.default_rng(0), dtype, 7, size)
    tokens = torch.tensor([6, 0, -1, 3, 3], dtype=torch.int32, device=DEVICE)[:num_tokens]
    assert torch.equal(fused.embed(weight, tokens), weight[tokens.clamp(min=0).long()])


@pytest.mark.parametrize(("known", "sampled", "wanted"), [(1, 1, 1), (0, 3, 2), (32, 4096, 32), (33, 7, 300)])
def test_take_tokens(known: int, sampled: int, wanted: int) -> None:
    rng = np.random.default_rng(known)
    both = torch.from_numpy(rng.integers(-1, 2**31 - 1, known + sampled, np.int32)).to(DEVICE)
    source = torch.from_numpy(rng.integers(0, known + sampled, wanted, np.int32)).to(DEVICE)
    assert torch.equal(fused.take_tokens(both[:known], source, both[known:]), both[source.long()])


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, weight = array(rng, dtype, *shape), array(rng, dtype, shape[1])
    want = spec.rms_norm(wide(x), wide(weight), 1e-6)
    for given in (x, part(x)):
        assert_close("rms_norm", dtype, wide(fused.rms_norm(given, weight, 1e-6)), want, shape)


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


def tiles(splits: int, rows: int = 20) -> ProductTiles:
    """Rows of no power of two: the last of a tile's block stay empty."""
    return ProductTiles(rows, 128, splits, num_stages=3)


@pytest.mark.parametrize(
    "rows, out_size, in_size", [(1, 1, 8), (1, 64, 128), (1, 70, 515), (3, 65, 1000), (17, 130, 260), (64, 33, 2048)]
)
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_product(rows: int, out_size: int, in_size: int, splits: int) -> None:
    """Alone, with a norm before it, with a residual or the feed-forward's gate behind it, and all of them."""
    rng = np.random.default_rng(0)
    dtype = "bfloat16" if DEVICE != "cpu" else "float16"
    x, weight = array(rng, dtype, rows, in_size), array(rng, dtype, 2 * out_size, in_size) * in_size**-0.5
    norm, residual = array(rng, dtype, in_size), array(rng, dtype, rows, out_size)
    case = (rows, out_size, in_size, splits)
    plain = wide(x) @ wide(weight[:out_size]).T
    gate, up = spec.norm_linears(wide(x), wide(norm), 1e-6, (wide(weight[:out_size]), wide(weight[out_size:])))
    for given in (x, part(x)):
        got = linear.product(given, weight[:out_size], tiles=tiles(splits))
        assert_close("linear", dtype, wide(got), plain, case)
        got = linear.product(given, weight[:out_size], residual=part(residual), tiles=tiles(splits))
        assert_close("add_linear", dtype, wide(got), plain + wide(residual), case)
        got = linear.product(given, weight, norm=norm, eps=1e-6, tiles=tiles(splits))
        assert_close("norm_linears", dtype, wide(got), np.concatenate([gate, up], axis=1), case)
        got = linear.product(given, weight, norm=norm, eps=1e-6, swiglu=True, tiles=tiles(splits))
        assert_close("norm_swiglu", dtype, wide(got), spec.swiglu(gate, up), case)


def sixteen_bits() -> str:
    return "bfloat16" if DEVICE != "cpu" else "float16"


@pytest.mark.parametrize(
    "rows, splits, block_k, in_size", [(1, 1, 128, 512), (5, 2, 64, 516), (33, 3, 256, 516), (3, 3, 128, 256)]
)
def test_products_of_float8_weights(rows: int, splits: int, block_k: int, in_size: int) -> None:
    """A value times the scale of its output is what is multiplied; close to the specification's rounding of both."""
    rng = np.random.default_rng(0)
    dtype, out_size = sixteen_bits(), 90
    x, norm, residual = (array(rng, dtype, *shape) for shape in ((rows, in_size), (in_size,), (rows, out_size)))
    weight = plain.float8_weight(array(rng, dtype, out_size, in_size) / 16)
    dense, t = wide(plain.dense(weight, torch.float32)), ProductTiles(20, block_k, splits, num_stages=3)
    want = spec.norm_linears(wide(x), wide(norm), 1e-6, [dense])[0]
    for given in (x, part(x)):
        got = linear.product(given, weight, norm=norm, eps=1e-6, tiles=t)
        assert_close("norm_linears", dtype, wide(got), want, rows)
        got = linear.product(given, weight, residual=part(residual), tiles=t)
        assert_close("add_linear", dtype, wide(got), wide(x) @ dense.T + wide(residual), rows)
        got = linear.product(given, weight, norm=norm, eps=1e-6, swiglu=True, tiles=t)
        assert_close("norm_swiglu", dtype, wide(got), spec.swiglu(want[:, :45], want[:, 45:]), rows)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.cuda)])
def test_every_float8_number_is_multiplied_exactly(dtype: str) -> None:
    """By rows of x that have one 1 each, in every place of a word: subnormals, both zeros, all but NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    numbers = torch.stack([codes.roll(shift) for shift in range(4)]).reshape(-1, 16)  # [64, 16]
    weight = Float8Weight(numbers.view(FLOAT8).to(DEVICE), torch.full((64,), 0.5, device=DEVICE))
    x = torch.eye(16, dtype=DTYPES[dtype], device=DEVICE)
    np.testing.assert_array_equal(wide(linear.product(x, weight)), wide(numbers.view(FLOAT8).float()).T / 2)


def test_float8_rows_that_are_not_finite() -> None:
    """A row with NaN or infinity among its weights is NaN, whatever it is multiplied with; the others are as ever."""
    rng = np.random.default_rng(0)
    dense = array(rng, "float32", 40, 64)
    dense[3, 7], dense[17, 0] = torch.nan, torch.inf
    got = wide(linear.product(array(rng, sixteen_bits(), 2, 64), plain.float8_weight(dense)))
    assert np.isnan(got[:, [3, 17]]).all() and np.isfinite(np.delete(got, [3, 17], axis=1)).all()


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@pytest.mark.parametrize(
    "out_size, in_size, swiglu", [(3584, 2560, False), (7680, 2560, True), (2560, 7680, False), (10, 16, True)]
)
@pytest.mark.parametrize("weights", ["16 bits", "16 bits behind a norm", "8 bits"])
def test_tiles_fill_their_waves(rows: int, out_size: int, in_size: int, swiglu: bool, weights: str) -> None:
    device = Limits(132, 227 << 10)
    if weights == "8 bits":
        t, itemsize = float8_tiles(rows, out_size, in_size, swiglu, device), 1
    else:
        t, itemsize = product_tiles(rows, out_size, in_size, swiglu, "norm" in weights, device), 2
    waves = -(-t.units(out_size) // device.sm_count)
    assert t.units(out_size) >= 0.9 * waves * device.sm_count or out_size < device.sm_count
    assert t.rows <= t.block_n <= 64
    stage = t.block_k * (itemsize * t.block_n * (2 if swiglu else 1) + 2 * max(16, rows))
    assert t.num_stages >= 2 and t.num_stages * stage <= device.shared_memory


def test_large_rows_in_float16() -> None:
    """What is multiplied is normed before it is rounded: x times the norm's weight would be infinite."""
    rng = np.random.default_rng(0)
    x, norm = 3e4 * array(rng, "float16", 2, 64).sign(), 8 * array(rng, "float16", 64).sign()
    weights = [array(rng, "float16", 8, 64) for _ in range(2)]
    want = spec.norm_linears(wide(x), wide(norm), 1e-6, [wide(weight) for weight in weights])
    got = norm_linears(x, norm, 1e-6, weights)
    assert_close("norm_linears", "float16", wide(got[1]), want[1])
    gated = norm_swiglu(x, norm, 1e-6, weights[0] / 64, weights[1])
    want_gated = spec.norm_swiglu(wide(x), wide(norm), 1e-6, wide(weights[0] / 64), wide(weights[1]))
    assert_close("norm_swiglu", "float16", wide(gated), want_gated)


def test_linear_of_many_rows_or_float32_is_left_to_torch() -> None:
    rng = np.random.default_rng(0)
    for dtype, rows in (("float32", 3), ("float16", MAX_ROWS + 1)):
        x, weight = array(rng, dtype, rows, 64), array(rng, dtype, 32, 64)
        assert not linear.takes(x, weight)
        assert_close("linear", dtype, wide(linear.linear(x, weight)), wide(x) @ wide(weight).T, dtype)
