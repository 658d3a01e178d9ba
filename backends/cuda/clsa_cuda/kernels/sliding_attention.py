"""`sliding_attention` of a decode step: the ring, and the token itself."""

from __future__ import annotations

from torch import Tensor

from clsa.errors import BackendError
from clsa.ops import HeadNorms, Queries, Window
from clsa_cuda import plain
from clsa_cuda.kernels.attend_rows import Arrival, attend_rows
from clsa_cuda.kernels.tiles import AttentionTiles, attention_tiles, limits


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    queries: Queries,
    tiles: AttentionTiles | None = None,
    fresh: bool = True,
) -> Tensor:
    """`Ops.sliding_attention` where every sequence asks with one token; `tiles` is for measuring others.

    `fresh` False promises that the last launch made nothing but q, k and v of this: see `attend_rows`.
    """
    if not queries.one_each:
        raise BackendError("the sliding attention kernel takes one query a sequence; use the plain op for prefill")
    num_queries, _, head_dim = q.shape
    tiles = tiles or attention_tiles(num_queries, k.shape[1], window.size, head_dim, q.itemsize, limits(q.device))
    kv, slots = (window.k, window.v), queries.window_slots
    return attend_rows("ring", window.size, q, kv, (k, v), slots, queries.positions, tiles, fresh=fresh)


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms,
    window: Window,
    queries: Queries,
    ring_mapping: Tensor,
    tiles: AttentionTiles | None = None,
    fresh: bool = True,
) -> tuple[Tensor, Window]:
    """`Ops.attend_window` where every sequence asks with one token: one launch. `fresh` as in `sliding_attention`."""
    if not queries.one_each:
        raise BackendError("the window kernel takes one query a sequence; use the plain ops for prefill")
    num_queries, _, head_dim = q.shape
    tiles = tiles or attention_tiles(num_queries, k.shape[1], window.size, head_dim, q.itemsize, limits(q.device))
    arrival = Arrival(norms, plain.frequencies(head_dim // 2, norms.theta, q.device), ring_mapping)
    kv, slots = (window.k, window.v), queries.window_slots
    o = attend_rows("ring", window.size, q, kv, (k, v), slots, queries.positions, tiles, arrival, fresh)
    return o, window
