"""How much fits: decided once, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from clsa.config import PAGE_SIZE, EngineConfig
from clsa.errors import ConfigError
from clsa.ops import Ops
from clsa.params import dtype_bytes, state_bytes_per_token, window_bytes
from clsa.plan import Plan
from clsa.weights import weight_bytes

MAX_ROWS = (1 << 31) - 1  # of a memory or a window: rows are int32
MAX_EMPTY_PAGES = 1 << 20  # of a model without a memory: pages cost nothing on the device, but a list on the host
SNAPSHOTS_PER_SEQUENCE = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Capacity of the engine. Window slots come first, then snapshot slots, in one id space."""

    max_model_len: int
    num_pages: int
    num_slots: int
    num_snapshots: int
    num_cached_pages: int  # of the pages, how many the prefix cache may keep
    num_bytes: int  # of all state together


def plan_sizes(ops: Ops, plan: Plan, dtype: str, engine: EngineConfig) -> Sizes:
    """Size the state from `engine` and the memory that the weights, not loaded yet, will leave free.

    Rings for every running sequence come first, then the prefix cache's snapshots, then pages: as many as
    `max_num_seqs` sequences of `max_model_len` can use, or `max_tokens_in_memory`, within the budget. Raises
    ConfigError, with the sizes, if what was asked cannot fit.
    """
    config = plan.config
    max_model_len = engine.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len must be at most the model's {config.max_position_embeddings} positions, got {max_model_len}"
        )
    page_bytes, ring_bytes = state_bytes(ops, plan, dtype, 1, 0), state_bytes(ops, plan, dtype, 0, 1)
    budget = int(_free_beside_weights(ops, plan, dtype) * engine.memory_fraction)
    rings = engine.max_num_seqs * ring_bytes
    snapshots = _num_snapshots(plan, engine, ring_bytes, budget - rings)
    tokens = engine.max_tokens_in_memory or engine.max_num_seqs * max_model_len
    wanted = min(-(-tokens // PAGE_SIZE), MAX_ROWS // PAGE_SIZE if page_bytes else MAX_EMPTY_PAGES)
    needed = wanted if engine.max_tokens_in_memory else 1
    pages = wanted
    if page_bytes:
        pages = max(needed, min(wanted, (budget - rings - snapshots * ring_bytes) // page_bytes))
    num_bytes = rings + snapshots * ring_bytes + pages * page_bytes
    if num_bytes > budget:
        raise ConfigError(
            f"the state needs {num_bytes:,} bytes and {budget:,} may be used ({engine.memory_fraction:.0%} of what the "
            f"weights leave free on {ops.device}); lower max_num_seqs or max_tokens_in_memory"
        )
    if engine.max_num_seqs * config.sliding_window > MAX_ROWS and ring_bytes:
        raise ConfigError(
            f"max_num_seqs ({engine.max_num_seqs}) windows of {config.sliding_window} tokens are more than {MAX_ROWS} "
            "rows; lower max_num_seqs"
        )
    cached = pages
    if page_bytes:
        cached = min(pages, (engine.prefix_cache_bytes - snapshots * ring_bytes) // page_bytes)
    return Sizes(max_model_len, pages, engine.max_num_seqs, snapshots, cached, num_bytes)


def _free_beside_weights(ops: Ops, plan: Plan, dtype: str) -> int:
    weights, free = weight_bytes(ops, plan.config, dtype), ops.memory_stats()["free"]
    if weights > free:
        raise ConfigError(
            f"the weights need {weights:,} bytes in {dtype} and {free:,} are free on {ops.device}; "
            "use a shorter dtype or a larger device"
        )
    return free - weights


def _num_snapshots(plan: Plan, engine: EngineConfig, ring_bytes: int, left: int) -> int:
    """At most half of the prefix cache's bytes, the other half are for pages, and a quarter of what is left."""
    if not ring_bytes:
        return 0
    by_bytes = min(engine.prefix_cache_bytes // 2, max(0, left) // 4) // ring_bytes
    by_rows = MAX_ROWS // plan.config.sliding_window - engine.max_num_seqs
    return max(0, min(by_bytes, by_rows, SNAPSHOTS_PER_SEQUENCE * engine.max_num_seqs))


def state_bytes(ops: Ops, plan: Plan, dtype: str, num_pages: int, num_windows: int) -> int:
    """Bytes of so many pages of all memories and so many sequences' windows, as this backend stores them."""
    pages = num_pages * PAGE_SIZE * state_bytes_per_token(plan.config, dtype)
    windows = num_windows * window_bytes(plan.config, dtype)
    return (pages + windows) * ops.itemsize(dtype) // dtype_bytes(dtype)
