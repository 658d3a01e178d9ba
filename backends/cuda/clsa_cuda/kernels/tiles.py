"""Every size that kernels are launched with, as functions of the problem's shape and the device's limits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from triton.runtime import driver

from clsa.config import PAGE_SIZE
from clsa.errors import BackendError

MAX_SELECTED = 8192  # of `select`: counts in a scan share 32 bits
MAX_SPLITS = 64  # of an attention: one program merges so many results
_SEARCH_TILE = 16384  # maxima that a program searches at once: 32 in each thread of 16 warps
_LIST_TILE = 8192  # tokens that a program goes through at once
_MAX_PICK_SPLITS = 32  # programs of a query
_SCORE_PROGRAMS = 6  # that fit a multiprocessor at once, with three 16 KB pages of bfloat16 keys in flight each
_MIN_GROUP, _MAX_GROUP = 4, PAGE_SIZE
EARLY_LAUNCH = True


# For functions from sizes to tiles: working them out takes as long as a launch, and a step's layers ask for the same.
remembered = functools.lru_cache(maxsize=1024)


@dataclass(frozen=True, slots=True)
class Limits:
    """What of a device decides sizes."""

    sm_count: int
    shared_memory: int  # bytes one program can have
    early_launch: bool = False  # whether a kernel may be launched before the one it waits for has ended (sm_90)
    hopper: bool = False  # whether a group of warps multiplies from shared memory (sm_90 and no other)


@functools.cache
def limits(device: torch.device) -> Limits:
    """Of a CUDA device; of a small made-up one for the CPU, where kernels run in Triton's interpreter."""
    if device.type != "cuda":
        return Limits(sm_count=2, shared_memory=64 << 10)
    properties = driver.active.utils.get_device_properties(device.index or 0)
    major = torch.cuda.get_device_capability(device)[0]
    return Limits(
        properties["multiprocessor_count"],
        properties["max_shared_mem"],
        early_launch=EARLY_LAUNCH and major >= 9,
        hopper=major == 9,
    )


