"""Weights that are read together lie together, and nobody notices."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from clsa.ops import Ops, QuantizedWeight

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def ops() -> Ops:
    from clsa_mlx import backend

    return backend.open("cpu")


def weights(dtype: str, *rows: int, width: int = 64) -> list[Any]:
    mx.random.seed(0)
    return [mx.random.normal((n, width)).astype(getattr(mx, dtype)) for n in rows]


def quantized(weight: Any, bits: int = 4) -> QuantizedWeight:
    packed, scales, biases = mx.quantize(weight, group_size=32, bits=bits)
    return QuantizedWeight(packed, scales, biases, 32, bits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joined_weights_keep_their_values_and_take_no_more_memory(ops: Ops, dtype: str) -> None:
    own = weights(dtype, 1 << 14, 1 << 12, width=256)
    before = [ops.to_numpy(w) for w in own]
    x = mx.random.normal((3, 256)).astype(own[0].dtype)
    active = mx.get_active_memory()
    got = ops.linears(x, own)
    mx.eval(got)
    assert mx.get_active_memory() - active < own[0].nbytes / 4
    for out, weight, kept in zip(got, own, before, strict=True):
        assert np.array_equal(ops.to_numpy(weight), kept)
        np.testing.assert_allclose(ops.to_numpy(out), ops.to_numpy(x) @ kept.T, rtol=0.02, atol=0.5)
    again = ops.linears(x, own)
    assert all(np.array_equal(ops.to_numpy(a), ops.to_numpy(b)) for a, b in zip(got, again, strict=True))


def test_quantized_weights_are_joined_too(ops: Ops) -> None:
    own = [quantized(w) for w in weights("float32", 32, 8, 41)]
    x = mx.random.normal((2, 64))
    want = [ops.to_numpy(ops.linear(x, w)) for w in own]
    for got, expected in zip(ops.linears(x, own), want, strict=True):
        np.testing.assert_allclose(ops.to_numpy(got), expected, rtol=1e-6, atol=1e-6)


def test_weights_of_different_kinds_are_not_joined(ops: Ops) -> None:
    dense, *rest = weights("float32", 32, 8, 16)
    own = [dense, quantized(rest[0], 4), quantized(rest[1], 8)]
    x = mx.random.normal((2, 64))
    for got, weight in zip(ops.linears(x, own), own, strict=True):
        assert np.array_equal(ops.to_numpy(got), ops.to_numpy(ops.linear(x, weight)))


def test_a_joint_goes_with_its_weights(ops: Ops) -> None:
    from clsa_mlx import linears

    own = weights("bfloat16", 32, 8)
    gc.collect()  # models of other tests
    known = len(linears._joints)
    mx.eval(ops.linears(mx.zeros((1, 64), mx.bfloat16), own))
    assert len(linears._joints) == known + 1
    del own[0]
    gc.collect()
    assert len(linears._joints) == known


@pytest.mark.parametrize("bits", [None, 4])
def test_long_products_run_in_pieces(ops: Ops, bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command buffer of a GPU may take so long that macOS ends it."""
    from clsa_mlx import linears

    (weight,) = weights("float32", 48)
    weight = weight if bits is None else quantized(weight, bits)
    x = mx.random.normal((10, 64))
    want = ops.to_numpy(ops.linear(x, weight))
    rows: list[int] = []
    product = linears._product

    def watched(x: Any, weight: Any) -> Any:
        rows.append(x.shape[0])
        return product(x, weight)

    monkeypatch.setattr(linears, "_product", watched)
    monkeypatch.setattr(linears, "PIECE_FLOPS", 4 * 2 * 48 * 64)
    monkeypatch.setattr(linears, "on_gpu", lambda: True)
    np.testing.assert_allclose(ops.to_numpy(ops.linear(x, weight)), want, rtol=1e-5, atol=1e-5)
    assert rows == [4, 4, 2]
    assert ops.linear(x.reshape(2, 5, 64), weight).shape == (2, 5, 48)


def test_the_default_chunk_of_the_4b_model_is_one_piece() -> None:
    from clsa.bench.sizes import plan_config
    from clsa_mlx.linears import PIECE_FLOPS
    from clsa_mlx.ops import step_size

    c = plan_config("4b", "clsa", 1024)
    assert 2 * step_size.max_tokens_per_step * 2 * c.intermediate_size * c.hidden_size <= PIECE_FLOPS
