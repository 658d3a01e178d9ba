"""Quantised weights: linear and embed compute with w = scale * q + bias, whatever a backend keeps of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from clsa import spec
from clsa.config import Quantization
from clsa.ops import Ops, QuantizedWeight
from clsa.quantization import quantize
from tests.ops.cases import host, normal, rounded
from tests.tolerance import assert_close

FORMS = [(bits, group_size) for bits in (4, 8) for group_size in (32, 64, 128)]


def quantized(
    rng: np.random.Generator, rows: int, width: int, dtype: str, bits: int, group_size: int
) -> QuantizedWeight:
    weight = normal(rng, rows, width, dtype=dtype)
    weight[rows // 2] = 0  # a group whose scale divides nothing
    return quantize(weight, Quantization(bits=bits, group_size=group_size))


def by_the_formula(weight: QuantizedWeight) -> np.ndarray:
    """One number after the other, from the words' bits."""
    rows, width = weight.packed.shape[0], weight.scales.shape[1] * weight.group_size
    out = np.empty((rows, width))
    for r in range(rows):
        for i in range(width):
            bit, group = i * weight.bits, i // weight.group_size
            q = (int(weight.packed[r, bit // 32]) >> (bit % 32)) & (2**weight.bits - 1)
            out[r, i] = float(weight.scales[r, group]) * q + float(weight.biases[r, group])
    return out


@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_specification(dtype: str, bits: int, group_size: int) -> None:
    weight = quantized(np.random.default_rng(0), 5, 256, dtype, bits, group_size)
    assert np.array_equal(spec.quantized_weight(weight, dtype), by_the_formula(weight))


@pytest.mark.parametrize("shape", [(1, 128, 1), (1, 256, 111), (63, 128, 10), (65, 384, 64), (7, 2048, 65)])
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_linear(ops: Ops, dtype: str, bits: int, group_size: int, shape: tuple[int, int, int]) -> None:
    rows, width, out_width = shape
    rng = np.random.default_rng(0)
    x = normal(rng, rows, width, dtype=dtype)
    weight = quantized(rng, out_width, width, dtype, bits, group_size)
    want = spec.linear(spec.asarray(x), spec.quantized_weight(weight, dtype))
    got = ops.linear(ops.asarray(x), ops.quantized_weight(weight, dtype))
    assert_close("quantized", dtype, host(ops, got, dtype), want, (bits, group_size, shape))


def test_leading_axes(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 3, 5, 64, dtype=dtype), quantized(rng, 7, 64, dtype, 4, 32)
    want = spec.linear(spec.asarray(x), spec.quantized_weight(weight, dtype))
    got = ops.linear(ops.asarray(x), ops.quantized_weight(weight, dtype))
    assert_close("quantized", dtype, host(ops, got, dtype), want)


@pytest.mark.parametrize("bits", [4, 8])
def test_accumulates_wider_than_the_dtype(ops: Ops, dtype: str, bits: int) -> None:
    """2048 ones between a big cancelling pair: a 16-bit running sum would stop growing at 256 or 2048."""
    x = rounded(np.r_[4096.0, np.ones(2048), -4096.0, np.zeros(126)][None], dtype)
    weight = quantize(rounded(np.ones((2, x.shape[1])), dtype), Quantization(bits=bits, group_size=64))
    assert np.array_equal(by_the_formula(weight), np.ones((2, x.shape[1])))
    got = ops.linear(ops.asarray(x), ops.quantized_weight(weight, dtype))
    assert np.array_equal(host(ops, got, dtype), [[2048.0, 2048.0]])


@pytest.mark.parametrize("num_tokens", [1, 65])
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_embed(ops: Ops, dtype: str, bits: int, group_size: int, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    weight = quantized(rng, 63, 256, dtype, bits, group_size)
    tokens = rng.integers(0, 63, num_tokens).astype(np.int32)
    want = spec.embed(spec.quantized_weight(weight, dtype), tokens)
    got = ops.embed(ops.quantized_weight(weight, dtype), ops.asarray(tokens))
    assert_close("embed", dtype, host(ops, got, dtype), want, (bits, group_size))


def test_token_minus_one_is_harmless(ops: Ops) -> None:
    weight = quantized(np.random.default_rng(0), 5, 64, "float32", 4, 32)
    want = spec.quantized_weight(weight, "float32")[[3, 4]]
    got = ops.embed(ops.quantized_weight(weight, "float32"), ops.asarray(np.array([3, -1, 4], np.int32)))
    out = host(ops, got, "float32")
    assert np.isfinite(out).all()
    assert_close("embed", "float32", out[[0, 2]], want)


def test_scales_take_the_dtype_that_is_asked_for(ops: Ops, dtype: str) -> None:
    """A checkpoint of one dtype, computed in another."""
    rng = np.random.default_rng(0)
    x = normal(rng, 3, 64, dtype=dtype)
    for stored in ("float32", "bfloat16", "float16"):
        weight = quantized(rng, 7, 64, stored, 4, 32)
        assert weight.scales.dtype == (ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
        want = spec.linear(spec.asarray(x), spec.quantized_weight(weight, dtype))
        got = ops.linear(ops.asarray(x), ops.quantized_weight(weight, dtype))
        assert_close("quantized", dtype, host(ops, got, dtype), want, stored)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_kept_is_as_small_as_it_is_stored(ops: Ops, bits: int) -> None:
    weight = quantized(np.random.default_rng(0), 7, 128, "bfloat16", bits, 64)
    made = ops.quantized_weight(weight, "bfloat16")
    assert isinstance(made, QuantizedWeight) == ops.keeps_quantized
    if isinstance(made, QuantizedWeight):
        parts = (made.packed, made.scales, made.biases)
        assert [part.nbytes for part in parts] == [7 * 128 * bits // 8, 7 * 2 * 2, 7 * 2 * 2]
    else:
        assert tuple(made.shape) == (7, 128)


@pytest.mark.mlx
@pytest.mark.parametrize(("bits", "group_size"), FORMS)
def test_the_layout_is_that_of_mlx(dtype: str, bits: int, group_size: int) -> None:
    """Bit for bit what mx.quantize makes, of ordinary and of odd groups, and what mx.dequantize reads."""
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3000, 256)) * rng.lognormal(0, 4, (3000, 1))
    weight[:8] = [[0.0], [3.5], [-1e-9], [1.0], [-1.0], [1e-30], [0.02], [1e-8]] * np.r_[np.ones(128), -np.ones(128)]
    weight[8], weight[9] = np.abs(weight[8]), -np.abs(weight[9])
    weight = rounded(np.clip(weight, -6e4, 6e4), dtype)
    got = quantize(weight, Quantization(bits=bits, group_size=group_size))
    array = mx.array(weight.view(np.uint16)).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(weight)
    with mx.stream(mx.cpu):
        packed, scales, biases = mx.quantize(array, group_size, bits)
        numbers = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)
    assert np.array_equal(got.packed, np.array(packed))
    assert np.array_equal(got.scales.astype(np.float32), np.array(scales.astype(mx.float32)))
    assert np.array_equal(got.biases.astype(np.float32), np.array(biases.astype(mx.float32)))
    assert_close("embed", "float32", np.array(numbers), spec.quantized_weight(got, dtype))
