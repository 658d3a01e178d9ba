"""Inputs of the op tests: the same numbers for a backend and for the specification, on pages in random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from clsa import spec
from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Ops, Queries, Window

NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` in that dtype: what both sides of a comparison start from."""
    return x.astype(NUMPY_DTYPES[dtype])


def normal(rng: np.random.Generator, *shape: int, dtype: str, scale: float = 1.0) -> np.ndarray:
    return rounded(rng.standard_normal(shape) * scale, dtype)


def host(ops: Ops, x: Any, dtype: str) -> np.ndarray:
    """An op's floating-point result as float64; fails if it did not come back in `dtype`."""
    out = ops.to_numpy(x)
    assert out.dtype == (np.float16 if dtype == "float16" else np.float32), f"{out.dtype} came back for {dtype}"
    if dtype == "bfloat16":
        kept = out.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(out, kept, equal_nan=True), "the result was not rounded to bfloat16"
    return out.astype(np.float64)


def integers(ops: Ops, x: Any) -> np.ndarray:
    """An op's int32 result."""
    out = ops.to_numpy(x)
    assert out.dtype == np.int32, f"wanted int32, got {out.dtype}"
    return out


@dataclass(frozen=True)
class Chunk:
    """`length` tokens of one sequence from position `start`, then `padded` rows at position -1."""

    start: int
    length: int
    padded: int = 0

    @property
    def context_len(self) -> int:
        return self.start + self.length if self.length else 0


@dataclass(frozen=True)
class Layout:
    """A step as NumPy arrays: the fields of `Queries`, and how many rows the memory has."""

    positions: np.ndarray
    sequence: np.ndarray
    block_table: np.ndarray
    window_slots: np.ndarray
    cu_seqlens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_rows: int
    num_slots: int

    def queries(self, ops: Ops) -> Queries:
        names = ("positions", "sequence", "block_table", "window_slots")
        arrays = {name: ops.asarray(getattr(self, name).astype(np.int32)) for name in names}
        return Queries(**arrays, cu_seqlens=self.cu_seqlens, context_lens=self.context_lens)

    @property
    def readable(self) -> np.ndarray:
        """Which memory rows hold a token that some query may see: [N] bool."""
        out = np.zeros(self.num_rows, bool)
        for b, context_len in enumerate(self.context_lens):
            out[self.rows_of(b, np.arange(context_len))] = True
        return out

    def rows_of(self, sequence: int, positions: np.ndarray) -> np.ndarray:
        return self.block_table[sequence, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE


def layout(rng: np.random.Generator, chunks: Sequence[Chunk], spare_pages: int = 3) -> Layout:
    """Pack chunks; pages and window slots are handed out in random order, some belong to nobody."""
    needed = [-(-chunk.context_len // PAGE_SIZE) for chunk in chunks]
    pages = rng.permutation(sum(needed) + spare_pages)
    table = np.full((len(chunks), max(*needed, 1)), -1)
    taken = 0
    for b, count in enumerate(needed):
        table[b, :count] = pages[taken : taken + count]
        taken += count
    parts = [np.r_[np.arange(c.start, c.start + c.length), np.full(c.padded, -1)] for c in chunks]
    sizes = [len(part) for part in parts]
    return Layout(
        positions=np.concatenate(parts),
        sequence=np.repeat(np.arange(len(chunks)), sizes),
        block_table=table,
        window_slots=rng.permutation(len(chunks) + 2)[: len(chunks)],
        cu_seqlens=(0, *np.cumsum(sizes).tolist()),
        context_lens=tuple(chunk.context_len for chunk in chunks),
        num_rows=len(pages) * PAGE_SIZE,
        num_slots=len(chunks) + 2,
    )


def filled_memory(ops: Ops, k: np.ndarray, v: np.ndarray, k_idx: np.ndarray | None, dtype: str) -> Memory:
    """A memory whose row i holds k[i], v[i], k_idx[i] (already of that dtype)."""
    index_dim = None if k_idx is None else k_idx.shape[1]
    memory = ops.new_memory(k.shape[0], k.shape[1], k.shape[2], index_dim, dtype)
    slots = ops.asarray(np.arange(k.shape[0], dtype=np.int32))
    index = None if k_idx is None else ops.asarray(k_idx)
    return ops.write_memory(memory, ops.asarray(k), ops.asarray(v), index, slots)


def filled_window(ops: Ops, k: np.ndarray, v: np.ndarray, size: int, dtype: str) -> Window:
    """A window whose ring row i holds k[i], v[i] (already of that dtype)."""
    window = ops.new_window(k.shape[0] // size, size, k.shape[1], k.shape[2], dtype)
    rows = ops.asarray(np.arange(k.shape[0], dtype=np.int32))
    return ops.write_window(window, ops.asarray(k), ops.asarray(v), rows)


def poisoned(x: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """`x` with NaN in every row that must not be read."""
    x = x.copy()
    x[~readable] = np.nan
    return x


# Ragged steps that every op with paged state is tested on.
DECODE = {
    "one": [Chunk(110, 1)],
    "first-token": [Chunk(0, 1)],
    "ragged": [Chunk(n - 1, 1) for n in (64, 1, 1000, 63, 111, 65)],
    "padded": [Chunk(62, 1), Chunk(0, 0, padded=1), Chunk(128, 1), Chunk(0, 0, padded=1)],
}
PREFILL = {
    "prompt": [Chunk(0, 111)],
    "prompts": [Chunk(0, 63), Chunk(0, 1), Chunk(0, 65), Chunk(0, 64)],
    "chunk": [Chunk(130, 65)],
    "mixed": [Chunk(999, 1), Chunk(64, 63), Chunk(0, 5), Chunk(63, 2)],
    "padded": [Chunk(60, 9, padded=3), Chunk(0, 0, padded=2), Chunk(0, 2, padded=1)],
}
STEPS = {f"decode-{name}": chunks for name, chunks in DECODE.items()} | {
    f"prefill-{name}": chunks for name, chunks in PREFILL.items()
}

__all__ = [
    "DECODE",
    "PREFILL",
    "STEPS",
    "Chunk",
    "Layout",
    "filled_memory",
    "filled_window",
    "host",
    "integers",
    "layout",
    "normal",
    "poisoned",
    "rounded",
    "spec",
]
