"""What the attention kernels share: how a head lies in registers, how the work is cut, the second launch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from clsa_mlx.kernels.load import load

_log = logging.getLogger(__name__)

HEADERS = ("load", "attend")
_REGISTERS = 40  # of a lane, for the queries of its heads and once more for their sums
_ENOUGH_THREADGROUPS = 256  # to fill the largest GPU
_FEWEST_ROWS = 128  # of a part: with less, putting parts together costs more than it saves


def has_kernel(q: mx.array, keys: mx.array) -> bool:
    """Whether the attention kernels take queries [T, H, D] over keys [N, G, D]: D a multiple of 8 to 256, keys of the
    dtype of the queries or E4M3."""
    return keys.dtype in (q.dtype, mx.uint8) and takes_head_dim(q.shape[-1])


def takes_head_dim(head_dim: int) -> bool:
    """Whether the attention kernels can hold a head of this size."""
    return head_dim % 8 == 0 and head_dim <= 256


@cache
def warn_of_head_dim(head_dim: int) -> None:
    """Say, once, that heads of this size have no kernel, if that is so."""
    if not takes_head_dim(head_dim):
        _log.warning(
            "head_dim %d has no Metal kernel (a multiple of 8, at most 256, has): decode steps run as plain MLX "
            "functions, which is right but several times slower",
            head_dim,
        )


@dataclass(frozen=True)
class Launch:
    """How the work of `num_queries` queries over `rows` rows each is cut into threadgroups."""

    num_queries: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    threads: int

    @staticmethod
    def of(q: mx.array, keys: mx.array, rows: int, threads: int) -> Launch:
        """For q [T, H, D] over keys [N, G, D]."""
        num_queries, heads, head_dim = q.shape
        return Launch(num_queries, heads, keys.shape[1], head_dim, rows, threads)

    @property
    def lane_elements(self) -> int:
        """Elements of a head in one lane: a vector load or two."""
        return 2 if self.head_dim <= 64 else 4 if self.head_dim <= 128 else 8

    @property
    def block_heads(self) -> int:
        """Query heads of one threadgroup: all of a KV head, unless they need too many registers."""
        group = self.heads // self.kv_heads
        return -(-group // -(-group * self.lane_elements // _REGISTERS))

    @property
    def blocks(self) -> int:
        """Threadgroups that share a KV head."""
        return -(-self.heads // self.kv_heads // self.block_heads)

    @property
    def parts(self) -> int:
        """Into how many the rows are cut."""
        others = self.num_queries * self.kv_heads * self.blocks
        return max(1, min(_ENOUGH_THREADGROUPS // others, self.rows // _FEWEST_ROWS))

    def arguments(self, dtype: mx.Dtype) -> dict[str, Any]:
        """Keyword arguments of the kernel; its outputs are sums (or the result, if it is one part) and statistics."""
        is_whole = self.parts == 1
        out = (self.num_queries, self.heads, self.parts)
        out_dtype = dtype if is_whole else mx.float32
        return {
            "template": [
                ("T", dtype), ("OUT", out_dtype), ("FINISH", is_whole), ("D", self.head_dim),
                ("E", self.lane_elements), ("HEADS", self.block_heads),
                ("AHEAD", 4 if self.lane_elements <= 4 else 2), ("THREADS", self.threads),
            ],
            "grid": (self.threads * self.parts, self.kv_heads * self.blocks, self.num_queries),
            "threadgroup": (self.threads, 1, 1),
            "output_shapes": [(*out, self.head_dim), (*out, 2)],
            "output_dtypes": [out_dtype, mx.float32],
        }  # fmt: skip

    def combine(self, outputs: list[mx.array], dtype: mx.Dtype) -> mx.array:
        """The result [T, H, D] from the outputs of the kernel."""
        sums, stats = outputs
        shape = (self.num_queries, self.heads, self.head_dim)
        if self.parts == 1:
            return sums.reshape(shape)
        return load("combine", ("sums", "stats"), ("out",))(
            inputs=[sums, stats],
            template=[("T", dtype), ("D", self.head_dim)],
            grid=(self.num_queries * self.heads * self.head_dim, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
        )[0]
