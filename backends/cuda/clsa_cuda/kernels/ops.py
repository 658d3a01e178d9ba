"""`KernelOps`: the ops of an NVIDIA GPU, with the kernels where there is one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clsa.ops import HeadNorms, Memory, Queries, Sampled, SamplingBatch, Selection, Weight, Window
from clsa_cuda.kernels.blocks import add_linear, linears, norm_linears, norm_swiglu
from clsa_cuda.kernels.causal_prefill import causal_prefill
from clsa_cuda.kernels.dense_attention import dense_attention
from clsa_cuda.kernels.fused import norm_rope, rms_norm, swiglu
from clsa_cuda.kernels.gather_attention import gather_attention
from clsa_cuda.kernels.greedy import greedy
from clsa_cuda.kernels.linear import linear
from clsa_cuda.kernels.prefill import asks_many
from clsa_cuda.kernels.select import select
from clsa_cuda.kernels.sliding_attention import attend_window, sliding_attention
from clsa_cuda.kernels.sliding_prefill import sliding_prefill
from clsa_cuda.kernels.tiles import MAX_SELECTED
from clsa_cuda.kernels.write_memory import write_memory, write_window
from clsa_cuda.ops import TorchOps


class KernelOps(TorchOps):
    """Which op runs as a kernel follows from the kind of step alone, never from what the step holds.

    The plain torch ops remain for a selection of blocks, and for an index_topk above `MAX_SELECTED`.
    """

    _selected: Tensor | None = None  # rows of a selection that may be what the last launch made

    linear = staticmethod(linear)
    linears = staticmethod(linears)
    add_linear = staticmethod(add_linear)
    norm_swiglu = staticmethod(norm_swiglu)
    rms_norm = staticmethod(rms_norm)
    norm_rope = staticmethod(norm_rope)
    swiglu = staticmethod(swiglu)
    write_memory = staticmethod(write_memory)
    write_window = staticmethod(write_window)

    def norm_linears(self, x: Tensor, norm: Tensor, eps: float, weights: Sequence[Weight]) -> tuple[Tensor, ...]:
        self._selected = None
        return norm_linears(x, norm, eps, weights)

    def select(self, q_idx: Tensor, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
        if block_size > 1 or k > MAX_SELECTED:
            return TorchOps.select(q_idx, memory, queries, k, block_size)
        selection = select(q_idx, memory, queries, k, block_size)
        self._selected = selection.rows
        return selection

    def gather_attention(self, q: Tensor, memory: Memory, selection: Selection) -> Tensor:
        return gather_attention(q, memory, selection, fresh=selection.rows is self._selected)

    def dense_attention(self, q: Tensor, memory: Memory, queries: Queries) -> Tensor:
        return (causal_prefill if asks_many(queries) else dense_attention)(q, memory, queries)

    def sliding_attention(self, q: Tensor, k: Tensor, v: Tensor, window: Window, queries: Queries) -> Tensor:
        run = sliding_attention if queries.one_each else sliding_prefill
        return run(q, k, v, window, queries)

    def attend_window(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms,
        window: Window,
        queries: Queries,
        ring_mapping: Tensor,
    ) -> tuple[Tensor, Window]:
        run = attend_window if queries.one_each else super().attend_window
        return run(q, k, v, norms, window, queries, ring_mapping)

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> Sampled:
        if sampling.all_greedy and sampling.penalty_tokens is None and sampling.num_logprobs is None:
            return Sampled(greedy(logits), None, None, None)
        return TorchOps.sample(logits, sampling)
