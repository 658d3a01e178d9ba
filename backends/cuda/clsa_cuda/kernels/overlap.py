"""Programmatic dependent launch: a kernel gets going while the one in front of it still finishes (sm_90 and later).

Every kernel that is launched with `launch_pdl` must call `wait` in all its programs before it reads what a kernel
before it wrote, and before it writes anything at all. What no kernel writes, the weights, may be fetched earlier.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

MAX_ARRIVALS = 1 << 16  # counters of one launch


@functools.cache
def arrival_counters(device: torch.device) -> Tensor:
    """Zeros [MAX_ARRIVALS] int32 that every launch leaves as zeros, to find out which program is the last of a tile.

    Kernels that use them come one after the other, as those of one stream do.
    """
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)


@functools.cache
def meeting_counter(device: torch.device, num_programs: int) -> Tensor:
    """[1] int64 that counts the arrivals at all meetings of launches of so many programs, of one stream."""
    return torch.zeros(1, dtype=torch.int64, device=device)


@triton.jit
def meet(counter):
    """Wait until all programs of this launch are here; what they wrote before can be read after it.

    All of them must be on the GPU at once, and every launch that uses the counter has as many.
    """
    tl.debug_barrier()  # all of this program's stores come before its arrival
    programs = tl.num_programs(0).to(tl.int64)
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    target = (before // programs + 1) * programs
    while tl.atomic_add(counter, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until everything in front of this kernel is done; from here on the next kernel may get going.

    Letting it go before the wait was slower: several kernels then wait at once, in the room of those that work.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines at these addresses, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
