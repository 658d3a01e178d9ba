"""The narrow protocol between the model and an array library, and the values that cross it.

Letters used in every shape, here and inside the kernels:

    T  query tokens of a step, packed           B  sequences of a step
    R  rows whose logits are wanted             S  cached tokens of a sequence
    H  query heads      G  KV heads             D  head dim            I  index head dim
    K  selected tokens  P  page size            W  sliding window      N  physical rows of a memory
    M  pages of the longest sequence            C  hidden size         V  vocabulary

`Array` is whatever the backend uses. Shared code touches arrays only through these functions and through what
NumPy, MLX and torch spell alike: `.shape`, `.reshape(...)` and `+`.

Rules that hold for every op of every backend:
- float32 (or wider) accumulation in norms, softmax and scores; results come back in the dtype of the input;
- values in, values out: a write returns the new state, and the old one must not be used again;
- -1 in a mapping writes nothing, -1 in a selection is never read, a query at position -1 sees nothing;
- a query that sees nothing gets zeros; every output element is written;
- scores have a total order: +inf first, NaN counts as -inf, equal scores go to the lower position;
- a selection carries no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clsa.config import MODEL_DTYPE, MemoryDtypes
from clsa.values import (
    Array,
    Compute,
    Float8Weight,
    HeadNorms,
    Memory,
    QuantizedWeight,
    Queries,
    RestInputs,
    Rows,
    Sampled,
    SamplingBatch,
    Selection,
    State,
    StepBatch,
    StepInputs,
    StepSize,
    Weight,
    Window,
    map_arrays,
)

__all__ = [
    "Array",
    "Backend",
    "Compute",
    "Device",
    "Float8Weight",
    "HeadNorms",
    "Memory",
    "Ops",
    "QuantizedWeight",
    "Queries",
    "RestInputs",
    "Rows",
    "Sampled",
    "SamplingBatch",
    "Selection",
    "State",
    "StepBatch",
    "StepInputs",
    "StepSize",
    "Weight",
    "Window",
    "map_arrays",
]


class Ops(Protocol):
    """What the model needs of an array library. A module with these functions is an `Ops`."""

    name: str  # "numpy", "mlx", "cuda"
    device: str  # what it computes on, in words a user reads
    step_size: StepSize  # what this device works best with, if nobody says otherwise and the memory allows it
    temporary_bytes: int  # what one op may take beside its arguments and its result, whatever their sizes
    records_rest: bool  # whether what `record` gives takes a RestInputs too: pays where launches take longer than work
    keeps_quantized: bool  # whether a quantised weight stays one on the device; if not, it becomes a dense one
    no_fp8: Mapping[str, str]  # "memory" and "weights", where this device cannot keep them in E4M3: why, what helps

    # -- arrays ------------------------------------------------------------------------------------------
    def asarray(self, x: np.ndarray, dtype: str | None = None) -> Array:
        """Move a host array (numeric, or ml_dtypes.bfloat16) to the device, as `dtype` if given."""
        ...

    def quantized_weight(self, host: QuantizedWeight, dtype: str) -> Weight:
        """Move a quantised matrix of host arrays to the device, its scales and biases rounded to `dtype`.

        `linear` and `embed` take the result in place of an array of `dtype`; they compute with w = scale * q + bias.
        """
        ...

    def float8_weight(self, weight: Array) -> Weight:
        """A Float8Weight of an array [out, in], its scales and quotients made in float32; `linear` takes it."""
        ...

    def asarrays(self, arrays: Sequence[np.ndarray]) -> list[Array]:
        """`asarray` of the many small arrays of a step, in as few transfers as the backend can."""
        ...

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[np.ndarray]]:
        """Start copying to the host; calling the result waits for these arrays and for nothing started later."""
        ...

    def to_numpy(self, x: Array) -> np.ndarray:
        """Wait for `x` and copy it to the host; bfloat16 and the E4M3 of a memory arrive as float32."""
        ...

    def cast(self, x: Array, dtype: str) -> Array:
        """`x` as "float32", "bfloat16", "float16" or "int32"."""
        ...

    def itemsize(self, dtype: str) -> int:
        """Bytes that one stored value of this dtype, or "fp8", takes (float64 on the specification: 8)."""
        ...

    def take(self, x: Array, rows: Array, behind: Array | None = None) -> Array:
        """Rows of `x` along the first axis: [T, ...], [R] int32 -> [R, ...].

        Row T and those after it are the first of `behind` [S, ...] and those after it, of the same dtype.
        """
        ...

    def concat(self, arrays: Sequence[Array]) -> Array:
        """Join along the first axis; all other sizes and the dtypes agree."""
        ...

    def evaluate(self, *values: Any) -> None:
        """Start the computation of arrays inside these values (tuples, dataclasses); a hint for lazy backends."""
        ...

    def memory_stats(self) -> dict[str, int]:
        """Bytes on the device: `total`, `free` (what may still be allocated), `peak` (since the process began)."""
        ...

    def record(self, compute: Compute) -> Compute | None:
        """A way to repeat a decode step faster than by calling `compute`, or None if this backend has none.

        `compute` takes a StepInputs of device arrays. What is returned takes one of host arrays, in which every
        sequence asks with one token, rows may be padded and `context_lens` are bounds; it gives the same result.
        With `records_rest` both take a RestInputs as well, and only what its comments say is on the device before.
        What it samples may be overwritten by its next call, unless `fetch` was called before that.
        """
        ...

    # -- the model's plain functions -----------------------------------------------------------------------
    def embed(self, weight: Weight, tokens: Array) -> Array:
        """[V, C], [T] int32 -> [T, C]. Token -1 (a sample that failed, not read back yet) gives any finite row."""
        ...

    def linear(self, x: Array, weight: Weight) -> Array:
        """x @ weight.T: [..., in], [out, in] -> [..., out]."""
        ...

    def linears(self, x: Array, weights: Sequence[Weight]) -> tuple[Array, ...]:
        """`linear` of the same x with each of several weights; a backend may do them as one product."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, returned in x's dtype."""
        ...

    def norm_linears(
        self, x: Array, norm: Array, eps: float, weights: Sequence[Weight], dtype: str | None = None
    ) -> tuple[Array, ...]:
        """How a block reads the residual stream: `linears` of `rms_norm(x, norm, eps)`, in `dtype` or x's.

        With a wider `dtype` a backend may skip the rounding to x's.
        """
        ...

    def norm_swiglu(self, x: Array, norm: Array, eps: float, gate: Weight, up: Weight) -> Array:
        """The first half of a feed-forward block: `swiglu` of the two products of `rms_norm(x, norm, eps)`."""
        ...

    def add_linear(self, x: Array, y: Array, weight: Weight) -> Array:
        """How a block ends: x + linear(y, weight), rounded to x's dtype once or, between the two, twice."""
        ...

    def close_layer(
        self, x: Array, o: Array, o_proj: Weight, norm: Array, eps: float, gate: Weight, up: Weight, down: Weight
    ) -> Array:
        """How a layer ends, of what was attended o [T, H * D]: x = add_linear(x, o, o_proj), and then
        add_linear(x, norm_swiglu(x, norm, eps, gate, up), down)."""
        ...

    def norm_rope(self, x: Array, weight: Array, eps: float, positions: Array, theta: float) -> Array:
        """QK norm and positions of a projection: [T, H, D], [D], [T] -> [T, H, D].

        `rms_norm` over the last axis, then rotary positions in the half-split form: with f = theta^(-i / (D / 2))
        and the angle position * f in float32, (a, b) of the two halves becomes (a cos - b sin, b cos + a sin).
        """
        ...

    def swiglu(self, gate: Array, up: Array) -> Array:
        """silu(gate) * up."""
        ...

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
        """An empty memory of at least `rows` rows. A backend may keep rows of its own behind them."""
        ...

    def new_window(self, slots: int, window: int, kv_heads: int, head_dim: int, dtype: str) -> Window:
        """Empty rings for `slots` sequences."""
        ...

    def write_memory(self, memory: Memory, k: Array, v: Array, k_idx: Array | None, slot_mapping: Array) -> Memory:
        """Put token t at row slot_mapping[t]. k, v [T, G, D], k_idx [T, I] or None; E4M3 rounds as in clsa.float8."""
        ...

    def write_window(self, window: Window, k: Array, v: Array, ring_mapping: Array) -> Window:
        """Put token t at ring row ring_mapping[t]. No row occurs twice. k, v [T, G, D]."""
        ...

    def copy_window(self, window: Window, source: Array, target: Array) -> Window:
        """Copy whole rings: slot source[i] to slot target[i], both [n] int32, disjoint."""
        ...

    # -- routing and attention -----------------------------------------------------------------------------
    def select(self, q_idx: Array, memory: Memory, queries: Queries, k: int, block_size: int) -> Selection:
        """The k best visible tokens of each query by q_idx . k_idx (paper, equations 1-3); exact.

        Args: q_idx [T, I]. A query at position p sees 0..p of its sequence. With `block_size` b > 1 whole aligned
        blocks of b tokens are chosen by their best visible score, k / b of them; tokens after p are left out.
        Fewer visible tokens than k: all of them, -1 padded. The 1/sqrt(I) scale does not matter here.
        """
        ...

    def take_selection(self, selection: Selection, rows: Array) -> Selection:
        """The selection of a subset of queries, rows [R] int32."""
        ...

    def gather_attention(self, q: Array, memory: Memory, selection: Selection) -> Array:
        """GQA attention over the selected rows, scale 1/sqrt(D): [T, H, D] -> [T, H, D] (equation 4)."""
        ...

    def dense_attention(self, q: Array, memory: Memory, queries: Queries) -> Array:
        """Causal GQA attention over all visible rows: [T, H, D] -> [T, H, D]."""
        ...

    def sliding_attention(self, q: Array, k: Array, v: Array, window: Window, queries: Queries) -> Array:
        """Position p attends to p-W+1..p: what came before this chunk from the ring, the chunk from k, v [T, G, D].

        `window` is the state before this chunk's write; [T, H, D] -> [T, H, D].
        """
        ...

    def attend_window(
        self, q: Array, k: Array, v: Array, norms: HeadNorms, window: Window, queries: Queries, ring_mapping: Array
    ) -> tuple[Array, Window]:
        """A sliding layer between its projections: `norm_rope` of q and k, `sliding_attention`, `write_window`.

        q [T, H, D], k and v [T, G, D] as projected -> what was attended [T, H, D], and the window with the chunk in it.
        """
        ...

    # -- sampling ------------------------------------------------------------------------------------------
    def sample(self, logits: Array, sampling: SamplingBatch) -> Sampled:
        """Draw one token per row: [R, V] float32 -> tokens [R]. A pure function of its arguments.

        Order: repetition penalty, temperature, min-p, top-k, top-p, then argmax of logits + Gumbel noise from
        Threefry-2x32 (key: seed, counter: position, token id). Filters keep tokens equal to the last one kept.
        Greedy rows take the best penalised logit, equal ones by lower id. A row with NaN, or whose best logit is
        not finite, gives token -1: there is nothing to sample from.
        """
        ...


@dataclass(frozen=True, slots=True)
class Device:
    """What a backend could run on, as `clsa.backends()` and `clsa info` report it."""

    name: str  # what the user may pass as `device`
    kind: str  # "nvidia", "metal" or "cpu"
    usable: bool
    reason: str  # why not, and what would help; or what it is, if usable


class Backend(Protocol):
    """What an entry point of the group `clsa.backends` names. Importing it must not import the array library."""

    name: str

    def devices(self) -> list[Device]:
        """All devices of this backend, usable or not; never raises."""
        ...

    def open(self, device: str | None = None) -> Ops:
        """The ops on that device (default: the best usable). Raises BackendError if it cannot run."""
        ...
