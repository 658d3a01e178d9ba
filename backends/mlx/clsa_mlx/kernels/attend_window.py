"""attend_window for a decode step: QK norm, rotary positions and attention of one token per sequence over its ring."""

from __future__ import annotations

import mlx.core as mx

from clsa.ops import HeadNorms, Queries, Window
from clsa_mlx.kernels import THREADS
from clsa_mlx.kernels.attend import HEADERS, Launch
from clsa_mlx.kernels.load import load

_INPUTS = (
    *("query", "new_keys", "new_values", "query_norm", "key_norm", "epsilon", "frequencies"),
    *("keys", "values", "positions", "sequence", "slots", "size", "scale"),
)


def attend_window(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    norms: HeadNorms,
    frequencies: mx.array,
    window: Window,
    queries: Queries,
    threads: int = THREADS,
) -> tuple[mx.array, mx.array]:
    """As `Ops.attend_window` with `queries.one_each`, up to the write: what was attended, and the keys to write.

    Heads lie row by row, but the tokens of q, k and v may be further apart. Conditions as for gather_attention;
    frequencies [D / 2] float32 as for norm_rope.
    """
    launch = Launch.of(q, k, window.size, threads)
    arguments = launch.arguments(q.dtype)
    arguments["output_shapes"].append(k.shape)
    arguments["output_dtypes"].append(k.dtype)
    *outputs, keys = load("attend_window", _INPUTS, ("out", "stats", "own_keys"), (*HEADERS, "rope"), strided=True)(
        inputs=[
            *(q, k, v, norms.q, norms.k, norms.eps, frequencies),
            *(window.k, window.v, queries.positions, queries.sequence, queries.window_slots, window.size),
            q.shape[-1] ** -0.5,
        ],
        **arguments,
    )
    return launch.combine(outputs, q.dtype), keys
