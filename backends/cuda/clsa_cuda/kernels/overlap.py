"""Programmatic dependent launch: a kernel gets going while the one in front of it still finishes (sm_90 and later).

Every kernel that is launched with `launch_pdl` must call `wait` in all its programs before it reads what a kernel
before it wrote, and before it writes anything at all. Earlier it may read what no kernel writes, such as weights, and
what was written at least two launches ago: the kernel in front let it start after its own wait.
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


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until everything in front of this kernel is done; from here on the next kernel may get going.

    Letting it go before the wait was slower: several kernels then wait at once, in the room of those that work.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
