"""The ops that training runs the model over: torch autograd from end to end, B whole sequences at a time.

A batch is B sequences of equal length T, packed one after the other, so the packed axis is [B * T] and every op can
look at it as [B, T]. There is no paged state: a memory is this batch's own k, v and k_idx. Shapes use the letters of
`clsa.ops`; of what is [B, T, T] only the selection is materialised, as the mask of sparse attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.config import MODEL_DTYPE, MemoryDtypes
from clsa.errors import BackendError
from clsa.ops import (
    Compute,
    Memory,
    QuantizedWeight,
    Queries,
    Sampled,
    SamplingBatch,
    Selection,
    StepSize,
    Window,
)
from clsa_cuda import plain
from clsa_cuda.blocks import Blocks
from clsa_cuda.distill import Teacher, index_kd_loss, query_blocks, wide


def top_k_mask(scores: Tensor, k: int, block_size: int) -> Tensor:
    """The selected set of each query as a mask: [B, C, S] scores -> [B, C, S] bool; the last C of S positions ask.

    Exact and causal; NaN counts as -inf and equal scores go to the lower position, as in `clsa.ops`. A block of
    `block_size` > 1 tokens has the score of its best visible token, and k / block_size blocks are chosen.
    """
    count, length = scores.shape[-2:]
    causal = torch.ones(count, length, dtype=torch.bool, device=scores.device).tril(length - count)
    scores = scores.masked_fill(~causal | scores.isnan(), -torch.inf)
    visible = causal
    if block_size > 1:
        padded = F.pad(scores, (0, -length % block_size), value=-torch.inf)
        scores = padded.unflatten(-1, (-1, block_size)).amax(-1)  # [B, C, blocks]
        visible = F.pad(causal, (0, -length % block_size)).unflatten(-1, (-1, block_size)).any(-1)
    chosen = min(k // block_size, scores.shape[-1])
    threshold = scores.topk(chosen, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > threshold, (scores == threshold) & visible
    room = chosen - above.sum(-1, keepdim=True)
    mask = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    if block_size > 1:
        mask = mask.repeat_interleave(block_size, dim=-1)[..., :length]
    return mask & causal


class Routing:
    """What one index saw and chose, and the dense attention of the layers that read its selection (its teacher).

    q_idx and k_idx [B, T, I] carry gradient to the index and on through it to the hidden states: the paper stops the
    gradient of the teacher only. Everything here goes by blocks of queries; only `mask` is [B, T, T].
    """

    def __init__(self, q_idx: Tensor, k_idx: Tensor, k: int, block_size: int) -> None:
        self.teacher = Teacher()
        self._q_idx, self._k_idx = q_idx, k_idx
        self._size = (k, block_size)
        self._mask: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """[B, T, T] bool: what is selected."""
        if self._mask is None:
            batch, length, _ = self._q_idx.shape
            mask = torch.zeros(batch, length, length, dtype=torch.bool, device=self._q_idx.device)
            for start, stop in query_blocks(batch, length):
                mask[:, start:stop, :stop] = self._selected(start, stop)
            self._mask = mask
        return self._mask

    def observe(self, q: Tensor, k: Tensor) -> None:
        """Add a layer's dense attention to the teacher: q [B, H, T, D], k [B, G, T, D]."""
        self.teacher.add(q, k)

    def kd_loss(self) -> Tensor:
        """Mean over positions of KL(teacher || softmax(scores)), causal (equation 6)."""
        return index_kd_loss(self._q_idx, self._k_idx, self.teacher)

    @torch.no_grad()
    def coverage(self) -> Tensor:
        """[B, T]: the share of the dense attention mass that lies on the selected positions."""
        blocks = query_blocks(*self._q_idx.shape[:2])
        return torch.cat([self.teacher.rows(*b).mul_(self._selected(*b)).sum(-1) for b in blocks], dim=1)

    @torch.no_grad()
    def _selected(self, start: int, stop: int) -> Tensor:
        """[B, stop - start, stop] bool."""
        if self._mask is not None:
            return self._mask[:, start:stop, :stop]
        scores = wide(self._q_idx[:, start:stop]) @ wide(self._k_idx[:, :stop]).mT
        return top_k_mask(scores, *self._size)


