"""Sequences of one state: moved into another, and checked after they were saved. For the prompt cache of mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, State, Window
from clsa_mlx.blocks import join
from clsa_mlx.state import DTYPES, new_memory, new_window

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "int32"}


@dataclass(slots=True)
class CachedSequence:
    """What a state holds of one sequence. Its rings have the slot of its place among the sequences."""

    length: int = 0
    pages: list[int] = field(default_factory=list)


# A sequence where it is: the state, the sequence, its slot.
Part = tuple[State, CachedSequence, int]


def num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def is_empty(state: State) -> bool:
    """Whether nothing is allocated yet."""
    return not (state.memories or state.windows)


def arrays(state: State) -> list[mx.array]:
    parts: list[Memory | Window] = [*state.memories, *state.windows]
    return [x for part in parts for _, x in _fields(part)]


def pack(parts: Sequence[Part], capacity: int) -> tuple[list[CachedSequence], State]:
    """Copy sequences into one state with room for `capacity` pages, in order and each with its pages in a row."""
    packed, used = list[CachedSequence](), 0
    for _, sequence, _ in parts:
        count = num_pages(sequence.length)
        packed.append(CachedSequence(sequence.length, list(range(used, used + count))))
        used += count
    like = next((state for state, *_ in parts if not is_empty(state)), State((), ()))
    memories = tuple(_pack_memory(parts, i, like.memories[i], capacity) for i in range(len(like.memories)))
    windows = tuple(_pack_window(parts, i, like.windows[i]) for i in range(len(like.windows)))
    return packed, State(memories, windows)


def _pack_memory(parts: Sequence[Part], i: int, like: Memory, capacity: int) -> Memory:
    _, heads, head_dim = like.k.shape
    index_dim = None if like.k_idx is None else like.k_idx.shape[1]
    new = new_memory(capacity * PAGE_SIZE, heads, head_dim, index_dim, DTYPE_NAMES[like.k.dtype])
    held = [(state, rows) for state, sequence, _ in parts if (rows := _rows(sequence)).size]
    for name, target in _fields(new):
        if held:
            source = join([getattr(state.memories[i], name)[rows] for state, rows in held])
            target[: source.shape[0]] = source
    return new


def _pack_window(parts: Sequence[Part], i: int, like: Window) -> Window:
    size, (_, heads, head_dim) = like.size, like.k.shape
    new = new_window(len(parts), size, heads, head_dim, DTYPE_NAMES[like.k.dtype])
    for name, target in _fields(new):
        for new_slot, (state, _, slot) in enumerate(parts):
            if not is_empty(state):
                ring = getattr(state.windows[i], name)[slot * size : (slot + 1) * size]
                target[new_slot * size : (new_slot + 1) * size] = ring
    return new


def _rows(sequence: CachedSequence) -> mx.array:
    """Rows of all pages that hold tokens of a sequence."""
    pages = mx.array(sequence.pages[: num_pages(sequence.length)], mx.int32)
    return (pages[:, None] * PAGE_SIZE + mx.arange(PAGE_SIZE, dtype=mx.int32)).reshape(-1)


def check(state: State, sequences: Sequence[CachedSequence], capacity: int) -> None:
    """Raise ValueError unless every row that the sequences point to is there: MLX reads out of bounds silently."""
    pages = sorted(page for sequence in sequences for page in sequence.pages)
    if pages != list(range(len(pages))) or len(pages) > capacity:
        raise ValueError("its pages are not those of its memory")
    if any(num_pages(s.length) > len(s.pages) for s in sequences) or (is_empty(state) and pages):
        raise ValueError("it has fewer pages than tokens")
    for memory in state.memories:
        rows = (capacity + 1) * PAGE_SIZE
        if memory.k.shape != memory.v.shape or memory.k.ndim != 3 or memory.k.shape[0] != rows:
            raise ValueError(f"its memory has the shapes {memory.k.shape} and {memory.v.shape}")
        if memory.k_idx is not None and (memory.k_idx.ndim != 2 or memory.k_idx.shape[0] != rows):
            raise ValueError(f"its index has the shape {memory.k_idx.shape}")
    for window in state.windows:
        if window.k.shape != window.v.shape or window.k.ndim != 3:
            raise ValueError(f"a window has the shapes {window.k.shape} and {window.v.shape}")
        if window.k.shape[0] != len(sequences) * window.size + 2:
            raise ValueError(f"a window of {window.size} tokens has {window.k.shape[0]} rows")
    if len({array.dtype for array in arrays(state)} | set(DTYPE_NAMES)) > len(DTYPE_NAMES):
        raise ValueError("its arrays are not all floating point")


def _fields(part: Memory | Window) -> list[tuple[str, Any]]:
    """Names and arrays of a memory or window."""
    values = [(f.name, getattr(part, f.name)) for f in fields(part)]
    return [(name, value) for name, value in values if isinstance(value, mx.array)]