def launch_options(device: Limits) -> dict[str, bool]:
    """Of a kernel that waits for its predecessors by itself where `device.early_launch`."""
    return {"launch_pdl": True} if device.early_launch else {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` is for kernels too, and takes ten times as long on the host.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def previous_power_of_2(n: int) -> int:
    return 1 << max(1, n).bit_length() - 1


# -- select ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SelectTiles:
    """See `select`: `group` tokens share one maximum; tiles are how many values a program holds."""

    group: int
    splits: int  # programs that score one query
    score_warps: int
    score_stages: int
    search_tile: int  # maxima, or all tokens if they are no more
    list_tile: int  # tokens, of which a program lists the best
    chosen_tile: int  # tokens on all lists of a query
    pick_splits: int  # programs that list for one query
    pick_warps: int
    score_pages: int = 1  # that a program scores at once


@remembered
def select_tiles(num_queries: int, max_pages: int, k: int, device: Limits) -> SelectTiles:
    """Groups with 2 to 4 k maxima: few to search, and enough of them that few tokens reach the best k."""
    if k > MAX_SELECTED:
        raise BackendError(f"the select kernel takes index_topk up to {MAX_SELECTED}, got {k}; use a smaller one")
    capacity = max_pages * PAGE_SIZE
    kept = next_power_of_2(k)
    group = _MIN_GROUP
    while group < _MAX_GROUP and 4 * kept * group < capacity:
        group *= 2
    # One wave of small programs that each stream a few pages: loads in flight come from their number.
    splits = max(1, min(max_pages, _SCORE_PROGRAMS * device.sm_count // max(1, num_queries)))
    pick_splits = min(device.sm_count // max(1, num_queries), capacity // _LIST_TILE)
    return SelectTiles(
        group=group,
        splits=splits,
        score_warps=4,
        score_stages=3,
        search_tile=_SEARCH_TILE,
        list_tile=_LIST_TILE,
        chosen_tile=_LIST_TILE,
        pick_splits=min(_MAX_PICK_SPLITS, previous_power_of_2(pick_splits)),
        pick_warps=16,
    )


# -- attention ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """Of one decode attention: keys per block, programs per (query, KV head), warps and pipeline depth.

    The keys that a program reads first may wait in registers until all others were used (`last`), so that nothing waits
    for them; where a program reads many blocks, they would only be in the way of other programs.
    """

    block_n: int
    splits: int
    num_warps: int
    num_stages: int
    pack: int = 1  # KV heads of a program
    last: bool = True


@remembered
def attention_tiles(
    num_queries: int, kv_heads: int, max_keys: int, head_dim: int, itemsize: int, device: Limits
) -> AttentionTiles:
    """Programs that fill the multiprocessors at once, each with a few blocks of keys on their way.

    Measured on an H200 (docs/log.md). The registers decide how many programs a multiprocessor takes: of blocks of 128
    one, or two if the first keys do not wait, of 64 two, of 32 three. There should be as many of them as fit: programs
    that start while the kernel in front still ends pile up where it ends first.
    """
    row_bytes = 2 * next_power_of_2(head_dim) * itemsize  # K and V
    pairs = max(1, num_queries * kv_heads)
    ring = max_keys <= 1024
    room = device.shared_memory * 3 // 5
    block_n, buffers, last, warps = 128, 0, True, 0  # no warps: as many as are usual for the block
    alone = device.sm_count // pairs  # splits if a multiprocessor takes one program
    alone_is_best = 4 <= alone <= MAX_SPLITS and 16 * alone * pairs >= 15 * device.sm_count and 256 * row_bytes <= room
    if ring and pairs > 3 * device.sm_count:  # many small programs hide what each of them waits for
        block_n, wanted, buffers, last = 32, 1, 3, False
    elif ring and 2 * pairs > 3 * device.sm_count:
        block_n, wanted, buffers, last, warps = 64, 1, 2, False, 8
    elif ring:
        wanted, buffers = device.sm_count // (2 * pairs), 1
        if wanted == 1 and 4 * pairs <= 2 * device.sm_count:  # two programs each, one for the own token among them
            block_n, wanted = 64, 3
    elif pairs * (max_keys // 128) <= device.sm_count:
        wanted = max_keys // 128  # a block each
    elif max_keys > 2 * MAX_SELECTED and alone_is_best:
        wanted, buffers, last = alone, 2, False  # so much shared memory that no two of them share a multiprocessor
    elif max_keys > 2 * MAX_SELECTED:
        wanted, three = (min(MAX_SPLITS, n * device.sm_count // pairs) for n in (2, 3))
        block_n, buffers = 64, 2
        if 2 * three >= 3 * wanted:  # fills its places as well
            block_n, wanted = 32, three
    elif pairs <= 2 * device.sm_count:  # with another program beside it to hide what one waits for
        wanted, last = 2 * device.sm_count // pairs, False
        # Fewer warps do more each, which pays where there are several blocks. But the first keys, before a wait, are
        # registers of theirs: 64 KB of them are as many as four warps have.
        warps = 4 if 4 * 128 * wanted <= max_keys and row_bytes <= 512 else 0
    else:
        block_n, wanted, last = 64, 1, False
    first = buffers == 0 or last  # the block that is read first counts as a buffer
    while block_n > 16 and (buffers + first) * block_n * row_bytes > room:
        block_n //= 2
    if itemsize == 4:
        block_n = 16  # float32 products are made in registers, not by tensor cores
    buffers = min(buffers, max(1, room // (block_n * row_bytes) - first))
    return AttentionTiles(
        block_n=block_n,
        splits=max(1, min(wanted, MAX_SPLITS, max_keys // block_n)),
        num_warps=warps or (8 if block_n == 128 else 4),
        # Of rows that are found by a number, the numbers take as many stages as the rows.
        num_stages=buffers + 1 if ring else max(2, 2 * buffers + 1),
        last=last,
    )
