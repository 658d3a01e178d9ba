"""Random arrays made on the device: no zeros, no two rows alike, and billions of numbers in seconds.

Two blocks of a few thousand normal rows are drawn on the host. Each row that is handed out is the sum of one row of
each, and no pair occurs twice before all have; so only integers cross to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from clsa.config import MODEL_DTYPE, MemoryDtypes, ModelConfig
from clsa.model import new_state
from clsa.ops import Array, Float8Weight, Memory, Ops, State, Window
from clsa.params import INIT_STD, nest, tensor_shapes
from clsa.plan import Plan
from clsa.weights import in_float8

_BLOCK_NUMBERS = 1 << 23  # of a block; 32 MB in float32
_MIN_ROWS, _MAX_ROWS = 64, 4096
_TAKE_NUMBERS = 1 << 24  # handed out at once: few calls for a device, little memory for a host


class RandomRows:
    """An endless supply of different random rows [width], normal with standard deviation `std`."""

    def __init__(self, ops: Ops, width: int, dtype: str, seed: int, std: float = 1.0) -> None:
        self._ops, self._rng = ops, np.random.default_rng([seed, width])
        self._block_rows = min(_MAX_ROWS, max(_MIN_ROWS, _BLOCK_NUMBERS // width))
        self.max_rows = self._block_rows * max(1, _TAKE_NUMBERS // width // self._block_rows)  # of one `take`
        self._blocks = [ops.asarray(self._normal(width) * np.float32(std / np.sqrt(2)), dtype) for _ in range(2)]
        self._shift = 0

    def take(self, rows: int) -> Array:
        """[rows, width], for rows <= max_rows."""
        size, turns = self._block_rows, -(-rows // self._block_rows)
        first = np.tile(self._rng.permutation(size), turns)[:rows]
        shifts = np.repeat(np.arange(self._shift, self._shift + turns), size)[:rows]
        self._shift += turns
        ops, (one, other) = self._ops, (first.astype(np.int32), ((first + shifts) % size).astype(np.int32))
        a, b = (ops.take(x, ops.asarray(i)) for x, i in zip(self._blocks, (one, other), strict=True))
        return a + b

    def matrix(self, rows: int) -> Array:
        """[rows, width] for any number of rows."""
        counts = _cut(rows, self.max_rows)
        parts = [self.take(stop - start) for start, stop in counts]
        return parts[0] if len(parts) == 1 else self._ops.concat(parts)

    def _normal(self, width: int) -> np.ndarray:
        return self._rng.standard_normal((self._block_rows, width), dtype=np.float32)


def random_params(
    ops: Ops, config: ModelConfig, dtype: str, weight_dtype: str | None = None, seed: int = 0
) -> Mapping[str, Any]:
    """Weights of the right shapes and about the right sizes: matrices normal, norms around one.

    `weight_dtype` as `load_weights` takes it.
    """
    sources: dict[int, RandomRows] = {}
    flat: dict[str, Array | Float8Weight] = {}
    rng = np.random.default_rng(seed)
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            flat[name] = ops.asarray(rng.normal(1.0, 0.1, shape).astype(np.float32), dtype)
            continue
        if shape[1] not in sources:
            sources[shape[1]] = RandomRows(ops, shape[1], dtype, seed, INIT_STD)
        matrix = sources[shape[1]].matrix(shape[0])
        flat[name] = ops.float8_weight(matrix) if weight_dtype and in_float8(name, shape) else matrix
        ops.evaluate(flat[name])
    wait(ops, list(flat.values()))
    return nest(flat)


def random_state(
    ops: Ops, plan: Plan, rows: int, slots: int, dtype: str, stored: MemoryDtypes = MODEL_DTYPE, seed: int = 1
) -> State:
    """State in which every row of `rows` tokens of memory and every ring of `slots` sequences is random."""
    c = plan.config
    state = new_state(ops, plan, rows, slots, dtype, stored)
    kv = RandomRows(ops, c.num_key_value_heads * c.head_dim, dtype, seed)
    index = RandomRows(ops, c.index_head_dim, dtype, seed) if any(plan.memory_has_index) else None
    # Tuples are rebuilt one by one: a backend that writes in place must not find the old value held.
    memories, windows = list(state.memories), list(state.windows)
    del state
    for i in range(len(memories)):
        memories[i] = fill_memory(ops, memories[i], c, rows, kv, index)
    for i in range(len(windows)):
        windows[i] = fill_window(ops, windows[i], c, slots * c.sliding_window, kv)
    return State(tuple(memories), tuple(windows))


def fill_memory(
    ops: Ops, memory: Memory, c: ModelConfig, rows: int, kv: RandomRows, index: RandomRows | None
) -> Memory:
    """Write random K, V and K_idx to the first `rows` rows."""
    size = kv.max_rows if index is None else min(kv.max_rows, index.max_rows)
    for start, stop in _cut(rows, size):
        k, v = (kv.take(stop - start).reshape(stop - start, -1, c.head_dim) for _ in range(2))
        k_idx = None if index is None or memory.k_idx is None else index.take(stop - start)
        memory = ops.write_memory(memory, k, v, k_idx, ops.asarray(np.arange(start, stop, dtype=np.int32)))
        wait(ops, memory.k if memory.k_idx is None else memory.k_idx)
    return memory


def fill_window(ops: Ops, window: Window, c: ModelConfig, rows: int, kv: RandomRows) -> Window:
    """Write random K and V to the first `rows` ring rows."""
    for start, stop in _cut(rows, kv.max_rows):
        k, v = (kv.take(stop - start).reshape(stop - start, -1, c.head_dim) for _ in range(2))
        window = ops.write_window(window, k, v, ops.asarray(np.arange(start, stop, dtype=np.int32)))
        wait(ops, window.v)
    return window


def _cut(rows: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def wait(ops: Ops, value: Any) -> None:
    """Return when everything that was asked of the device up to `value` has been done."""
    ops.evaluate(value)
    first = next(_arrays(value), None)
    if first is not None:
        ops.to_numpy(ops.take(first, ops.asarray(np.zeros(1, np.int32))))


def _arrays(value: Any) -> Iterator[Array]:
    """The arrays in a value, the last computed first."""
    if isinstance(value, (list, tuple)):
        for item in reversed(value):
            yield from _arrays(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _arrays([getattr(value, name) for name in value.__dataclass_fields__])
    elif hasattr(value, "shape"):
        yield value
