"""Temporaries of bounded size: work cut into blocks that run one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from clsa.ops import Queries

# Largest temporary of an op. An op holds a handful of them at a time, together less than 256 MB. On CPU the C allocator
# maps and clears blocks of 32 MB and more anew at every use, which costs ten times what filling them does.
BLOCK_BYTES = 24 << 20


def blocks(start: int, stop: int, bytes_per_row: int, at_most: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut rows start..stop into blocks whose largest temporary, of so many bytes per row, stays in bounds."""
    length = max(1, BLOCK_BYTES // max(1, bytes_per_row))
    length = length if at_most is None else min(length, at_most)
    return ((first, min(first + length, stop)) for first in range(start, stop, length))


def spans(queries: Queries) -> Iterator[tuple[int, int, int]]:
    """Sequence, first row, last row + 1 of every sequence that asks something."""
    for b, (start, stop) in enumerate(zip(queries.cu_seqlens, queries.cu_seqlens[1:], strict=False)):
        if start < stop:
            yield b, start, stop


def after(parts: Sequence[mx.array], x: mx.array) -> mx.array:
    """`x`, once the last of `parts` is there.

    Left alone, MLX starts independent blocks side by side, with all their temporaries at once.
    """
    return mx.depends(x, parts[-1]) if parts else x


def join(parts: Sequence[mx.array], axis: int = 0) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)
