"""Kernels that others wrote and use on Macs: mlx-lm's, as installed and unmodified, against its plain MLX code.

If the harness misread Metal, right kernels would give wrong results here.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.metal.harness.compile import compiler

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the harness runs on Linux"),
    pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed"),
]


@functools.cache
def load(name: str) -> ModuleType:
    """A private copy of a module of mlx-lm whose kernels run in the harness."""
    from tests.metal.harness.on_cpu import metal_on_cpu

    spec = importlib.util.find_spec(f"mlx_lm.{name}")
    if spec is None or spec.loader is None:
        pytest.skip(f"the installed mlx-lm has no {name}")
    module = importlib.util.module_from_spec(spec)
    with metal_on_cpu():
        spec.loader.exec_module(module)
    return module


def normal(*shape: int, dtype: str = "float32", seed: int = 0, scale: float = 1.0) -> Any:
    import mlx.core as mx

    return (scale * mx.random.normal(shape, key=mx.random.key(seed))).astype(getattr(mx, dtype))


def difference(a: Any, b: Any) -> float:
    import mlx.core as mx

    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("gates", ["scalar", "vector"])
@pytest.mark.parametrize("masked", [False, True])
def test_gated_delta(dtype: str, gates: str, masked: bool) -> None:
    import mlx.core as mx

    module = load("models.gated_delta")
    batch, steps, key_heads, heads, key_dim, dim = 2, 5, 2, 4, 64, 8
    q = normal(batch, steps, key_heads, key_dim, dtype=dtype, scale=0.1)
    k = normal(batch, steps, key_heads, key_dim, dtype=dtype, seed=1, scale=0.1)
    v = normal(batch, steps, heads, dim, dtype=dtype, seed=2)
    shape = (batch, steps, heads) + ((key_dim,) if gates == "vector" else ())
    g = mx.sigmoid(normal(*shape, seed=3)).astype(q.dtype)
    beta = mx.sigmoid(normal(batch, steps, heads, seed=4)).astype(q.dtype)
    state = normal(batch, heads, dim, key_dim, seed=5)
    mask = mx.array(np.arange(batch * steps).reshape(batch, steps) % 3 != 1) if masked else None
    y, new_state = module.gated_delta_kernel(q, k, v, g, beta, state, mask)
    expected_y, expected_state = module.gated_delta_ops(q, k, v, g, beta, state, mask)
    if mask is not None:  # masked steps give zeros in the kernel and something unused in the reference
        expected_y = mx.where(mask[..., None, None], expected_y, 0)
    assert difference(y, expected_y) <= (1e-5 if dtype == "float32" else 1e-2)
    assert difference(new_state, expected_state) <= 1e-5


def test_gated_delta_packed_equals_its_comparator_bit_for_bit() -> None:
    import mlx.core as mx

    module = load("models.gated_delta")
    q, k = normal(1, 6, 2, 128, scale=0.1), normal(1, 6, 2, 128, seed=1, scale=0.1)
    v, state = normal(1, 6, 4, 32, seed=2), normal(1, 4, 32, 128, seed=5)
    g, beta = mx.sigmoid(normal(1, 6, 4, seed=3)), mx.sigmoid(normal(1, 6, 4, seed=4))
    packed = module.gated_delta_kernel(q, k, v, g, beta, state)
    comparator = module.gated_delta_kernel_xtree(q, k, v, g, beta, state)
    for a, b in zip(packed, comparator):
        assert np.array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ssm(dtype: str) -> None:
    module = load("models.ssm")
    batch, heads, dim, groups, state_dim = 2, 4, 8, 2, 64
    x = normal(batch, 1, heads, dim, dtype=dtype)
    a_log, d, dt_bias = normal(heads, seed=1), normal(heads, seed=2), normal(heads, seed=3)
    b, c = (normal(batch, 1, groups, state_dim, dtype=dtype, seed=s, scale=0.2) for s in (4, 5))
    dt, state = normal(batch, 1, heads, dtype=dtype, seed=6), normal(batch, heads, dim, state_dim, seed=7)
    arguments = (x, a_log, b, c, d, dt, dt_bias, state, (0.001, 100.0))
    y, new_state = module.ssm_update_kernel(*arguments)
    expected_y, expected_state = module.ssm_attn(*arguments)
    assert difference(y, expected_y) <= (1e-4 if dtype == "float32" else 0.1)
    assert difference(new_state, expected_state) <= (1e-5 if dtype == "float32" else 0.05)


def test_expert_routing() -> None:
    logits, bias = normal(7, 40), normal(40, seed=1, scale=0.1)
    indices, weights = load("kernels.expert_routing").expert_routing(
        logits, bias, top_k=4, multiplier=1.5, score_eps=1e-6, route_scale=2.0
    )
    scores = 1 / (1 + np.exp(-np.array(logits, np.float64) * 1.5))
    expected = np.argsort(-(scores + np.array(bias)), axis=1, kind="stable")[:, :4]
    picked = np.take_along_axis(scores, expected, axis=1)
    np.testing.assert_array_equal(np.array(indices), expected)
    np.testing.assert_allclose(np.array(weights), 2 * picked / picked.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("dim", [64, 80])
def test_qk_norm_rope(dim: int) -> None:
    import mlx.core as mx

    tokens, heads, kv_heads = 5, 4, 2
    x = normal(1, tokens, 2 * (heads + kv_heads) * dim)
    q, k = load("kernels.qk_norm_rope").qk_norm_rope(
        x, n_heads=heads, n_kv_heads=kv_heads, head_dim=dim, eps=1e-6, query_scale=0.5, rope_base=10000.0, offset=3
    )
    rows = x[..., : (heads + kv_heads) * dim].reshape(1, tokens, heads + kv_heads, dim)
    normed = mx.fast.rms_norm(rows, None, 1e-6) * mx.array([0.5] * heads + [1.0] * kv_heads)[:, None]
    rotated = mx.fast.rope(
        normed.transpose(0, 2, 1, 3), dim, traditional=True, base=10000.0, scale=1.0, offset=3
    ).transpose(0, 2, 1, 3)
    assert difference(mx.concatenate([q, k], axis=2), rotated) <= 1e-5


@pytest.mark.parametrize("dim", [96, 2000])
def test_norm_add_norm(dim: int) -> None:
    """Threadgroup memory and barriers inside a function of the header."""
    import mlx.core as mx
    from mlx import nn

    branch, stream = normal(3, dim), normal(3, dim, seed=1)
    alpha, beta, weight = (normal(dim, seed=s) for s in (2, 3, 4))
    norm = nn.RMSNorm(dim)
    norm.weight = normal(dim, seed=5)
    new_stream, normed = load("kernels.norm_add_norm").norm_add_norm(
        branch, stream, alpha=alpha, beta=beta, post_weight=weight, post_eps=1e-5, next_norm=norm
    )
    expected = alpha * stream + beta * mx.fast.rms_norm(branch * weight, None, 1e-5)
    assert difference(new_stream, expected) <= 1e-4
    assert difference(normed, norm(expected)) <= 1e-4


def test_rms_norm_sigmoid_gate_with_strided_inputs() -> None:
    import mlx.core as mx

    x = normal(2, 5, 3, 64).transpose(0, 2, 1, 3)  # [B, H, L, D], as attention leaves it
    gate = normal(2, 5, 3 * 64 * 2, seed=1)[:, :, ::2]
    out = load("kernels.rms_norm_sigmoid_gate").rms_norm_sigmoid_gate(x, gate, eps=1e-6)
    expected = mx.fast.rms_norm(x, None, 1e-6).transpose(0, 2, 1, 3).reshape(2, 5, -1) * mx.sigmoid(gate)
    assert difference(out, expected) <= 1e-5
