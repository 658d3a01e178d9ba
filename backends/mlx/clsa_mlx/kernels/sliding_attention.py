"""sliding_attention for a decode step: one token per sequence over its ring."""

from __future__ import annotations

import mlx.core as mx

from clsa.ops import Queries, Window
from clsa_mlx.kernels import THREADS
from clsa_mlx.kernels.attend import HEADERS, Launch
from clsa_mlx.kernels.load import load


def sliding_attention(
    q: mx.array, k: mx.array, v: mx.array, window: Window, queries: Queries, threads: int = THREADS
) -> mx.array:
    """As `Ops.sliding_attention` with `queries.one_each`; same conditions as the kernel of gather_attention."""
    launch = Launch.of(q, k, window.size, threads)
    outputs = load(
        "sliding_attention",
        ("query", "new_keys", "new_values", "keys", "values", "positions", "sequence", "slots", "size", "scale"),
        ("out", "stats"),
        HEADERS,
    )(
        inputs=[
            q, k, v, window.k, window.v, queries.positions, queries.sequence, queries.window_slots, window.size,
            q.shape[-1] ** -0.5,
        ],
        **launch.arguments(q.dtype),
    )  # fmt: skip
    return launch.combine(outputs, q.dtype)
