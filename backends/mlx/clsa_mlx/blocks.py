"""Temporaries of bounded size: work cut into blocks that run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mlx.core as mx

# Largest temporary of an op. Every op holds a handful of them at a time, so that together they stay near 256 MB. On
# CPU the C allocator reuses blocks up to this size; larger ones are mapped and cleared anew at every use, which
# costs ten times as much as filling them.
BLOCK_BYTES = 32 << 20


def block_len(bytes_per_row: int) -> int:
    """Rows of a block whose largest temporary takes this many bytes per row."""
    return max(1, BLOCK_BYTES // max(1, bytes_per_row))


def ranges(start: int, stop: int, block: int) -> Iterable[tuple[int, int]]:
    return ((i, min(i + block, stop)) for i in range(start, stop, block))


def in_turn(calls: Iterable[Callable[[Callable[[mx.array], mx.array]], mx.array]]) -> mx.array:
    """Concatenate the results of calls along axis 0; each runs after the one before it.

    MLX would start independent calls side by side, all their temporaries at once. Each call is given a function that
    it must apply to the arrays it starts from.
    """
    parts: list[mx.array] = []
    for call in calls:
        last = parts[-1] if parts else None

        def after(x: mx.array, last: mx.array | None = last) -> mx.array:
            return x if last is None else mx.depends(x, last)

        parts.append(call(after))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)
