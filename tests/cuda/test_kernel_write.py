"""The write kernels: each token at its row, -1 nowhere, everything else untouched."""

from __future__ import annotations

import numpy as np
import pytest

from clsa.ops import Ops
from clsa_cuda.kernels.write_memory import write_memory, write_window
from tests.ops.cases import filled_memory, filled_window, host, normal

ROWS = 128


@pytest.mark.parametrize("num_tokens", [0, 1, 65])
@pytest.mark.parametrize("index_dim", [None, 16, 65])
@pytest.mark.parametrize("kv_heads, head_dim", [(1, 2), (2, 8), (3, 80)])
def test_write_memory(
    ops: Ops, dtype: str, num_tokens: int, index_dim: int | None, kv_heads: int, head_dim: int
) -> None:
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(kv_heads, head_dim)] * 2 + ([] if index_dim is None else [(index_dim,)])
    old = [normal(rng, ROWS, *shape, dtype=dtype) for shape in shapes]
    new = [normal(rng, num_tokens, *shape, dtype=dtype) for shape in shapes]
    slots = rng.permutation(ROWS)[:num_tokens].astype(np.int32)
    slots[rng.random(num_tokens) < 0.3] = -1
    want = [x.astype(np.float64) for x in old]
    for whole, part in zip(want, new):
        whole[slots[slots >= 0]] = part[slots >= 0]
        part[slots < 0] = np.nan  # what is written nowhere must be seen nowhere
    memory = filled_memory(ops, old[0], old[1], None if index_dim is None else old[2], dtype)
    k_idx = None if index_dim is None else ops.asarray(new[2])
    memory = write_memory(memory, ops.asarray(new[0]), ops.asarray(new[1]), k_idx, ops.asarray(slots))
    arrays = [memory.k, memory.v] + ([] if memory.k_idx is None else [memory.k_idx])
    for got, expected in zip(arrays, want, strict=True):
        assert np.array_equal(host(ops, got, dtype)[:ROWS], expected)
        assert not host(ops, got, dtype)[ROWS:].any()


def test_write_memory_without_an_index_ignores_the_key(ops: Ops) -> None:
    rng = np.random.default_rng(0)
    old = normal(rng, ROWS, 1, 4, dtype="float32")
    memory = filled_memory(ops, old, old, None, "float32")
    new = ops.asarray(normal(rng, 1, 1, 4, dtype="float32"))
    write_memory(memory, new, new, ops.asarray(normal(rng, 1, 7, dtype="float32")), ops.asarray(np.zeros(1, np.int32)))
    assert np.array_equal(ops.to_numpy(memory.k)[0], ops.to_numpy(new)[0])
    assert np.array_equal(ops.to_numpy(memory.k)[1:ROWS], old[1:])


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_write_window(ops: Ops, dtype: str, num_tokens: int) -> None:
    """From a slice of a wider tensor, as a fused projection leaves it."""
    rng = np.random.default_rng(0)
    old = [normal(rng, 4 * 7, 2, 10, dtype=dtype) for _ in range(2)]
    window = filled_window(ops, old[0], old[1], 7, dtype)
    both = ops.asarray(normal(rng, num_tokens, 4, 10, dtype=dtype))
    rows = rng.permutation(28)[:num_tokens].astype(np.int32)
    rows[: num_tokens // 2] = -1
    write_window(window, both[:, :2], both[:, 2:], ops.asarray(rows))
    for got, whole, part in zip((window.k, window.v), old, (both[:, :2], both[:, 2:])):
        want = whole.astype(np.float64)
        want[rows[rows >= 0]] = host(ops, part, dtype)[rows >= 0]
        assert np.array_equal(host(ops, got, dtype)[:28], want)
