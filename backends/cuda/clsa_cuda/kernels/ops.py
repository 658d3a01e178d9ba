"""`KernelOps`: the ops of an NVIDIA GPU, with the kernels where there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clsa.ops import HeadNorms, Memory, Queries, Sampled, SamplingBatch, Selection, Weight, Window
from clsa_cuda import plain
from clsa_cuda.kernels.blocks import add_linear, close_layer, linears, norm_linears, norm_swiglu
from clsa_cuda.kernels.causal_prefill import causal_prefill
from clsa_cuda.kernels.chunk_selection import ChunkSelection, with_marks
from clsa_cuda.kernels.dense_attention import dense_attention
from clsa_cuda.kernels.draw import draw
from clsa_cuda.kernels.fused import embed, norm_rope, rms_norm, swiglu, take_tokens
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
from clsa_cuda.sample import penalize, with_logprobs


class KernelOps(TorchOps):
    """Which op runs as a kernel follows from the kind of step alone, never from what the step holds.

    The plain torch ops remain for a selection of blocks, and for an index_topk above `MAX_SELECTED`.

    An attention may read its first keys before the launch in front of it has ended, but nothing that this launch or
    work outside of this class may just have made (see `overlap`). Behind `norm_linears` and `norm_rope`, which waited
    for all of that, only the queries are new.
    """

    _settled = False  # whether nothing but activations was made since an op that waited for everything

    linear = staticmethod(linear)
    linears = staticmethod(linears)
    add_linear = staticmethod(add_linear)
    norm_swiglu = staticmethod(norm_swiglu)
    close_layer = staticmethod(close_layer)
    rms_norm = staticmethod(rms_norm)
    swiglu = staticmethod(swiglu)

    def take(self, x: Tensor, rows: Tensor, behind: Tensor | None = None) -> Tensor:
        if behind is None or x.dtype != torch.int32 or x.dim() > 1:
            return TorchOps.take(x, rows, behind)
        return take_tokens(x, rows, behind)

    def embed(self, weight: Tensor, tokens: Tensor) -> Tensor:
        self._settled = False  # a step begins, and its caller may have made anything
        return embed(weight, tokens)

    def norm_linears(
        self, x: Tensor, norm: Tensor, eps: float, weights: Sequence[Weight], dtype: str | None = None
    ) -> tuple[Tensor, ...]:
        projected = norm_linears(x, norm, eps, weights, None if dtype is None else plain.DTYPES[dtype])
        self._settled = True
        return projected

    def norm_rope(self, x: Tensor, weight: Tensor, eps: float, positions: Tensor, theta: float) -> Tensor:
        out = norm_rope(x, weight, eps, positions, theta)
        self._settled = True
        return out

    def write_memory(self, memory: Memory, k: Tensor, v: Tensor, k_idx: Tensor | None, slot_mapping: Tensor) -> Memory:
        self._settled = False
        return write_memory(memory, k, v, k_idx, slot_mapping)

    def write_window(self, window: Window, k: Tensor, v: Tensor, ring_mapping: Tensor) -> Window:
        self._settled = False
        return write_window(window, k, v, ring_mapping)

    def select(self, q_idx: Tensor, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
        self._settled = False
        run = TorchOps.select if block_size > 1 or k > MAX_SELECTED else select
        selection = run(q_idx, memory, queries, k, block_size)
        return with_marks(selection, queries) if asks_many(queries) else selection

    def gather_attention(self, q: Tensor, memory: Memory, selection: Selection) -> Tensor:
        if isinstance(selection, ChunkSelection):
            return causal_prefill(q, memory, selection.queries, marks=selection.marks)
        return gather_attention(q, memory, selection, fresh=self._left_fresh())

    def dense_attention(self, q: Tensor, memory: Memory, queries: Queries) -> Tensor:
        if asks_many(queries):
            return causal_prefill(q, memory, queries)
        self._settled = False
        return dense_attention(q, memory, queries)

    def sliding_attention(self, q: Tensor, k: Tensor, v: Tensor, window: Window, queries: Queries) -> Tensor:
        if not queries.one_each:
            return sliding_prefill(q, k, v, window, queries)
        return sliding_attention(q, k, v, window, queries, fresh=self._left_fresh())

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
        if not queries.one_each:
            return super().attend_window(q, k, v, norms, window, queries, ring_mapping)
        return attend_window(q, k, v, norms, window, queries, ring_mapping, fresh=self._left_fresh())

    def _left_fresh(self) -> bool:
        """Whether an attention must not read ahead. The next one must not either, unless one that waits comes first."""
        fresh, self._settled = not self._settled, False
        return fresh

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> Sampled:
        self._settled = False
        if sampling.all_greedy and sampling.penalty_tokens is None and sampling.num_logprobs is None:
            return Sampled(greedy(logits), None, None, None)
        logits = logits.float()
        return with_logprobs(draw(logits, penalize(logits, sampling), sampling), logits, sampling)
