"""dense_attention: causal, over every visible row of the pages and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops
from tests.ops.cases import DECODE, STEPS, Chunk, filled_memory, host, layout, normal, poisoned
from tests.tolerance import assert_close

HEADS = [(1, 1, 2), (4, 2, 64), (6, 2, 10), (8, 1, 16), (4, 4, 128)]


@pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_dense_attention(ops: Ops, dtype: str, chunks: list[Chunk], heads: int, kv_heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    q = normal(rng, len(step.positions), heads, head_dim, dtype=dtype, scale=2.0)
    kv = [poisoned(normal(rng, step.num_rows, kv_heads, head_dim, dtype=dtype), step.readable) for _ in range(2)]
    q[step.positions < 0] = np.nan  # a padded row may hold anything
    got, want = (
        o.dense_attention(o.asarray(q), filled_memory(o, kv[0], kv[1], None, dtype), step.queries(o))
        for o in (ops, spec)
    )
    result = host(ops, got, dtype)
    assert not result[step.positions < 0].any(), "a padded query must get zeros"
    assert_close("dense_attention", dtype, result, want, (heads, kv_heads, head_dim))


@pytest.mark.parametrize("chunks", DECODE.values(), ids=DECODE.keys())
def test_a_longer_page_table_changes_nothing(ops: Ops, chunks: list[Chunk]) -> None:
    """Pages beyond the query, real ones or -1, are not read."""
    rng = np.random.default_rng(0)
    step = layout(rng, chunks)
    kv = [poisoned(normal(rng, step.num_rows, 2, 8, dtype="float32"), step.readable) for _ in range(2)]
    memory = filled_memory(ops, kv[0], kv[1], None, "float32")
    q = ops.asarray(normal(rng, len(step.positions), 4, 8, dtype="float32"))
    want = ops.to_numpy(ops.dense_attention(q, memory, step.queries(ops)))
    wider = np.pad(step.block_table, ((0, 0), (0, 3)), constant_values=-1)
    wider[:, -2] = step.block_table[0, 0]
    queries = type(step)(**{**vars(step), "block_table": wider}).queries(ops)
    assert_close("dense_attention", "float32", ops.to_numpy(ops.dense_attention(q, memory, queries)), want)
