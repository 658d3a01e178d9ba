"""Several projections of the same rows as one product: fewer launches, and one long read of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clsa_cuda.kernels.linear import linear


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`Ops.linears`. The outputs are views of one array, so their rows are further apart than they are long.

    The first call moves the weights behind each other in memory; they stay the same tensors with the same values.
    """
    if len(weights) == 1:
        return (linear(x, weights[0]),)
    out = linear(x, _joined(weights))
    return out.split([weight.shape[0] for weight in weights], dim=-1)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """The weights as one matrix [sum of out, in] over the memory that they share."""
    first = weights[0]
    rows = sum(weight.shape[0] for weight in weights)
    if not _are_neighbours(weights):
        joined = torch.cat(list(weights))
        for weight, part in zip(weights, joined.split([w.shape[0] for w in weights]), strict=True):
            weight.set_(part)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _are_neighbours(weights: Sequence[Tensor]) -> bool:
    end = weights[0].data_ptr()
    storage = weights[0].untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage:
            return False
        end += weight.nbytes
    return True