class TrainOps(Blocks):
    """`clsa.ops.Ops` for one forward pass over B sequences of T tokens; the passes to come need new ones.

    `sparse` False attends densely where the model would gather (stage 1, and the dense side of an evaluation); the
    index is computed all the same. What only serving needs raises BackendError.
    """

    name = "cuda"
    step_size = StepSize(1, 1)  # the engine alone asks
    temporary_bytes = 0  # the same
    records_rest = False
    keeps_quantized = False
    no_fp8: Mapping[str, str] = {}  # nobody asks

    itemsize = staticmethod(plain.itemsize)
    take = staticmethod(plain.take)
    concat = staticmethod(plain.concat)
    embed = staticmethod(plain.embed)
    linear = staticmethod(plain.linear)
    linears = staticmethod(plain.linears)
    swiglu = staticmethod(plain.swiglu)
    add_linear = staticmethod(plain.add_linear)

    def __init__(self, device: torch.device, dtype: torch.dtype, batch: int, length: int, sparse: bool) -> None:
        self.device = str(device)
        self.routings: list[Routing] = []
        self._device, self._dtype = device, dtype
        self._batch, self._length, self._sparse = batch, length, sparse
        self._rotations: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}
        self._bands: dict[int, Tensor] = {}

    def kd_loss(self) -> Tensor:
        """The distillation loss, averaged over the indices of the model; zero for a model without one."""
        if not self.routings:
            return torch.zeros((), device=self._device)
        return torch.stack([routing.kd_loss() for routing in self.routings]).mean()

    def coverage(self) -> Tensor | None:
        """[B, T] averaged over the indices of the model; None for a model without one."""
        if not self.routings:
            return None
        return torch.stack([routing.coverage() for routing in self.routings]).mean(0)

    # -- arrays --------------------------------------------------------------------------------------------
    def asarray(self, x: np.ndarray, dtype: str | None = None) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(x)).to(self._device)
        return tensor if dtype is None else self.cast(tensor, dtype)

    def quantized_weight(self, host: QuantizedWeight, dtype: str) -> Tensor:
        _not_in_training("quantized_weight")

    def float8_weight(self, weight: Tensor) -> Tensor:
        _not_in_training("float8_weight")

    def to_numpy(self, x: Tensor) -> np.ndarray:
        return (wide(x) if x.is_floating_point() else x).detach().cpu().numpy()

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return wide(x) if dtype == "float32" else x.to(getattr(torch, dtype))

    def evaluate(self, *values: Any) -> None:
        pass

    def asarrays(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        return [self.asarray(x) for x in arrays]

    def fetch(self, arrays: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
        return lambda: [self.to_numpy(x) for x in arrays]

    def record(self, compute: Compute) -> Compute | None:
        return None

    def memory_stats(self) -> dict[str, int]:
        _not_in_training("memory_stats")

    # -- the model's plain functions -----------------------------------------------------------------------
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)  # one kernel each way; torch sums in float32

    def rope(self, x: Tensor, positions: Tensor, theta: float) -> Tensor:
        cos, sin = self._rotation(positions, x.shape[-1], theta)
        first, second = wide(x).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def norm_rope(self, x: Tensor, weight: Tensor, eps: float, positions: Tensor, theta: float) -> Tensor:
        return self.rope(self.rms_norm(x, weight, eps), positions, theta)

    # -- state ---------------------------------------------------------------------------------------------
    def new_memory(
        self,
        rows: int,
        kv_heads: int,
        head_dim: int,
        index_dim: int | None,
        dtype: str,
        stored: MemoryDtypes = MODEL_DTYPE,
    ) -> Memory:
        return Memory(None, None, None)

    def new_window(self, slots: int, window: int, kv_heads: int, head_dim: int, dtype: str) -> Window:
        return Window(None, None, window)

    def write_memory(self, memory: Memory, k: Tensor, v: Tensor, k_idx: Tensor | None, slot_mapping: Tensor) -> Memory:
        return Memory(k, v, k_idx)

    def write_window(self, window: Window, k: Tensor, v: Tensor, ring_mapping: Tensor) -> Window:
        return window

    def copy_window(self, window: Window, source: Tensor, target: Tensor) -> Window:
        _not_in_training("copy_window")

    # -- routing and attention -----------------------------------------------------------------------------
    def select(self, q_idx: Tensor, memory: Memory, queries: Queries, k: int, block_size: int) -> Any:
        """A `Routing`: what the model passes on as a selection."""
        assert memory.k_idx is not None  # the plan gives a memory that routes its index keys
        shape = (self._batch, self._length, -1)
        self.routings.append(Routing(q_idx.reshape(shape), memory.k_idx.reshape(shape), k, block_size))
        return self.routings[-1]

    def take_selection(self, selection: Selection, rows: Tensor) -> Selection:
        _not_in_training("take_selection")

    def gather_attention(self, q: Tensor, memory: Memory, selection: Any) -> Tensor:
        """Also shows this layer's dense attention to the selection's teacher."""
        selection.observe(self._heads_first(q), self._heads_first(memory.k))
        return self._attend(q, memory.k, memory.v, selection.mask[:, None] if self._sparse else None)

    def dense_attention(self, q: Tensor, memory: Memory, queries: Queries) -> Tensor:
        return self._attend(q, memory.k, memory.v, None)

    def sliding_attention(self, q: Tensor, k: Tensor, v: Tensor, window: Window, queries: Queries) -> Tensor:
        """Blocks of W queries, each against its own and the block before: O(T W), with any window."""
        length, size = self._length, window.size
        if length <= size:
            return self._attend(q, k, v, None)
        blocks = -(-length // size)
        q, k, v = (F.pad(self._heads_first(x), (0, 0, 0, blocks * size - length)) for x in (q, k, v))
        q = q.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)  # [B * blocks, H, W, D]
        k, v = (_with_block_before(x, blocks) for x in (k, v))
        out = _sdpa(q, k, v, self._band(blocks, size))
        out = out.unflatten(0, (-1, blocks)).transpose(2, 3).flatten(1, 2)  # [B, blocks * W, H, D]
        return out[:, :length].flatten(0, 1)

    def sample(self, logits: Tensor, sampling: SamplingBatch) -> Sampled:
        _not_in_training("sample")

    # -- helpers -------------------------------------------------------------------------------------------
    def _heads_first(self, x: Tensor) -> Tensor:
        """[B * T, H, D] -> [B, H, T, D]."""
        return x.unflatten(0, (self._batch, self._length)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B * T, H, D] -> the same; causal without a mask [B, 1, T, T]."""
        q, k, v = (self._heads_first(x) for x in (q, k, v))
        return _sdpa(q, k, v, mask).transpose(1, 2).flatten(0, 1)

    def _rotation(self, positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """cos and sin, each [B * T, 1, D / 2] float32: the same for all layers of a pass."""
        if (key := (head_dim, theta)) not in self._rotations:
            half = head_dim // 2
            exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / -half
            angles = positions[:, None, None].float() * theta**exponents
            self._rotations[key] = angles.cos(), angles.sin()
        return self._rotations[key]

    def _band(self, blocks: int, size: int) -> Tensor:
        """[B * blocks, 1, W, 2 W] bool: a query sees itself and W - 1 keys before; block 0 has none before it."""
        if size not in self._bands:
            query = torch.arange(size, device=self._device)[:, None]
            key = torch.arange(2 * size, device=self._device)
            band = ((key > query) & (key <= query + size)).repeat(blocks, 1, 1)
            band[0, :, :size] = False
            self._bands[size] = band.repeat(self._batch, 1, 1)[:, None]
        return self._bands[size]


def _with_block_before(x: Tensor, blocks: int) -> Tensor:
    """[B, G, blocks * W, D] -> [B * blocks, G, 2 W, D]: each block behind the one before it."""
    x = x.unflatten(2, (blocks, -1)).transpose(1, 2)  # [B, blocks, G, W, D]
    before = F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat([before, x], dim=3).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [n, H, T, D], k and v [n, G, S, D] -> [n, H, T, D]; causal without a mask."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _not_in_training(what: str) -> NoReturn:
    raise BackendError(f"{what} belongs to serving; the training ops do not have it")
