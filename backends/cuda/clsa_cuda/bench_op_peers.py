"""For `clsa bench ops`: what torch offers for the same op, and FlashInfer where it is installed.

Preparation is free to them: keys are laid out one after the other, plans are made. See `clsa.bench.peers.OpPeer`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.config import PAGE_SIZE
from clsa.hostmemory import host_memory_stats
from clsa.ops import Memory, Queries, Selection
from clsa_cuda.state import page_rows

_MEMORY_SHARE = 0.6
_WORKSPACE_BYTES = 256 << 20
Call = Callable[[], Any]


def bench_op_peers(dtype: str, device: str | None) -> list[TorchPeer | FlashInferPeer]:
    """torch, and FlashInfer on a GPU and in 16 bits if it is installed."""
    peers: list[TorchPeer | FlashInferPeer] = [TorchPeer()]
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu and dtype in ("bfloat16", "float16"):
        try:
            peers.append(FlashInferPeer(version("flashinfer-python")))
        except PackageNotFoundError:
            return peers
    return peers


class TorchPeer:
    """Products by F.linear, attention by SDPA, routing by a product, topk and a sort."""

    name = f"torch {torch.__version__}"

    def prepare(self, op: str, arguments: tuple[Any, ...]) -> Call | None:
        """See `clsa.bench.peers.OpPeer`."""
        makers: dict[str, Callable[..., Call]] = {
            "linear": _linear,
            "lm_head": _linear,
            "select": _select,
            "gather_attention": _gather,
            "dense_attention": _dense,
        }
        return makers[op](*arguments) if op in makers else None


def _linear(x: Tensor, weight: Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _select(q_idx: Tensor, memory: Memory, queries: Queries, k: int, block_size: int) -> Call:
    assert memory.k_idx is not None and block_size == 1
    rows = _visible_rows(queries)
    _check_memory(rows.numel() * memory.k_idx.shape[1] * memory.k_idx.itemsize, q_idx.device)
    keys = memory.k_idx[rows].to(q_idx.dtype)  # [B, S, I]
    wide: dict[str, Any] = {"out_dtype": torch.float32} if q_idx.is_cuda and q_idx.itemsize == 2 else {}
    count = min(k, rows.shape[1])
    lengths = torch.full((len(rows),), count, dtype=torch.int32, device=rows.device)

    def call() -> Selection:
        scores = torch.bmm(keys, q_idx[..., None], **wide)[..., 0]
        positions = scores.topk(count, dim=1, sorted=False).indices.sort(1).values
        chosen = rows.gather(1, positions)
        positions, chosen = (F.pad(x, (0, k - count), value=-1).int() for x in (positions, chosen))
        return Selection(positions, chosen, lengths)

    return call


def _gather(q: Tensor, memory: Memory, selection: Selection) -> Call:
    count = int(selection.lengths.min())
    if count != int(selection.lengths.max()):
        raise ValueError("rows of one length are compared")
    rows = selection.rows[:, :count].long()
    return lambda: _attend(q, memory.k[rows], memory.v[rows])


def _dense(q: Tensor, memory: Memory, queries: Queries) -> Call:
    rows = _visible_rows(queries)
    _check_memory(2 * rows.numel() * memory.k[0].numel() * q.itemsize, q.device)
    k, v = (x[rows].to(q.dtype) for x in (memory.k, memory.v))
    return lambda: _attend(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, D] over k, v [B, S, G, D]."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


class FlashInferPeer:
    """Paged decode attention: pages of 64 for everything visible, pages of one row for a selection."""

    def __init__(self, installed: str) -> None:
        self.name = f"flashinfer {installed}"

    def prepare(self, op: str, arguments: tuple[Any, ...]) -> Call | None:
        """See `clsa.bench.peers.OpPeer`."""
        if op == "dense_attention":
            q, memory, queries = arguments
            contexts = queries.context_lens
            pages = [-(-n // PAGE_SIZE) for n in contexts]
            lists = [queries.block_table[b, :n] for b, n in enumerate(pages)]
            last = [n - (m - 1) * PAGE_SIZE for n, m in zip(contexts, pages, strict=True)]
            return self._plan(q, memory, torch.cat(lists), pages, last, PAGE_SIZE)
        if op == "gather_attention":
            q, memory, selection = arguments
            lengths = selection.lengths.tolist()
            lists = [selection.rows[b, :n] for b, n in enumerate(lengths)]
            return self._plan(q, memory, torch.cat(lists), lengths, [1] * len(lengths), 1)
        return None

    def _plan(self, q: Tensor, memory: Memory, pages: Tensor, counts: list[int], last: list[int], size: int) -> Call:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        k, v = (x.view(-1, size, *x.shape[1:]) for x in (memory.k, memory.v))
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        first = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
        heads = (q.shape[1], k.shape[2], q.shape[2])
        wrapper.plan(first, pages.int(), torch.tensor(last, dtype=torch.int32), *heads, size, q_data_type=q.dtype)
        return lambda: wrapper.run(q, (k, v))


def _visible_rows(queries: Queries) -> Tensor:
    """[B, S] int64: the physical rows of every position, all sequences as long as the first."""
    length = queries.context_lens[0]
    if not queries.one_each or set(queries.context_lens) != {length}:
        raise ValueError("decode queries of equally long sequences are compared")
    positions = torch.arange(length, device=queries.positions.device)
    seen = positions.expand(len(queries.context_lens), -1) <= queries.positions[:, None]
    return page_rows(queries.block_table, positions, seen, 0)


def _check_memory(needed: int, device: torch.device) -> None:
    free = host_memory_stats()["free"] if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if needed > _MEMORY_SHARE * free:
        raise MemoryError(f"rows in its own order need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
