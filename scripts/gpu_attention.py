"""Checks of `gpu_check.py`: the decode attention kernels at real sizes against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from gpu_correctness import DEVICE, DTYPES, LONG, Check, generator, normal, queries_of, visible_rows
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.ops import Memory, Selection, Window
from clsa_cuda.kernels import dense_attention, gather_attention, sliding_attention
from clsa_cuda.kernels.tiles import AttentionTiles, ContextTiles

# Relative RMS error against float64; the values of tests/tolerance.py.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 5e-6}
HEADS = [(20, 4, 128), (4, 4, 64), (8, 1, 80), (6, 2, 96), (16, 1, 128), (8, 2, 256)]


def attend64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query in float64: [H, D], [S, G, D] twice -> [H, D]."""
    if len(k) == 0:
        return torch.zeros_like(q, dtype=torch.float64)
    groups = q.double().unflatten(0, (k.shape[1], -1))  # [G, R, D]
    scores = torch.einsum("grd,sgd->grs", groups, k.double()) / q.shape[1] ** 0.5
    return torch.einsum("grs,sgd->grd", scores.softmax(-1), v.double()).flatten(0, 1)


def close(got: Tensor, want: Tensor, case: object) -> None:
    assert got.isfinite().all(), f"{case}: not finite"
    error = float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
    assert error <= TOLERANCE[got.dtype], f"{case}: relative error {error:.3g} > {TOLERANCE[got.dtype]:g}"


def several_tiles(heads: tuple[int, int, int]) -> list[AttentionTiles]:
    if heads != HEADS[0]:
        return [AttentionTiles(16, 3, 4, 3)]
    return [AttentionTiles(16, splits, 4, 3) for splits in (1, 3, 5, 64)]


def gather_checks() -> Iterator[Check]:
    for name, dtype in DTYPES.items():
        for heads in HEADS if name == "bf16" else HEADS[:1]:
            yield f"gather {name} {heads}", lambda dtype=dtype, heads=heads: gather(dtype, heads, 2048, 1 << 16)
    yield "gather bf16 one query", lambda: gather(torch.bfloat16, HEADS[0], 2048, 1 << 16, batch=1)
    yield "gather bf16 odd k", lambda: gather(torch.bfloat16, HEADS[0], 777, 1 << 16)
    yield "gather bf16 many", lambda: gather(torch.bfloat16, HEADS[0], 256, 1 << 16, batch=300)
    yield "gather bf16 high rows", lambda: gather(torch.bfloat16, HEADS[0], 2048, 5_000_000)


