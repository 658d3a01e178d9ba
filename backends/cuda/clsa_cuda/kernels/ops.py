"""`KernelOps`: the ops of an NVIDIA GPU, with the kernels where there is one."""

from __future__ import annotations

from torch import Tensor

from clsa.ops import Memory, Queries, Selection, Window
from clsa_cuda.kernels.dense_attention import dense_attention
from clsa_cuda.kernels.fused import norm_rope, rms_norm, swiglu
from clsa_cuda.kernels.gather_attention import gather_attention
from clsa_cuda.kernels.linear import linear
from clsa_cuda.kernels.linears import linears
from clsa_cuda.kernels.select import select
from clsa_cuda.kernels.sliding_attention import sliding_attention
from clsa_cuda.kernels.tiles import MAX_SELECTED
from clsa_cuda.kernels.write_memory import write_memory, write_window
from clsa_cuda.ops import TorchOps


class KernelOps(TorchOps):
    """Which op runs as a kernel follows from the kind of step alone, never from what the step holds.

    The plain torch ops remain for dense and sliding attention of prefill, for a selection of blocks, and for an
    index_topk above `MAX_SELECTED`.
    """

    linears = staticmethod(linears)
    rms_norm = staticmethod(rms_norm)
    norm_rope = staticmethod(norm_rope)
    swiglu = staticmethod(swiglu)
    write_memory = staticmethod(write_memory)
    write_window = staticmethod(write_window)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)

    def gather_attention(self, q: Tensor, memory: Memory, selection: Selection) -> Tensor:
        return gather_attention(q, memory, selection)

    def select(self, q_idx: Tensor, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
        if block_size > 1 or k > MAX_SELECTED:
            return TorchOps.select(q_idx, memory, queries, k, block_size)
        return select(q_idx, memory, queries, k, block_size)

    def dense_attention(self, q: Tensor, memory: Memory, queries: Queries) -> Tensor:
        run = dense_attention if queries.one_each else TorchOps.dense_attention
        return run(q, memory, queries)

    def sliding_attention(self, q: Tensor, k: Tensor, v: Tensor, window: Window, queries: Queries) -> Tensor:
        run = sliding_attention if queries.one_each else TorchOps.sliding_attention
        return run(q, k, v, window, queries)
