"""How much fits: decided once, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clsa.config import MODEL_DTYPE, PAGE_SIZE, EngineConfig, MemoryDtypes
from clsa.errors import ConfigError
from clsa.ops import Ops, StepSize
from clsa.params import dtype_bytes, state_numbers_per_token, window_bytes
from clsa.plan import Plan
from clsa.weights import weight_bytes

MAX_ROWS = (1 << 31) - 1  # of a memory or a window: rows are int32
MAX_EMPTY_PAGES = 1 << 20  # of a model without a memory: pages cost nothing on the device, but a list on the host
SNAPSHOTS_PER_SEQUENCE = 4
ACTIVATION_BYTES = 8  # of a number on its way: in float32, and once more while an op makes the next of it
SAMPLING_BYTES = 64  # of a logit: itself, its noise (integers of 8 bytes on some backends), sorted copies for filters
TEMPORARIES = 6  # arrays of the largest size that an op holds at a time
ROOM_FOR_MEMORIES = 4  # of the bytes beside the weights, windows and steps get one in so many unless asked for more
MIN_STEP_TOKENS = 256  # that are left to a step whose size nobody gave


@dataclass(frozen=True, slots=True)
class Sizes:
    """Capacity of the engine. Window slots come first, then snapshot slots, in one id space."""

    max_model_len: int
    num_pages: int
    num_snapshots: int
    num_cached_pages: int  # of the pages, how many the prefix cache may keep
    step_size: StepSize
    num_bytes: int  # of all state together
    weight_bytes: int = 0
    step_bytes: int = 0  # what a step may take beside weights and state

    @property
    def num_slots(self) -> int:
        """Windows of running sequences."""
        return self.step_size.max_num_seqs

    def stats(self) -> dict[str, int]:
        """The plan as `LLM.stats` and `clsa info` show it; pages, slots and snapshots are counted by the scheduler."""
        return {
            "max_model_len": self.max_model_len,
            "max_tokens_in_memory": self.num_pages * PAGE_SIZE,
            "max_tokens_cached": self.num_cached_pages * PAGE_SIZE,
            "max_tokens_per_step": self.step_size.max_tokens_per_step,
            "weight_bytes": self.weight_bytes,
            "state_bytes": self.num_bytes,
            "step_bytes": self.step_bytes,
        }


def plan_sizes(ops: Ops, plan: Plan, dtype: str, engine: EngineConfig) -> Sizes:
    """Size the state from `engine` and the memory that the weights, not loaded yet, will leave free.

    A step's own buffers are set aside. Of the rest the state gets `memory_fraction`: rings for every running sequence
    first, then the prefix cache's snapshots, then pages: as many as `max_num_seqs` sequences of `max_model_len` can
    use, or `max_tokens_in_memory`. Raises ConfigError, with the sizes, if what was asked cannot fit.
    """
    config = plan.config
    max_model_len = engine.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len must be at most the model's {config.max_position_embeddings} positions, got {max_model_len}"
        )
    weights = weight_bytes(ops, config, dtype, engine.weight_dtype)
    page_bytes = state_bytes(ops, plan, dtype, 1, 0, engine.memory_dtypes)
    ring_bytes = state_bytes(ops, plan, dtype, 0, 1)
    size = _step_size(ops, plan, engine, max_model_len, weights, ring_bytes)
    step = step_bytes(ops, plan, engine, size, max_model_len)
    budget = _budget(ops, dtype, engine, weights, step)
    rings = size.max_num_seqs * ring_bytes
    snapshots = _num_snapshots(plan, engine, size.max_num_seqs, ring_bytes, budget - rings)
    tokens = engine.max_tokens_in_memory or size.max_num_seqs * max_model_len
    wanted = min(-(-tokens // PAGE_SIZE), MAX_ROWS // PAGE_SIZE if page_bytes else MAX_EMPTY_PAGES)
    needed = wanted if engine.max_tokens_in_memory else 1
    pages = wanted
    if page_bytes:
        pages = max(needed, min(wanted, (budget - rings - snapshots * ring_bytes) // page_bytes))
    num_bytes = rings + snapshots * ring_bytes + pages * page_bytes
    if num_bytes > budget:
        raise ConfigError(
            f"the state needs {num_bytes:,} bytes and {budget:,} may be used ({engine.memory_fraction:.0%} of what "
            f"weights and a step leave free on {ops.device}); lower max_num_seqs or max_tokens_in_memory"
        )
    if size.max_num_seqs * config.sliding_window > MAX_ROWS and ring_bytes:
        raise ConfigError(
            f"max_num_seqs ({size.max_num_seqs}) windows of {config.sliding_window} tokens are more than {MAX_ROWS} "
            "rows; lower max_num_seqs"
        )
    cached = pages
    if page_bytes:
        cached = min(pages, (engine.prefix_cache_bytes - snapshots * ring_bytes) // page_bytes)
    return Sizes(
        max_model_len=max_model_len,
        num_pages=pages,
        num_snapshots=snapshots,
        num_cached_pages=cached,
        step_size=size,
        num_bytes=num_bytes,
        weight_bytes=weights,
        step_bytes=step,
    )


def _step_size(
    ops: Ops, plan: Plan, engine: EngineConfig, max_model_len: int, weights: int, ring_bytes: int
) -> StepSize:
    """What was asked for. What was not is what the device works best with, halved until memories have enough room."""
    best = ops.step_size
    seqs, least_seqs = engine.max_num_seqs or best.max_num_seqs, engine.max_num_seqs or 1
    tokens = engine.max_tokens_per_step or best.max_tokens_per_step
    least_tokens = engine.max_tokens_per_step or min(tokens, MIN_STEP_TOKENS)
    room = (ops.memory_stats()["free"] - weights) // ROOM_FOR_MEMORIES
    while (seqs, tokens) != (least_seqs, least_tokens):
        size = replace(best, max_num_seqs=seqs, max_tokens_per_step=tokens)
        if seqs * ring_bytes + step_bytes(ops, plan, engine, size, max_model_len) <= room:
            break
        seqs, tokens = max(least_seqs, seqs // 2), max(least_tokens, tokens // 2)
    return replace(best, max_num_seqs=seqs, max_tokens_per_step=tokens)


def _budget(ops: Ops, dtype: str, engine: EngineConfig, weights: int, step: int) -> int:
    """Bytes that the state may take."""
    free = ops.memory_stats()["free"]
    if weights > free:
        raise ConfigError(
            f"the weights need {weights:,} bytes in {dtype} and {free:,} are free on {ops.device}; "
            "use a shorter dtype or a larger device"
        )
    if weights + step > free:
        raise ConfigError(
            f"the buffers of a step need {step:,} bytes and the weights leave {free - weights:,} free on {ops.device}; "
            "lower max_tokens_per_step or max_num_seqs"
        )
    return int((free - weights - step) * engine.memory_fraction)


def step_bytes(ops: Ops, plan: Plan, engine: EngineConfig, size: StepSize, max_model_len: int) -> int:
    """A bound on what a step takes beside weights and state: activations, logits, sampling, temporaries of its ops."""
    c, tokens = plan.config, size.max_tokens_per_step
    rows = min(size.max_num_seqs, tokens)  # those behind the prefill exit
    heads, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    width = 6 * c.hidden_size + 4 * heads + 4 * keys + 3 * c.intermediate_size
    activations = tokens * width * ACTIVATION_BYTES
    sampling = rows * c.vocab_size * SAMPLING_BYTES
    largest = 0  # of the arrays that an op would make if nothing bounded them
    for i, layer in enumerate(plan.layers):
        queries = tokens if i < plan.exit_layer or layer.window is not None else rows
        if layer.window is not None:
            seen = min(2 * c.sliding_window + 128, c.sliding_window + tokens)
            largest = max(largest, queries * c.num_attention_heads * seen * 4)
        if layer.route == "F":
            largest = max(largest, queries * max_model_len * 8)
        if layer.route == "D":
            largest = max(largest, queries * max(c.num_attention_heads * max_model_len * 4, keys * max_model_len * 4))
        if layer.route in ("F", "S"):
            largest = max(largest, queries * c.index_topk * keys * 4)
    if engine.weight_dtype is not None:  # a product may widen its weight first
        largest = max(largest, c.hidden_size * max(c.intermediate_size, c.num_attention_heads * c.head_dim) * 4)
    return activations + sampling + min(ops.temporary_bytes, TEMPORARIES * largest)


def _num_snapshots(plan: Plan, engine: EngineConfig, max_num_seqs: int, ring_bytes: int, left: int) -> int:
    """At most half of the prefix cache's bytes, the other half are for pages, and a quarter of what is left."""
    if not ring_bytes:
        return 0
    by_bytes = min(engine.prefix_cache_bytes // 2, max(0, left) // 4) // ring_bytes
    by_rows = MAX_ROWS // plan.config.sliding_window - max_num_seqs
    return max(0, min(by_bytes, by_rows, SNAPSHOTS_PER_SEQUENCE * max_num_seqs))


def state_bytes(
    ops: Ops, plan: Plan, dtype: str, num_pages: int, num_windows: int, stored: MemoryDtypes = MODEL_DTYPE
) -> int:
    """Bytes of so many pages of all memories and so many sequences' windows, as this backend stores them."""
    kv, index = state_numbers_per_token(plan.config)
    token = kv * ops.itemsize(stored.kv or dtype) + index * ops.itemsize(stored.index or dtype)
    windows = num_windows * window_bytes(plan.config, dtype) * ops.itemsize(dtype) // dtype_bytes(dtype)
    return num_pages * PAGE_SIZE * token + windows
