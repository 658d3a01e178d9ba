"""What kernels read, of a memory or of weights, may be float8 E4M3."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(x, like):
    """`x`, E4M3 or not, in the dtype of `like`; by way of float32, the only one from E4M3 to bfloat16 before sm_90."""
    return x.to(tl.float32).to(like.dtype)


@triton.jit
def halves(words):
    """[..., W] int32 as twice [..., W] int16: the lower halves, the upper halves."""
    return words.to(tl.int16), (words >> 16).to(tl.int16)


@triton.jit
def unpacked(words, like):
    """`words` [N, W] int32 of four E4M3 numbers each: of every word numbers 0 and 2, and numbers 1 and 3.

    Both are [N, 2 W] in the dtype of `like`, exactly, but NaN is read as 480. Two numbers at a time are moved to where
    a 16-bit float has its sign, its exponent and its mantissa; the product with a power of two mends the bias of the
    exponent, subnormals included.
    """
    BFLOAT16: tl.constexpr = like.dtype == tl.bfloat16
    SHIFT: tl.constexpr = 4 if BFLOAT16 else 1
    BITS: tl.constexpr = 0x07F007F0 if BFLOAT16 else 0x3F803F80
    SIGNS: tl.constexpr = -0x7FFF8000  # 0x80008000
    SCALE: tl.constexpr = 2.0**120 if BFLOAT16 else 2.0**8
    left = words << 8
    even = tl.join(*halves((left & SIGNS) | ((left >> SHIFT) & BITS)))
    odd = tl.join(*halves((words & SIGNS) | ((words >> SHIFT) & BITS)))
    shape: tl.constexpr = [words.shape[0], 2 * words.shape[1]]
    scale = tl.full([1, 1], SCALE, like.dtype)
    return (
        tl.reshape(even, shape).to(like.dtype, bitcast=True) * scale,
        tl.reshape(odd, shape).to(like.dtype, bitcast=True) * scale,
    )


@triton.jit
def finite(scales):
    """NaN for a scale that is not finite: its row has NaN among its numbers, which `unpacked` does not tell."""
    return scales + (scales - scales)
