"""`sample` of greedy rows: the best logit of each row, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clsa_cuda.kernels.launch import launcher
from clsa_cuda.kernels.overlap import MAX_ARRIVALS, arrival_counters, wait
from clsa_cuda.kernels.tiles import cdiv, launch_options, limits

_BLOCK = 1024
_AT_ONCE = 4
_MAX_SPLITS = 64
_NAN = tl.constexpr(2**31 - 1)  # above +inf: a row with NaN in it has no best logit
_LAST_FINITE = tl.constexpr(0x7F7FFFFF)


@triton.jit
def _ordered(logits):
    """int32 in the order of float32 logits, NaN highest; -0.0 equals 0.0."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return tl.where(logits != logits, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@launcher
@triton.jit
def _greedy_kernel(
    logits,  # [R, V]
    tokens,  # [R] out
    best,  # [R, splits] int64 scratch
    arrived,  # [R] int32, zeros before and after
    V,
    splits,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,  # blocks whose loads do not wait for each other
    MAX_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (r, split): the best logit of a part of row r, and its token in the low word, so that ties go down."""
    wait(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    per_split = tl.cdiv(tl.cdiv(V, splits), BLOCK) * BLOCK
    stop = tl.minimum((split + 1) * per_split, V)
    found = tl.full([BLOCK], -(2**63), tl.int64)
    for start in range(split * per_split, stop, BLOCK * AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            i = start + j * BLOCK + tl.arange(0, BLOCK)
            key = _ordered(tl.load(logits + r * V + i, mask=i < stop, other=float("-inf")))
            found = tl.maximum(found, tl.where(i < stop, (key.to(tl.int64) << 32) + (V - i), -(2**63)))
    tl.store(best + r * splits + split, tl.max(found))
    tl.debug_barrier()  # all of this program's stores come before its arrival
    if tl.atomic_add(arrived + r, 1, sem="acq_rel") == splits - 1:
        s = tl.arange(0, MAX_SPLITS)
        parts = tl.load(best + r * splits + s, mask=s < splits, other=-(2**63), cache_modifier=".cg")
        top = tl.max(parts)
        key = (top >> 32).to(tl.int32)
        token = V - (top & 0xFFFFFFFF).to(tl.int32)
        # Finite keys lie between those of the two infinities, 0x7F800000 and -0x7F800001.
        tl.store(tokens + r, tl.where((key <= _LAST_FINITE) & (key >= -_LAST_FINITE - 1), token, -1))
        tl.store(arrived + r, 0)


def greedy(logits: Tensor) -> Tensor:
    """The first best token of each row [R, V] float32, -1 where NaN is or the best is not finite: [R] int32."""
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous() and num_rows <= MAX_ARRIVALS
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return tokens
    device = limits(logits.device)
    splits = min(_MAX_SPLITS, max(1, cdiv(vocab_size, _BLOCK * _AT_ONCE)))
    _greedy_kernel[num_rows, splits](
        logits,
        tokens,
        torch.empty(num_rows, splits, dtype=torch.int64, device=logits.device),
        arrival_counters(logits.device),
        vocab_size,
        splits,
        BLOCK=_BLOCK,
        AT_ONCE=_AT_ONCE,
        MAX_SPLITS=_MAX_SPLITS,
        OVERLAP=device.early_launch,
        num_warps=4,
        **launch_options(device),
    )
    return tokens
