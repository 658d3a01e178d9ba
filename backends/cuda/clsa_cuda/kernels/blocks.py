"""The blocks of a layer, few rows at a time: one launch where the plain ops take three or four."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clsa_cuda.kernels.fused import rms_norm, swiglu
from clsa_cuda.kernels.linear import linear, product, takes, takes_norm


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`Ops.linears`: one product. The outputs are views of one array, so their rows are further apart than long."""
    if len(weights) == 1:
        return (linear(x, weights[0]),)
    return _split(linear(x, joined(weights)), weights)


def norm_linears(x: Tensor, norm: Tensor, eps: float, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`Ops.norm_linears`; views as those of `linears`."""
    weight = joined(weights)
    if not takes_norm(x, weight):
        return linears(rms_norm(x, norm, eps), weights)
    return _split(product(x, weight, norm=norm, eps=eps), weights)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """`Ops.norm_swiglu`."""
    weight = joined((gate, up))
    if takes_norm(x, weight):
        return product(x, weight, norm=norm, eps=eps, swiglu=True)
    h = rms_norm(x, norm, eps)
    return product(h, weight, swiglu=True) if takes(h, weight) else swiglu(*linears(h, (gate, up)))


def add_linear(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """`Ops.add_linear`."""
    return product(y, weight, residual=x) if takes(y, weight) else torch.addmm(x, y, weight.T)


def _split(out: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (out,) if len(weights) == 1 else out.split([weight.shape[0] for weight in weights], dim=-1)


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Matrices of the same inputs as one, [sum of out, in].

    The first call moves them behind each other in memory; they stay the same tensors with the same values.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    rows = sum(weight.shape[0] for weight in weights)
    if not _are_neighbours(weights):
        together = torch.cat(list(weights))
        for weight, part in zip(weights, together.split([w.shape[0] for w in weights]), strict=True):
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
