"""Other tile sizes than the default ones, for `gpu_check.py --tune`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from gpu_timing import CONTEXT, DEVICE, ROW, Case, I, K, default_select_tiles, dense_calls, gather_calls, select_calls

from clsa_cuda.kernels.tiles import AttentionTiles, limits


def cases() -> Iterator[Case]:
    """Each differs from the default in some sizes; the table shows the best few of each name."""
    yield from select_cases()
    yield from gather_cases()
    yield from dense_cases()


def select_cases() -> Iterator[Case]:
    for batch in (1, 32):
        default = default_select_tiles(batch, CONTEXT)
        size = batch * CONTEXT * I * 2
        for warps, stages in ((4, 1), (4, 2), (4, 3), (4, 4), (2, 3), (8, 3)):
            for per_sm in (3, 4, 6, 7, 8, 14, 28):
                splits = max(1, per_sm * limits(DEVICE).sm_count // batch)
                tiles = replace(default, splits=splits, score_warps=warps, score_stages=stages)
                build = select_calls(batch, CONTEXT, "score", tiles)
                yield Case(f"tune score batch {batch}", "select", size, None, build, tiles, True)
        for warps in (8, 16, 32):
            for group in (4, 8, 16):
                maxima = CONTEXT // group
                tiles = replace(default, group=group, maxima_tile=maxima, chosen_tile=K * group, pick_warps=warps)
                build = select_calls(batch, CONTEXT, "pick", tiles)
                yield Case(f"tune pick batch {batch}", "select", 0, None, build, tiles, True)


# (keys of a block, warps, stages). Row numbers are loaded before rows: every second stage more is a buffer more.
SHAPES = ((32, 4, 3), (32, 4, 5), (32, 4, 7), (64, 4, 3), (64, 4, 5), (64, 4, 7), (64, 8, 5), (128, 8, 3))


def gather_cases() -> Iterator[Case]:
    for batch, splits in ((1, (8, 16, 32)), (8, (4, 8, 16)), (32, (2, 4, 8, 16))):
        for how in ("in place", "compact"):
            for (block_n, warps, stages), s in itertools.product(SHAPES, splits):
                if how == "compact" and stages > 5:
                    continue  # no row numbers to load: that many buffers do not fit
                tiles = AttentionTiles(block_n, s, warps, stages)
                build = gather_calls(batch, how, False, tiles)
                yield Case(f"tune gather {how} batch {batch}", "gather", batch * K * ROW, None, build, tiles, True)


def dense_cases() -> Iterator[Case]:
    for batch, splits in ((1, (32, 64)), (8, (8, 16, 32)), (32, (2, 4, 8))):
        for (block_n, warps, stages), s in itertools.product(SHAPES[2:], splits):
            tiles = AttentionTiles(block_n, s, warps, stages)
            build = dense_calls(batch, "kernel", tiles)
            yield Case(f"tune dense batch {batch}", "dense", batch * CONTEXT * ROW, None, build, tiles, True)
