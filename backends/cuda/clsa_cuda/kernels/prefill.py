"""What the kernels of packed chunks share: tiles of queries, pages of keys, a step of the running softmax.

A tile is BLOCK_M rows of one sequence, and a row is one head of one token, token after token: the heads of a group
read the same keys, so they lie in the same tile, and a sequence that asks with one token takes one tile a KV head.
Which tile is whose follows from `cu_seqlens` on the host. What a query sees follows from its position on the device.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa.errors import BackendError
from clsa.ops import Queries
from clsa_cuda.kernels.tiles import Limits, next_power_of_2, remembered


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Of one attention of packed chunks: rows of a tile, keys of a block, warps, pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # of a thread; None leaves it to the compiler


@remembered
def prefill_tiles(head_dim: int, itemsize: int, device: Limits, window: bool) -> PrefillTiles:
    """Sums of a tile in a quarter of the registers, and blocks of keys that fit the shared memory beside its queries.

    Measured on an H200 (docs/log.md): a window is so short that two programs of small blocks on a multiprocessor are
    faster than one, and everything before a query is read best in large blocks.

    The sizes follow from the device and the model alone, so that a query's result never depends on its chunk.
    """
    padded = max(16, next_power_of_2(head_dim))
    if itemsize == 4:  # products in registers, not by tensor cores: small operands
        return PrefillTiles(block_m=16, block_n=16, num_warps=4, num_stages=1)
    block_m = max(16, min(128, (1 << 14) // padded))
    block_n, stages = (32, 3) if window else (128, 2) if padded <= 128 else (64, 2)
    while stages > 1 and (block_m + 2 * stages * block_n) * padded * itemsize > device.shared_memory:
        stages -= 1
    while block_n > 16 and (block_m + 2 * stages * block_n) * padded * itemsize > device.shared_memory:
        block_n //= 2
    maxnreg = 128 if window and block_m == 128 and padded <= 128 else None
    return PrefillTiles(block_m, block_n, num_warps=8 if block_m == 128 else 4, num_stages=stages, maxnreg=maxnreg)


def asks_many(queries: Queries) -> bool:
    """Whether some sequence asks with more than one token."""
    return any(stop - start > 1 for start, stop in itertools.pairwise(queries.cu_seqlens))


@functools.lru_cache(maxsize=64)
def query_tiles(cu_seqlens: tuple[int, ...], rows_per_token: int, block_m: int, device: torch.device) -> Tensor:
    """[n, 4] int32: sequence, first row of the tile in it, its first token in the step, its tokens.

    The last tile of a sequence, which sees most, comes first. Layers share the result: it is uploaded once a step.
    """
    tiles = [
        (b, row, start, stop - start)
        for b, (start, stop) in enumerate(itertools.pairwise(cu_seqlens))
        for row in reversed(range(0, (stop - start) * rows_per_token, block_m))
    ]
    host = torch.tensor(tiles, dtype=torch.int32).view(-1, 4)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def check_heads(q: Tensor, others: dict[str, Tensor], *dtypes: torch.dtype) -> None:
    """That all are [.., heads, D] with the heads of a token side by side; others of q's dtype or one of `dtypes`."""
    for name, x in others.items():
        if x.dtype not in (q.dtype, *dtypes):
            raise BackendError(f"prefill attention needs q and {name} in one dtype, got {q.dtype} and {x.dtype}")
    for x in (q, *others.values()):
        assert x.numel() == 0 or (x.stride(2) == 1 and x.stride(1) in (q.shape[2], x.stride(0)))


@triton.jit
def load_tile(tiles, REPEAT: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's tile: its sequence and the first token of that; by row, the token in the chunk, the head of the
    group, and whether it is one of the sequence."""
    entry = tiles + tl.program_id(0) * 4
    row = tl.load(entry + 1) + tl.arange(0, BLOCK_M)
    token = row // REPEAT
    return tl.load(entry).to(tl.int64), tl.load(entry + 2).to(tl.int64), token, row % REPEAT, token < tl.load(entry + 3)


@triton.jit
def page_rows(table, start, i, mask, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Physical rows of positions i = start .. start + BLOCK_N - 1, start a multiple of BLOCK_N; 0 where masked."""
    if BLOCK_N <= PAGE:
        return tl.load(table + start // PAGE).to(tl.int64) * PAGE + start % PAGE + tl.arange(0, BLOCK_N)
    return tl.load(table + i // PAGE, mask=mask, other=0).to(tl.int64) * PAGE + i % PAGE


@triton.jit
def attend_block(q, k, v, visible, acc, total, highest, scale, MASKED: tl.constexpr):
    """One more block of keys: q [M, D], k and v [N, D], visible [M, N] if MASKED; returns acc, total, highest."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # -inf - -inf is NaN
    weights = tl.exp2(scores * scale - reference[:, None])
    keep = tl.exp2(highest - reference)
    total = total * keep + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return acc, total, new_highest
