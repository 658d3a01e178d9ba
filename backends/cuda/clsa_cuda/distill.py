"""Distillation of an index (paper, equations 5-6) without any [T, T] array: queries go block after block.

For a block of queries the attention of all layers and heads is averaged into one array of float32, of the same size
whatever T is; the loss of these queries and its gradients follow from that array while it is there. What grows with T
are references to the layers' queries and keys, and the two gradients. Sums are made in a fixed order, so the same
inputs give the same bits. Letters as in `clsa.ops`; T positions of B sequences, M heads of a group in all layers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clsa.errors import BackendError

_BLOCK_SCORES = 1 << 25  # values of one [B, block, T]: 128 MB of float32, of which about five are there at once
_ROWS = 128  # blocks of so many queries, or a multiple, fill the tiles of a GPU


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def query_blocks(batch: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of queries of `batch` sequences; such a block sees the keys before stop."""
    size = max(1, _BLOCK_SCORES // (batch * length))
    size -= size % _ROWS if size > _ROWS else 0
    for start in range(0, length, size):
        yield start, min(start + size, length)


def hide_future(scores: Tensor, value: float) -> Tensor:
    """Put `value` where a key is after the query, in place: [B, C, S], the queries are the last C of S positions."""
    count = scores.shape[-2]
    future = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., -count:].masked_fill_(future, value)
    return scores


class Teacher:
    """Dense causal attention averaged over layers and heads (equation 5), computed where it is asked for.

    It carries no gradient. Neighbouring layers that read one and the same k are computed together.
    """

    def __init__(self) -> None:
        self._memories: list[tuple[Tensor, list[Tensor]]] = []  # k, and the q of each layer that reads it
        self._num_heads = 0

    def add(self, q: Tensor, k: Tensor) -> None:
        """One more layer: q [B, H, T, D], k [B, G, T, D]. They are kept, not copied."""
        q, k = q.detach(), k.detach()
        if not self._memories or not _is_same(k, self._memories[-1][0]):
            self._memories.append((k, []))
        self._memories[-1][1].append(q)
        self._num_heads += q.shape[1]

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        """The attention of queries start..stop-1 to the keys before stop: [B, stop - start, stop]."""
        parts = []
        for k, layers in self._memories:
            groups = [q[:, :, start:stop].unflatten(1, (k.shape[1], -1)) for q in layers]
            q = torch.stack(groups, dim=2).flatten(2, 3)  # [B, G, M, C, D]
            parts.append(_weighted_attention(q, k[:, :, :stop], 1 / self._num_heads))
        return functools.reduce(Tensor.add_, parts)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _weighted_attention(q: Tensor, k: Tensor, weight: float) -> Tensor:
    """weight * the sum of the causal attention of all heads: q [B, G, M, C, D], k [B, G, S, D] -> [B, C, S]."""
    if q.is_cuda and q.itemsize == 2:
        if importlib.util.find_spec("triton") is None:
            raise BackendError('distilling an index in 16 bits on a GPU needs triton; pip install "clsa[cuda]"')
        from clsa_cuda.kernels.distill import softmax_sums, weighted_attention

        with torch.cuda.device(q.device):  # kernels start on the current one
            return weighted_attention(q, k, softmax_sums(q, k), weight)
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape[0], q.shape[3], k.shape[2], dtype=dtype, device=q.device)
    for g in range(q.shape[1]):
        keys = wide(k[:, g]).mT
        for m in range(q.shape[2]):  # one head at a time bounds the memory
            scores = wide(q[:, g, m]) @ keys * q.shape[-1] ** -0.5
            out.add_(hide_future(scores, -torch.inf).softmax(-1), alpha=weight)
    return out


class _IndexKD(torch.autograd.Function):
    """The gradients are made along with the loss, where the teacher's rows are there, and scaled afterwards."""

    @staticmethod
    def forward(ctx: Any, q_idx: Tensor, k_idx: Tensor, teacher: Teacher) -> Tensor:
        batch, length, index_dim = q_idx.shape
        scale = index_dim**-0.5
        q, k = wide(q_idx) * scale, wide(k_idx)
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        loss = q.new_zeros(())
        for start, stop in query_blocks(batch, length):
            target = teacher.rows(start, stop)
            queries, keys = q[:, start:stop], k[:, :stop]
            student = hide_future(queries @ keys.mT, -torch.inf).log_softmax(-1)
            if any(ctx.needs_input_grad):
                error = student.exp().sub_(target)  # the gradient of a sum over queries, to the scores
                dq[:, start:stop] = error @ keys
                dk[:, :stop] += error.mT @ queries
                del error
            hide_future(student, 0.0)  # where the target is 0; 0 * -inf is NaN
            loss += torch.xlogy(target, target).sub_(student.mul_(target)).sum()
        count = batch * length
        ctx.save_for_backward(dq.mul_(scale / count), dk.div_(count))
        ctx.dtypes = q_idx.dtype, k_idx.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dq, dk = ((grad * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return dq, dk, None


def index_kd_loss(q_idx: Tensor, k_idx: Tensor, teacher: Teacher) -> Tensor:
    """Mean over positions of KL(teacher || softmax(q_idx . k_idx / sqrt(I))), causal (equation 6): a scalar.

    Args: q_idx and k_idx [B, T, I], which get gradients (once); `teacher` has seen layers of the same B and T.
    Products of 16-bit inputs on a GPU are summed in float32; everything else is in float32, or float64 for float64.
    """
    loss: Tensor = _IndexKD.apply(q_idx, k_idx, teacher)
    return loss
