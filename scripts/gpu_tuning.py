"""Other tile sizes than the default ones, for `gpu_check.py --tune`: each is compared with the default, then timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from gpu_timing import (
    CONTEXT,
    DEVICE,
    ROW,
    WINDOW,
    Call,
    Case,
    Data,
    G,
    I,
    K,
    default_select_tiles,
    dense_calls,
    gather_calls,
    select_calls,
    sliding_calls,
)
from torch import Tensor

from clsa.ops import Selection
from clsa_cuda.kernels.tiles import AttentionTiles, ContextTiles, SelectTiles, limits

Build = Callable[[Data], list[Call]]


def cases() -> Iterator[Case]:
    """Each differs from the default in some sizes; the table shows the best few of each name."""
    yield from early_launch_cases()
    yield from pick_cases()
    for batch in (32, 1, 8):
        yield from attention_cases("gather", batch, K, LIST_SHAPES, lambda b, t: gather_calls(b, "in place", False, t))
    yield from score_cases()
    for batch in (32, 1):
        yield from attention_cases("sliding", batch, WINDOW, SHAPES, sliding_calls)
    for batch in (1, 32):
        yield from context_cases(batch)


def early_launch_cases() -> Iterator[Case]:
    """The default sizes with and without launches before the predecessor has ended."""
    for early in (False, True):
        for batch in (1, 32):
            tiles = default_select_tiles(batch, CONTEXT)
            name = f"tune early launch {early}: {{}} batch {batch}"
            yield Case(
                name.format("select"), "select", 0, None, select_calls(batch, CONTEXT, "all", tiles), early=early
            )
            yield Case(name.format("gather"), "gather", 0, None, gather_calls(batch, "in place", True), early=early)
            yield Case(name.format("sliding"), "sliding", 0, None, sliding_calls(batch, None), early=early)


# What of the default tiles is other: of the lists and their programs, of the groups, of the scores.
SMALL = {"list_tile": 4096, "chosen_tile": 4096, "pick_warps": 8}
PICKS: dict[tuple[int, int], tuple[dict[str, int], ...]] = {
    (1, CONTEXT): (
        *({"group": group} for group in (8, 32)),
        *({"pick_splits": 8, "chosen_tile": tile} for tile in (8192, 4096)),
        *({"pick_splits": 32, "list_tile": 4096, "group": group} for group in (16, 32)),
        *({"pick_splits": splits, "group": group, **SMALL} for splits in (16, 32) for group in (16, 32)),
        *({"splits": splits} for splits in (512, 683, 1024, 2048)),
    ),
    (8, CONTEXT): ({"pick_splits": 8}, {"pick_splits": 32, **SMALL}),
    (32, CONTEXT): (
        *({"pick_splits": splits} for splits in (1, 2, 8)),
        *({"pick_splits": splits, **SMALL} for splits in (4, 8)),
        *({"group": group} for group in (8, 32)),
    ),
    (32, 8192): ({"pick_warps": 8}, {"search_tile": 4096, "pick_splits": 2, "list_tile": 4096}),
    (1, 1 << 20): ({"search_tile": 8192}, {"pick_splits": 16}, {"pick_splits": 64}, {"group": 32}),
}


def pick_cases() -> Iterator[Case]:
    """Whole selections: groups and lists that are quick to pick from may be slow to make."""
    for (batch, length), others in PICKS.items():
        default = default_select_tiles(batch, length)
        reference = select_calls(batch, length, "all", default)
        for other in others:
            tiles = replace(default, **other)
            name = f"tune select batch {batch} context {length // 1024}K"
            yield Case(name, "select", 0, None, select_calls(batch, length, "all", tiles), tiles, True, reference)


def score_cases() -> Iterator[Case]:
    # warps, stages, pages of a step
    shapes = ((4, 1, 1), (4, 2, 1), (4, 3, 1), (4, 4, 1), (8, 1, 1), (8, 3, 1), (8, 4, 1), (2, 3, 1))
    shapes += ((8, 1, 2), (8, 2, 2), (8, 3, 2), (4, 1, 2), (4, 2, 2), (4, 3, 2))
    for batch in (1, 32):
        default = default_select_tiles(batch, CONTEXT)
        reference = select_calls(batch, CONTEXT, "score", default)
        for (warps, stages, pages), per_sm in itertools.product(shapes, (3, 4, 6, 8, 16)):
            splits = max(1, per_sm * limits(DEVICE).sm_count // batch)
            tiles = replace(default, splits=splits, score_warps=warps, score_stages=stages, score_pages=pages)
            build = select_calls(batch, CONTEXT, "score", tiles)
            yield Case(
                f"tune score batch {batch}", "select", batch * CONTEXT * I * 2, None, build, tiles, True, reference
            )


# (keys of a block, warps, stages) that fit the shared memory.
SHAPES = ((32, 4, 3), (32, 4, 5), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 4), (128, 8, 3))
# Row numbers are loaded a stage before their rows: every second stage more is a buffer more.
LIST_SHAPES = ((32, 4, 3), (32, 4, 5), (32, 4, 7), (64, 4, 3), (64, 4, 5), (64, 8, 5), (128, 8, 3))


def attention_cases(
    kernel: str, batch: int, max_keys: int, shapes: tuple[tuple[int, ...], ...], calls: Callable[[int, Any], Build]
) -> Iterator[Case]:
    per_sm = (0.25, 0.5, 1, 2, 4) if batch == 1 else (1, 2, 3, 4, 6, 8)
    for block_n, warps, stages in shapes:
        wanted = {int(n * limits(DEVICE).sm_count) // (batch * G) for n in per_sm}
        most = min(128, max_keys // block_n)
        for splits in sorted({min(most, max(1, n)) for n in wanted}):
            tiles = AttentionTiles(block_n, splits, warps, stages)
            size = batch * max_keys * ROW
            name = f"tune {kernel} batch {batch}"
            yield Case(name, kernel, size, None, calls(batch, tiles), tiles, True, calls(batch, None))


def context_cases(batch: int) -> Iterator[Case]:
    shapes = ((128, 1, 8, 5), (128, 1, 4, 5), (64, 1, 8, 9), (64, 2, 4, 7), (32, 3, 4, 9))
    for (block_n, per_sm, warps, stages), idle in itertools.product(shapes, (0, 4)):
        tiles = ContextTiles(block_n, per_sm * (limits(DEVICE).sm_count - idle), warps, stages)
        build, size = dense_calls(batch, "kernel", tiles), batch * CONTEXT * ROW
        yield Case(f"tune dense batch {batch}", "dense", size, None, build, tiles, True, dense_calls(batch, "kernel"))


def compare(got: Any, want: Any) -> None:
    """Raise if a result is not the default's, but for rounding: that may exchange a few of equal scores."""
    if isinstance(want, Selection):
        got, want = (got.rows, got.positions, got.lengths), (want.rows, want.positions, want.lengths)
    if isinstance(want, tuple):
        for a, b in zip(got, want, strict=True):
            if a.shape == b.shape:  # the maxima of other groups have another
                compare(a, b)
    elif want.is_floating_point():
        error = float((got.double() - want.double()).norm() / want.double().norm())
        assert error < 1e-2, f"differs from the default by {error:.3g}"
    else:
        assert close_integers(got, want), "differs from the default"


def close_integers(got: Tensor, want: Tensor) -> bool:
    return float(((got.long() - want.long()).abs() > 1 << 14).float().mean()) < 0.02


def compile_key(case: Case) -> Any:
    """Cases with the same key run the same kernel."""
    tiles = case.tiles
    if isinstance(tiles, ContextTiles):
        return case.kernel, replace(tiles, programs=1), case.name
    if isinstance(tiles, AttentionTiles):
        return case.kernel, replace(tiles, splits=min(2, tiles.splits)), "compact" in case.name
    if isinstance(tiles, SelectTiles) and case.tuned:
        kind, context = case.name.split()[1], case.name.split()[-1]
        return kind, replace(tiles, splits=0), kind == "score" or context
    return case.name
