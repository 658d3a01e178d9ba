"""How much state fits: decided once, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from clsa.config import PAGE_SIZE, EngineConfig
from clsa.errors import ConfigError
from clsa.ops import Ops
from clsa.params import dtype_bytes, state_bytes_per_token, window_bytes
from clsa.plan import Plan


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
    """Size the state from `engine` and the free memory. Raises ConfigError if what was asked cannot fit.

    Rings for every running sequence come first, then the prefix cache's snapshots, then pages: as many as
    `max_num_seqs` sequences of `max_model_len` can use, or `max_tokens_in_memory`, within the budget.
    """
    config = plan.config
    max_model_len = engine.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len must be at most the model's {config.max_position_embeddings} positions, got {max_model_len}"
        )
    scale = ops.itemsize(dtype) / dtype_bytes(dtype)
    ring_bytes = int(window_bytes(config, dtype) * scale)
    page_bytes = int(state_bytes_per_token(config, dtype) * scale) * PAGE_SIZE
    budget = int(ops.memory_stats()["free"] * engine.memory_fraction)
    rings = engine.max_num_seqs * ring_bytes
    snapshots = min(engine.prefix_cache_bytes // ring_bytes, 4 * engine.max_num_seqs) if ring_bytes else 0
    snapshots = min(snapshots, max(0, budget - rings) // 4 // ring_bytes) if ring_bytes else 0
    left = budget - rings - snapshots * ring_bytes
    wanted = -(-(engine.max_tokens_in_memory or engine.max_num_seqs * max_model_len) // PAGE_SIZE)
    pages = min(wanted, left // page_bytes) if page_bytes else wanted
    if pages < 1 or (engine.max_tokens_in_memory is not None and pages < wanted):
        needed = rings + (wanted if engine.max_tokens_in_memory else 1) * page_bytes
        raise ConfigError(
            f"the state needs {needed:,} bytes and {budget:,} may be used ({engine.memory_fraction:.0%} of the free "
            f"memory of {ops.device}); lower max_num_seqs or max_tokens_in_memory"
        )
    cached = min(pages, engine.prefix_cache_bytes // page_bytes) if page_bytes else 0
    total = rings + snapshots * ring_bytes + pages * page_bytes
    return Sizes(max_model_len, pages, engine.max_num_seqs, snapshots, cached, total)
