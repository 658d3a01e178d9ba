"""The launch of decode attention: of `attend`, or of `attend_float8` where it takes what is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clsa.errors import BackendError
from clsa.ops import HeadNorms
from clsa_cuda.kernels.attend import _attend_kernel
from clsa_cuda.kernels.attend_float8 import _attend_float8_kernel
from clsa_cuda.kernels.merge import merged
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters
from clsa_cuda.kernels.tiles import AttentionTiles, launch_options, limits, next_power_of_2
from clsa_cuda.plain import FLOAT8


@dataclass(frozen=True, slots=True)
class Arrival:
    """What makes a projected token one of the ring's."""

    norms: HeadNorms
    frequencies: Tensor  # [D / 2] float32
    mapping: Tensor  # [T] int32 row of the ring, -1: nowhere


def attend_rows(
    source: str,
    size: int,
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    rows: Tensor,
    lengths: Tensor,
    tiles: AttentionTiles,
    arrival: Arrival | None = None,
    fresh: bool = True,
) -> Tensor:
    """Launch the kernel: see its arguments. q [T, H, D], kv [N, G, D] each, own [T, G, D] each -> [T, H, D].

    `fresh` False promises that the launch in front made q and `own` at most and waited for whatever made the rest. Then
    the first keys are read before that launch has ended.
    """
    num_queries, num_heads, head_dim = q.shape
    out = torch.empty(num_queries, num_heads, head_dim, dtype=q.dtype, device=q.device)
    if num_queries == 0:
        return out
    own = own or kv
    check_inputs(q, (*kv, *own), rows, lengths)
    kv_heads = kv[0].shape[1]
    splits = tiles.splits + (source == "ring" and tiles.splits > 1)  # and one for the own token
    pairs, repeat = num_queries * kv_heads, num_heads // kv_heads
    assert splits == 1 or pairs <= MAX_ARRIVALS
    scratch = (num_queries, num_heads, splits if splits > 1 else 0)
    partial = torch.empty(*scratch, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(scratch, dtype=torch.float32, device=q.device)
    device = limits(q.device)
    scale = math.log2(math.e) / math.sqrt(head_dim)
    words = source != "ring" and in_words(q, kv)
    constants = {
        "D": head_dim,
        "BLOCK_D": max(32 if words else 16, next_power_of_2(head_dim)),  # products are over 16 numbers at least
        "REPEAT": repeat,
        "KV_HEADS": kv_heads,
        "BLOCK_H": max(16, next_power_of_2(repeat)),
        "BLOCK_N": tiles.block_n,
        "SPLIT": splits > 1,
        "SOURCE": source,
        "SIZE": size,
        "STAGES": tiles.num_stages,
        "FRESH": fresh,
        "MERGED": merged(splits, pairs * splits, repeat, head_dim, tiles.num_warps, device.sm_count),
        "OVERLAP": device.early_launch,
        "num_warps": tiles.num_warps,
        **launch_options(device),
    }
    counters = arrival_counters(q.device)
    shared = (rows, lengths, out, partial, sums, counters, num_heads, q.stride(0))
    if words:
        k, v = (x.view(torch.int16) for x in kv)
        _attend_float8_kernel[pairs, splits](
            q,
            k,
            v,
            *shared,
            k.stride(0),
            v.stride(0),
            rows.stride(0),
            scale,
            splits,
            NATIVE=q.is_cuda,
            **constants,
        )
        return out
    _attend_kernel[pairs, splits](
        q,
        *kv,
        *own,
        *((arrival.norms.q, arrival.norms.k, arrival.frequencies, arrival.mapping) if arrival else (q, q, q, q)),
        *shared,
        kv[0].stride(0),
        kv[1].stride(0),
        own[0].stride(0),
        own[1].stride(0),
        rows.stride(0),
        scale,
        arrival.norms.eps if arrival else 0.0,
        splits,
        WINDOW=arrival is not None,
        LAST=tiles.last,
        **constants,
    )
    return out


def check_inputs(q: Tensor, kv: tuple[Tensor, ...], rows: Tensor, lengths: Tensor) -> None:
    """Args: `kv` are keys and values in turn, of a memory, then perhaps of the queries' own tokens."""
    names = ("k", "v", "the token's own k", "the token's own v")
    for name, x in zip(names, kv, strict=False):
        if x.dtype not in (q.dtype, FLOAT8):
            raise BackendError(f"decode attention needs q and {name} in one dtype, got {q.dtype} and {x.dtype}")
    head_dim = q.shape[2]
    assert all(x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == head_dim) for x in (q, *kv))
    assert rows.stride(-1) == 1 and lengths.is_contiguous()


def in_words(q: Tensor, kv: tuple[Tensor, Tensor]) -> bool:
    """Whether rows can be read as words of two E4M3 numbers. Queries in float32 would not fit a float16."""
    in_float8 = all(x.dtype == FLOAT8 and x.stride(0) % 2 == 0 and x.data_ptr() % 2 == 0 for x in kv)
    return in_float8 and q.itemsize == 2 and q.shape[2] % 2 == 0
