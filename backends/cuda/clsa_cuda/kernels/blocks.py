"""The blocks of a layer, few rows at a time: one launch where the plain ops take three or more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clsa.ops import Float8Weight, Weight
from clsa_cuda import plain
from clsa_cuda.kernels.fused import rms_norm, swiglu
from clsa_cuda.kernels.linear import linear, product, takes, takes_norm


def linears(x: Tensor, weights: Sequence[Weight]) -> tuple[Tensor, ...]:
    """`Ops.linears`: one product. The outputs are views of one array, so their rows are further apart than long."""
    return _split(linear(x, joined(weights)), weights)


def norm_linears(
    x: Tensor, norm: Tensor, eps: float, weights: Sequence[Weight], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """`Ops.norm_linears`; views as those of `linears`."""
    weight = joined(weights)
    if not takes_norm(x, weight):
        return _split(linear(rms_norm(x, norm, eps), weight).to(dtype or x.dtype), weights)
    return _split(product(x, weight, norm=norm, eps=eps, dtype=dtype), weights)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, gate: Weight, up: Weight) -> Tensor:
    """`Ops.norm_swiglu`."""
    weight = joined((gate, up))
    if takes_norm(x, weight):
        return product(x, weight, norm=norm, eps=eps, swiglu=True)
    h = rms_norm(x, norm, eps)
    return product(h, weight, swiglu=True) if takes(h, weight) else swiglu(*_split(linear(h, weight), (gate, up)))


def add_linear(x: Tensor, y: Tensor, weight: Weight) -> Tensor:
    """`Ops.add_linear`."""
    return product(y, weight, residual=x) if takes(y, weight) else plain.add_linear(x, y, weight)


def close_layer(
    x: Tensor, o: Tensor, o_proj: Weight, norm: Tensor, eps: float, gate: Weight, up: Weight, down: Weight
) -> Tensor:
    """`Ops.close_layer`."""
    x = add_linear(x, o, o_proj)
    y = norm_swiglu(x, norm, eps, gate, up)
    if takes(y, down):
        return product(y, down, residual=x)
    # x is nobody else's. cuBLAS adds to what is there, so to another place it would be copied first.
    return torch.addmm(x, y, plain.dense(down, y.dtype).T, out=x)


def _split(out: Tensor, weights: Sequence[Weight]) -> tuple[Tensor, ...]:
    return (out,) if len(weights) == 1 else out.split([_values(weight).shape[0] for weight in weights], dim=-1)


def _values(weight: Weight) -> Tensor:
    return weight.values if isinstance(weight, Float8Weight) else weight


def joined(weights: Sequence[Weight]) -> Weight:
    """Matrices of the same inputs as one, [sum of out, in].

    The first call moves them behind each other in memory; they stay the same tensors with the same values.
    """
    if len(weights) == 1:
        return weights[0]
    if isinstance(weights[0], Float8Weight):
        return Float8Weight(_together([w.values for w in weights]), _together([w.scales for w in weights]))
    return _together(weights)


def _together(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    sizes = [part.shape[0] for part in parts]
    if not _are_neighbours(parts):
        # Bytes are what is moved: torch does not join 8-bit floats everywhere.
        together = torch.cat([part.view(torch.uint8) for part in parts]).view(first.dtype)
        for part, place in zip(parts, together.split(sizes), strict=True):
            part.set_(place)
    return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())


def _are_neighbours(parts: Sequence[Tensor]) -> bool:
    end = parts[0].data_ptr()
    storage = parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return False
        end += part.nbytes
    return True
