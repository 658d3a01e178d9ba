"""The kernel of attend_window against the specification: norms, positions, the ring, the token's own key and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.ops import HeadNorms, Ops
from tests.metal.kernels import SPEC, calls_of, check_soundness, mlx_ops, run_everywhere
from tests.metal.test_gather_attention import DTYPES, SHAPES
from tests.ops.cases import Chunk, Layout, filled_window, host, layout, normal
from tests.tolerance import assert_close

pytestmark = pytest.mark.mlx


def step_around(window: int) -> list[Chunk]:
    """One token each: before, at and after the ring is full and full again, and a padded row."""
    positions = {p for p in (0, 1, window - 2, window - 1, window, window + 1, 2 * window, 1000) if p >= 0}
    return [Chunk(p, 1) for p in sorted(positions)] + [Chunk(0, 0, padded=1)]


def tokens_and_ring(
    rng: np.random.Generator, step: Layout, window: int, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """q, k, v of the step, and a ring with NaN in every row that no token of the sequence has been written to."""
    tokens = [
        normal(rng, len(step.positions), n, head_dim, dtype=dtype, scale=scale)
        for n, scale in ((heads, 2.0), (kv_heads, 1.0), (kv_heads, 1.0))
    ]
    rings = [normal(rng, step.num_slots * window, kv_heads, head_dim, dtype=dtype) for _ in "kv"]
    written = np.zeros(step.num_slots * window, bool)
    for slot, position in zip(step.window_slots, step.positions):
        past = np.arange(max(0, position - window + 1), max(0, position))
        written[slot * window + past % window] = True
    for ring in rings:
        ring[~written] = np.nan
    for x in tokens:
        x[step.positions < 0] = np.nan
    return tokens, rings


def joined(ops: Ops, tokens: list[np.ndarray]) -> list[Any]:
    """q, k and v as views of one array, as a joined projection gives them: their tokens are further apart."""
    import mlx.core as mx

    together = mx.concatenate([ops.asarray(x).reshape(len(x), -1) for x in tokens], axis=1)
    mx.eval(together)
    ends = np.cumsum([0] + [x[0].size for x in tokens])
    parts = [together[:, start:stop] for start, stop in zip(ends.tolist(), ends[1:].tolist(), strict=False)]
    return [part.reshape(x.shape) for part, x in zip(parts, tokens, strict=True)]


def head_norms(ops: Ops, weights: list[np.ndarray]) -> HeadNorms:
    return HeadNorms(ops.asarray(weights[0]), ops.asarray(weights[1]), 1e-6, 1e4)


def launcher(
    step: Layout,
    tokens: list[np.ndarray],
    rings: list[np.ndarray],
    weights: list[np.ndarray],
    window: int,
    dtype: str,
    **options: Any,
) -> Callable[[], Any]:
    ops = mlx_ops()
    from clsa_mlx.kernels.attend_window import attend_window
    from clsa_mlx.window import frequencies

    q, k, v = joined(ops, tokens)
    state = filled_window(ops, rings[0], rings[1], window, dtype)
    norms, angles = head_norms(ops, weights), frequencies(q.shape[-1] // 2, 1e4)
    return lambda: attend_window(q, k, v, norms, angles, state, step.queries(ops), **options)


def assert_attends(
    chunks: list[Chunk], window: int, heads: int, kv_heads: int, head_dim: int, dtype: str, **options: Any
) -> None:
    ops, rng = mlx_ops(), np.random.default_rng(window)
    step = layout(rng, chunks)
    tokens, rings = tokens_and_ring(rng, step, window, heads, kv_heads, head_dim, dtype)
    weights = [normal(rng, head_dim, dtype=dtype) for _ in "qk"]
    norms, positions = head_norms(SPEC, weights), step.queries(SPEC).positions
    q, k = (
        spec.norm_rope(spec.asarray(x), norm, norms.eps, positions, norms.theta)
        for x, norm in zip(tokens, (norms.q, norms.k), strict=False)
    )
    state = filled_window(SPEC, rings[0], rings[1], window, dtype)
    want = spec.sliding_attention(q, k, spec.asarray(tokens[2]), state, step.queries(SPEC))
    held = positions >= 0
    for how, (got, keys) in run_everywhere(launcher(step, tokens, rings, weights, window, dtype, **options)):
        case = (window, heads, kv_heads, head_dim, options, how)
        assert_close("attend_window", dtype, host(ops, got, dtype), want, case)
        assert_close("norm_rope", dtype, host(ops, keys, dtype)[held], k[held], case)


@pytest.mark.parametrize("heads, kv_heads, head_dim, dtype", SHAPES)
def test_shapes(heads: int, kv_heads: int, head_dim: int, dtype: str) -> None:
    assert_attends([Chunk(3, 1), Chunk(47, 1), Chunk(0, 0, padded=1)], 20, heads, kv_heads, head_dim, dtype)


@pytest.mark.parametrize("window", [1, 2, 5, 63, 64, 65, 128])
def test_windows(window: int) -> None:
    assert_attends(step_around(window), window, 2, 1, 64, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [256, 300])
def test_windows_in_parts(window: int, dtype: str) -> None:
    assert_attends([Chunk(p, 1) for p in (0, 255, 700)], window, 2, 1, 64, dtype)


@pytest.mark.parametrize("threads, head_dim", [(512, 256), (512, 80), (1024, 128)])
def test_larger_threadgroups(threads: int, head_dim: int) -> None:
    assert_attends(step_around(100), 100, 2, 1, head_dim, "float32", threads=threads)


def test_types_and_races() -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, [Chunk(300, 1)])
    tokens, rings = tokens_and_ring(rng, step, 256, 2, 1, 64, "bfloat16")
    compute = launcher(step, tokens, rings, [normal(rng, 64, dtype="bfloat16") for _ in "qk"], 256, "bfloat16")
    assert len(calls_of(compute)) == 2
    if missing := check_soundness(compute, launches=2):
        pytest.skip("; ".join(missing))
