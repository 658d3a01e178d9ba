"""What kernels read from a memory may be float8 E4M3."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(x, like):
    """`x`, E4M3 or not, in the dtype of `like`; by way of float32, the only one from E4M3 to bfloat16 before sm_90."""
    return x.to(tl.float32).to(like.dtype)
