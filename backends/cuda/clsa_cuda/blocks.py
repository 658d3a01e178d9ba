"""The ops of whole blocks, composed of the smaller ones of a class: for serving without kernels, and for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clsa.ops import HeadNorms, Queries, Weight, Window


class Blocks:
    """`norm_linears`, `norm_swiglu`, `close_layer` and `attend_window` as `clsa.ops.Ops` defines them."""

    cast: Any
    linears: Any
    rms_norm: Any
    norm_rope: Any
    swiglu: Any
    add_linear: Any
    sliding_attention: Any
    write_window: Any

    def norm_linears(
        self, x: Tensor, norm: Tensor, eps: float, weights: Sequence[Weight], dtype: str | None = None
    ) -> tuple[Tensor, ...]:
        projected: tuple[Tensor, ...] = self.linears(self.rms_norm(x, norm, eps), weights)
        return projected if dtype is None else tuple(self.cast(y, dtype) for y in projected)

    def norm_swiglu(self, x: Tensor, norm: Tensor, eps: float, gate: Weight, up: Weight) -> Tensor:
        return self.swiglu(*self.norm_linears(x, norm, eps, (gate, up)))

    def close_layer(
        self, x: Tensor, o: Tensor, o_proj: Weight, norm: Tensor, eps: float, gate: Weight, up: Weight, down: Weight
    ) -> Tensor:
        x = self.add_linear(x, o, o_proj)
        return self.add_linear(x, self.norm_swiglu(x, norm, eps, gate, up), down)

    def attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms, window: Window, queries: Queries, ring_mapping: Tensor
    ) -> tuple[Tensor, Window]:
        q = self.norm_rope(q, norms.q, norms.eps, queries.positions, norms.theta)
        k = self.norm_rope(k, norms.k, norms.eps, queries.positions, norms.theta)
        return self.sliding_attention(q, k, v, window, queries), self.write_window(window, k, v, ring_mapping)
