"""Products with weights, and what stands around them in a block: norms, the gate, the residual stream."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from clsa.ops import QuantizedWeight, Weight
from clsa_mlx import kernels
from clsa_mlx.fused import fused, on_gpu
from clsa_mlx.kernels.add_rms_norm import add_rms_norm
from clsa_mlx.quantized import quantized_linear

# Of one product on the GPU: 0.2 s on the slowest chip. macOS ends what keeps the screen waiting much longer.
PIECE_FLOPS = 1 << 39

_joints: dict[tuple[int, ...], Weight] = {}  # by the ids of the arrays that were joined, while those live
_sums: dict[int, tuple[mx.array, mx.array]] = {}  # by id: two arrays whose sum it is, while it lives


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


def linear(x: mx.array, weight: Weight) -> mx.array:
    """On the GPU in pieces, if it would take long.

    MLX ends a command buffer after 50 functions, or 50 MB of their inputs; so none holds much more than a piece.
    """
    rows, (out, width) = x.size // x.shape[-1], _shape(weight)
    most = max(1, PIECE_FLOPS // (2 * out * width))
    if rows <= most or not on_gpu():
        return _product(x, weight)
    flat = x.reshape(rows, -1)
    parts = [_product(flat[first : first + most], weight) for first in range(0, rows, most)]
    return mx.concatenate(parts).reshape(*x.shape[:-1], out)


def _product(x: mx.array, weight: Weight) -> mx.array:
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight)
    return x @ joined((weight,)).T


def linears(x: mx.array, weights: Sequence[Weight]) -> tuple[mx.array, ...]:
    """One product, whose parts are views: their rows are further apart than they are long."""
    if len({_kind(weight) for weight in weights}) > 1:
        return tuple(linear(x, weight) for weight in weights)
    out, start, parts = linear(x, joined(weights)), 0, []
    for weight in weights:
        stop = start + _shape(weight)[0]
        parts.append(out[..., start:stop])
        start = stop
    return tuple(parts)


def norm_linears(
    x: mx.array, norm: mx.array, eps: float, weights: Sequence[Weight], dtype: str | None = None
) -> tuple[mx.array, ...]:
    projected = linears(_normed(x, norm, eps), weights)
    return projected if dtype is None else tuple(y.astype(getattr(mx, dtype)) for y in projected)


def norm_swiglu(x: mx.array, norm: mx.array, eps: float, gate: Weight, up: Weight) -> mx.array:
    return swiglu(*norm_linears(x, norm, eps, (gate, up)))


@fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide) * up.astype(mx.float32)).astype(gate.dtype)


def add_linear(x: mx.array, y: mx.array, weight: Weight) -> mx.array:
    """On Metal the sum is left to the norm that follows, which does both in one launch."""
    if not (kernels.enabled or isinstance(weight, QuantizedWeight)):
        return mx.addmm(x, y, joined((weight,)).T)
    delta = linear(y, weight)
    total = x + delta
    if kernels.enabled:
        _sums[id(total)] = (x, delta)
        weakref.finalize(total, _sums.pop, id(total), None)
    return total


def _normed(x: mx.array, norm: mx.array, eps: float) -> mx.array:
    parts = _sums.pop(id(x), None)
    if parts is None:
        return rms_norm(x, norm, eps)
    total, normed = add_rms_norm(*parts, norm, eps)
    x[:] = total  # in the place of a sum that nobody computes now
    return normed


def joined(weights: Sequence[Weight]) -> Weight:
    """Matrices of the same inputs and of one kind as one, [sum of out, in].

    The first call moves them behind each other in memory, on CPU also column by column if they are float32: the
    BLAS that MLX has on Linux is twice as fast then. They stay the same arrays with the same values.
    """
    if len(weights) == 1 and not _by_column(weights[0]):
        return weights[0]
    arrays = [array for weight in weights for array in _arrays(weight)]
    key = tuple(map(id, arrays))
    if key not in _joints:
        _joints[key] = _join(weights)
        for array in arrays:
            weakref.finalize(array, _joints.pop, key, None)
    return _joints[key]


def _join(weights: Sequence[Weight]) -> Weight:
    first = weights[0]
    if isinstance(first, QuantizedWeight):
        parts = [_behind_each_other(arrays) for arrays in zip(*map(_arrays, weights), strict=True)]
        return replace(first, packed=parts[0], scales=parts[1], biases=parts[2])
    return _behind_each_other(weights)


def _behind_each_other(arrays: Sequence[mx.array]) -> mx.array:
    together = mx.concatenate(list(arrays))
    if _by_column(arrays[0]):
        together = mx.contiguous(together.T).T
    mx.eval(together)  # before the weights become parts of it: what failed later would be failed weights
    start = 0
    for array in arrays:
        stop = start + array.shape[0]
        array[:] = together[start:stop]
        start = stop
    mx.eval(*arrays)
    return together


def _by_column(weight: Weight) -> bool:
    return isinstance(weight, mx.array) and weight.dtype == mx.float32 and not on_gpu()


def _arrays(weight: Weight) -> tuple[mx.array, ...]:
    if isinstance(weight, QuantizedWeight):
        return weight.packed, weight.scales, weight.biases
    return (weight,)


def _shape(weight: Weight) -> tuple[int, int]:
    """[out, in]."""
    rows, columns = _arrays(weight)[0].shape
    return rows, columns * 32 // weight.bits if isinstance(weight, QuantizedWeight) else columns


def _kind(weight: Weight) -> tuple[object, ...]:
    """What two weights must have in common to be joined."""
    if isinstance(weight, QuantizedWeight):
        return weight.group_size, weight.bits, weight.scales.dtype
    return (weight.dtype,)


def close_layer(
    x: mx.array, o: mx.array, o_proj: Weight, norm: mx.array, eps: float, gate: Weight, up: Weight, down: Weight
) -> mx.array:
    x = add_linear(x, o, o_proj)
    return add_linear(x, norm_swiglu(x, norm, eps, gate, up), down)
