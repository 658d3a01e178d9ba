"""Every size that kernels are launched with, as functions of the problem's shape and the device's limits."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from triton.runtime import driver

from clsa.config import PAGE_SIZE
from clsa.errors import BackendError

MAX_SELECTED = 8192  # of `select`: counts in a scan share 32 bits
MAX_SPLITS = 64  # of an attention: one program merges so many results
_MAX_BUFFERS = 6
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
    last: bool = True


@dataclass(frozen=True, slots=True)
class _Shape:
    """Tiles as they would be with any amount of shared memory. `buffers`: blocks on their way besides the first."""

    block_n: int
    splits: int
    buffers: int
    last: bool
    warps: int = 0  # 0: as many as are usual for the block

    @property
    def num_warps(self) -> int:
        return self.warps or (8 if self.block_n == 128 else 4)


@remembered
def attention_tiles(
    num_queries: int, kv_heads: int, max_keys: int, head_dim: int, itemsize: int, device: Limits
) -> AttentionTiles:
    """Programs that fill the multiprocessors at once, each with a few blocks of keys on their way.

    Measured on an H200 (docs/log.md). There should be as many of them as fit: programs that start while the kernel in
    front still ends pile up where it ends first. The registers decide how many a multiprocessor takes: of blocks of 128
    one, or two if the first keys do not wait, of 64 two, of 32 three.
    """
    row_bytes = 2 * next_power_of_2(head_dim) * itemsize  # K and V
    pairs = max(1, num_queries * kv_heads)
    window = max_keys <= 1024
    room = _room(device)
    if window:
        shape = _of_window(pairs, device.sm_count)
    elif pairs * (max_keys // 128) <= device.sm_count:
        shape = _Shape(128, max_keys // 128, 0, True)  # a block each
    else:
        shape = _of_selection(pairs, max_keys, row_bytes, device.sm_count)
    first = shape.buffers == 0 or shape.last  # the block that is read first counts as a buffer
    block_n = shape.block_n
    while block_n > 16 and (shape.buffers + first) * block_n * row_bytes > room:
        block_n //= 2
    if itemsize == 4:
        block_n = 16  # float32 products are made in registers, not by tensor cores
    shape = replace(shape, block_n=block_n)
    buffers = min(shape.buffers, max(1, room // (block_n * row_bytes) - first))
    return AttentionTiles(
        block_n=block_n,
        splits=max(1, min(shape.splits, MAX_SPLITS, max_keys // block_n)),
        num_warps=shape.num_warps,
        # Of rows that are found by a number, the numbers take as many stages as the rows.
        num_stages=buffers + 1 if window else max(2, 2 * buffers + 1),
        last=shape.last,
    )


@dataclass(frozen=True, slots=True)
class ContextTiles:
    """Of decode attention over whole contexts: keys per block, and programs, which share all work evenly."""

    block_n: int
    programs: int
    num_warps: int
    num_stages: int


@remembered
def context_tiles(pairs: int, head_dim: int, itemsize: int, device: Limits) -> ContextTiles:
    """One program a multiprocessor, with so much on its way that a second one finds no place there.

    Of `pairs` of query and KV head. Where that leaves few multiprocessors idle, the programs are a multiple of the
    pairs or a divisor: then none of them has pieces of two, as long as all sequences are of one length.
    """
    row_bytes = 2 * next_power_of_2(head_dim) * itemsize  # K and V
    if itemsize == 4:  # products are made in registers, not by tensor cores
        return ContextTiles(16, 2 * device.sm_count, 4, 5)
    room, block_n = _room(device), 128
    while block_n > 16 and 2 * block_n * row_bytes > room:
        block_n //= 2
    buffers = min(_MAX_BUFFERS, max(1, room // (block_n * row_bytes)))
    # Page numbers take as many stages as the rows that are found by them.
    return ContextTiles(block_n, _even(pairs, device.sm_count), 8 if block_n == 128 else 4, 2 * buffers + 1)


def _even(pairs: int, sm_count: int) -> int:
    """The highest multiple or divisor of `pairs` that leaves at most a sixteenth idle; all of them if there is none."""
    enough = sm_count * 15 // 16
    for programs in range(sm_count, max(enough, 1) - 1, -1):
        if programs % pairs == 0 or pairs % programs == 0:
            return programs
    return sm_count


def _room(device: Limits) -> int:
    """Bytes of shared memory for the blocks on their way of a program."""
    return device.shared_memory * 3 // 5


def _of_window(pairs: int, sm_count: int) -> _Shape:
    if pairs > 3 * sm_count:  # many small programs hide what each of them waits for
        return _Shape(32, 1, 3, last=False)
    if 2 * pairs > 3 * sm_count:
        return _Shape(64, 1, 2, last=False, warps=8)
    splits = sm_count // (2 * pairs)
    if splits == 1 and 2 * pairs <= sm_count:  # two programs each, one for the own token among them
        return _Shape(64, 3, 1, last=True)
    return _Shape(128, splits, 1, last=True)


def _of_selection(pairs: int, max_keys: int, row_bytes: int, sm_count: int) -> _Shape:
    if pairs > 2 * sm_count:
        return _Shape(64, 1, 0, last=False)
    splits = 2 * sm_count // pairs  # with another program beside it to hide what one waits for
    # Fewer warps do more each, which pays where there are several blocks. But the first keys, before a wait, are
    # registers of theirs: 64 KB of them are as many as four warps have.
    few_warps = 4 * 128 * splits <= max_keys and row_bytes <= 512
    return _Shape(128, splits, 0, last=False, warps=4 if few_warps else 0)
