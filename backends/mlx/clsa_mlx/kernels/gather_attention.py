"""gather_attention: each row of K and V is read once for all query heads of its KV head."""

from __future__ import annotations

import mlx.core as mx

from clsa.ops import Memory, Selection
from clsa_mlx.kernels import THREADS
from clsa_mlx.kernels.attend import HEADERS, Launch
from clsa_mlx.kernels.load import load


def gather_attention(q: mx.array, memory: Memory, selection: Selection, threads: int = THREADS) -> mx.array:
    """As `Ops.gather_attention`; `has_kernel` tells for what.

    1024 threads need a head dim of at most 128.
    """
    launch = Launch.of(q, memory.k, selection.rows.shape[1], threads)
    outputs = load(
        "gather_attention", ("query", "keys", "values", "rows", "lengths", "scale"), ("out", "stats"), HEADERS
    )(
        inputs=[q, memory.k, memory.v, selection.rows, selection.lengths, q.shape[-1] ** -0.5],
        **launch.arguments(q.dtype),
    )
    return launch.combine(outputs, q.dtype)