def gather(dtype: torch.dtype, heads: tuple[int, int, int], k: int, num_rows: int, batch: int = 32) -> None:
    """Ragged selections; half of the rows are never chosen and hold NaN. In place, compact, and with other splits."""
    H, G, D = heads
    g = generator(7)
    lengths = torch.randint(0, k + 1, (batch,), generator=g, device=DEVICE, dtype=torch.int32)
    lengths[0] = k
    lengths[1:5] = torch.tensor([0, 1, k - 1, 64], device=DEVICE)[: batch - 1]
    rows = torch.randint(num_rows // 2, (batch, k), generator=g, device=DEVICE, dtype=torch.int32) * 2 + 1
    rows[torch.arange(k, device=DEVICE) >= lengths[:, None]] = -1
    kv = [normal(g, num_rows, G, D, dtype=dtype) for _ in range(2)]
    for x in kv:
        x[::2] = float("nan")
    q = normal(g, batch, H, D, dtype=dtype)
    memory, selection = Memory(*kv, None), Selection(rows, rows, lengths)
    want = torch.stack([attend64(q[b], *(x[rows[b, : int(lengths[b])].long()] for x in kv)) for b in range(batch)])
    close(gather_attention.gather_attention(q, memory, selection), want, "in place")
    close(gather_attention.compact_attention(q, gather_attention.compact_rows(memory, selection)), want, "compact")
    for tiles in several_tiles(heads):
        for _ in range(2):
            close(gather_attention.gather_attention(q, memory, selection, tiles), want, tiles)


def dense_checks() -> Iterator[Check]:
    for name, dtype in DTYPES.items():
        for heads in HEADS if name == "bf16" else HEADS[:1]:
            lengths = [20_000, 0, 1, 64, 4097, 65]
            yield f"dense {name} {heads}", lambda dtype=dtype, heads=heads, n=lengths: dense(dtype, heads, n, 1 << 15)
    yield "dense bf16 long", lambda: dense(torch.bfloat16, HEADS[0], [LONG, 100_001, 0, 3], LONG)
    yield "dense bf16 one query", lambda: dense(torch.bfloat16, HEADS[0], [LONG - 1], LONG)


def dense(dtype: torch.dtype, heads: tuple[int, int, int], lengths: list[int], context: int) -> None:
    H, G, D = heads
    g = generator(8)
    num_pages = sum(-(-n // PAGE_SIZE) for n in lengths) + 5
    queries = queries_of(lengths, torch.randperm(num_pages, generator=g, device=DEVICE), context // PAGE_SIZE)
    kv = [torch.full((num_pages * PAGE_SIZE, G, D), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    for b, length in enumerate(lengths):
        for x in kv:
            x[visible_rows(queries, b)] = normal(g, length, G, D, dtype=dtype)
    q = normal(g, len(lengths), H, D, dtype=dtype)
    q[queries.positions < 0] = float("nan")
    want = []
    for b in range(len(lengths)):
        rows = visible_rows(queries, b)
        want.append(attend64(q[b], kv[0][rows], kv[1][rows]) if len(rows) else torch.zeros_like(q[b]).double())
    for tiles in (None, *(ContextTiles(16, programs, 4, 3) for programs in (1, 50, 132, 30_000))):
        got = dense_attention.dense_attention(q, Memory(*kv, None), queries, tiles)
        for b in range(len(lengths)):
            close(got[b], want[b], (b, tiles))


def sliding_checks() -> Iterator[Check]:
    for name, dtype in DTYPES.items():
        for size in (512, 1, 100) if name == "bf16" else (512,):
            yield f"sliding {name} W={size}", lambda dtype=dtype, size=size: sliding(dtype, HEADS[0], size)
    for heads in HEADS[1:]:
        yield f"sliding bf16 {heads}", lambda heads=heads: sliding(torch.bfloat16, heads, 512)


def sliding(dtype: torch.dtype, heads: tuple[int, int, int], size: int) -> None:
    H, G, D = heads
    g = generator(9)
    positions = [0, 5, 511, 512, 513, 100_000, -1, 1023, 77] * 4
    batch = len(positions)
    queries = queries_of([p + 1 for p in positions], torch.zeros(1 << 16, dtype=torch.int32), 1600)
    slots = torch.randperm(batch + 3, generator=g, device=DEVICE)[:batch].int()
    queries = replace(queries, window_slots=slots)
    ring = [torch.full(((batch + 3) * size, G, D), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    own = [normal(g, batch, G, D, dtype=dtype) for _ in range(2)]
    q = normal(g, batch, H, D, dtype=dtype)
    want = []
    for b, p in enumerate(positions):
        before = torch.arange(max(0, p - size + 1), max(0, p), device=DEVICE) % size + int(slots[b]) * size
        for x in ring:
            x[before] = normal(g, len(before), G, D, dtype=dtype)
        seen = [torch.cat([x[before], new[b : b + 1]])[: None if p >= 0 else 0] for x, new in zip(ring, own)]
        want.append(attend64(q[b], *seen))
    for x in (q, *own):
        x[queries.positions < 0] = float("nan")  # a padded row may hold anything
    for tiles in (None, *several_tiles(heads)):
        got = sliding_attention.sliding_attention(q, *own, Window(*ring, size), queries, tiles)
        close(got, torch.stack(want), (size, tiles))


GROUPS: dict[str, Callable[[], Iterator[Check]]] = {
    "gather": gather_checks,
    "dense": dense_checks,
    "sliding": sliding_checks,
}
