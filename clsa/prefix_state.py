"""The state of a prefix on the host: what the prefix cache keeps for it, moved out of the engine and back in.

The unit is that of the cache: K, V and K_idx of the full pages of every memory, and the window at their end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clsa.config import PAGE_SIZE, ModelConfig
from clsa.errors import RequestError
from clsa.float8 import FLOAT8
from clsa.ops import Array, Ops, State
from clsa.plan import Plan
from clsa.prefix import Chain, Hit
from clsa.residency import Residency


@dataclass(frozen=True, slots=True)
class PrefixState:
    """`tokens`, a whole number of pages, and the rows of state that `prefix_shapes` names."""

    tokens: list[int]
    arrays: dict[str, np.ndarray]


def prefix_shapes(plan: Plan, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes: memory rows by position, window rows by position up to the last; heads as in `clsa.ops`."""
    config: ModelConfig = plan.config
    heads = (config.num_key_value_heads, config.head_dim)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, has_index in enumerate(plan.memory_has_index):
        shapes |= {f"memory.{i}.{name}": (num_tokens, *heads) for name in ("k", "v")}
        if has_index:
            shapes[f"memory.{i}.k_idx"] = (num_tokens, config.index_head_dim)
    for i in range(plan.num_windows):
        shapes |= {f"window.{i}.{name}": (min(num_tokens, config.sliding_window), *heads) for name in ("k", "v")}
    return shapes


def read_rows(ops: Ops, state: State, pages: Sequence[int], slot: int) -> dict[str, np.ndarray]:
    """Copy a prefix to the host: its pages, and what ring `slot` holds at their end. Waits for the device."""
    num_tokens = len(pages) * PAGE_SIZE
    rows = ops.asarray(_memory_rows(pages))
    arrays: dict[str, np.ndarray] = {}
    for i, memory in enumerate(state.memories):
        arrays[f"memory.{i}.k"] = ops.to_numpy(ops.take(memory.k, rows))
        arrays[f"memory.{i}.v"] = ops.to_numpy(ops.take(memory.v, rows))
        if memory.k_idx is not None:
            arrays[f"memory.{i}.k_idx"] = ops.to_numpy(ops.take(memory.k_idx, rows))
    for i, window in enumerate(state.windows):
        ring = ops.asarray(_ring_rows(num_tokens, slot, window.size))
        arrays[f"window.{i}.k"] = ops.to_numpy(ops.take(window.k, ring))
        arrays[f"window.{i}.v"] = ops.to_numpy(ops.take(window.v, ring))
    return arrays


def write_rows(
    ops: Ops, state: State, dtype: str, pages: Sequence[int], slot: int, arrays: dict[str, np.ndarray]
) -> State:
    """The inverse of `read_rows`: the new state."""

    def array(name: str) -> Array:
        rows = arrays[name]
        return ops.asarray(rows.astype(np.float32) if rows.dtype == FLOAT8 else rows, dtype)

    rows = ops.asarray(_memory_rows(pages))
    memories = []
    for i, memory in enumerate(state.memories):
        k_idx = None if memory.k_idx is None else array(f"memory.{i}.k_idx")
        memories.append(ops.write_memory(memory, array(f"memory.{i}.k"), array(f"memory.{i}.v"), k_idx, rows))
    windows = []
    for i, window in enumerate(state.windows):
        ring = ops.asarray(_ring_rows(len(pages) * PAGE_SIZE, slot, window.size))
        windows.append(ops.write_window(window, array(f"window.{i}.k"), array(f"window.{i}.v"), ring))
    return State(tuple(memories), tuple(windows))


def find(residency: Residency, tokens: Sequence[int], salt: str) -> Hit:
    """What the cache has of the full pages of `tokens`; the caller holds the pages until it releases them."""
    return residency.prefix.match(Chain([*tokens, 0], salt))  # a match leaves the last token to compute


def make_room(residency: Residency, num_pages: int) -> tuple[list[int], int | None]:
    """Pages and a snapshot slot (None without sliding layers) for a prefix that comes in.

    Raises RequestError, with the sizes, if there is no room.
    """
    pool, prefix = residency.pool, residency.prefix
    room = min(pool.num_available, prefix.max_pages) if prefix.enabled else 0
    if num_pages > room:
        raise RequestError(
            f"the prefix has {num_pages * PAGE_SIZE} tokens and the prefix cache has room for {room * PAGE_SIZE}; "
            "enlarge it (max_tokens_in_memory, prefix_cache_bytes) or wait for what runs"
        )
    slot = prefix.take_snapshot() if prefix.needs_snapshot else None
    if slot is None and prefix.needs_snapshot:
        raise RequestError("every snapshot of the prefix cache is taken by what runs; try again when it has ended")
    prefix.evict(num_pages - pool.num_free)
    pages = pool.allocate(num_pages)
    assert pages is not None, "as many pages were available"
    return pages, slot


def publish(residency: Residency, tokens: Sequence[int], salt: str, pages: list[int], slot: int | None) -> bool:
    """Hand what `make_room` gave to the cache. Returns whether all of it can be found now."""
    snapshots = {} if slot is None else {len(tokens): slot}
    residency.prefix.insert(Chain(list(tokens), salt), pages, snapshots)
    for unused in snapshots.values():
        residency.prefix.return_snapshot(unused)
    residency.pool.release(pages)
    hit = find(residency, tokens, salt)
    residency.pool.release(hit.pages)
    return hit.num_tokens == len(tokens)


def _memory_rows(pages: Sequence[int]) -> np.ndarray:
    rows = np.array(pages, np.int32)[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE, dtype=np.int32)
    return rows.reshape(-1)


def _ring_rows(num_tokens: int, slot: int, size: int) -> np.ndarray:
    return (slot * size + np.arange(max(0, num_tokens - size), num_tokens) % size).astype(np.int32)
