"""The values that cross between the model and an array library; `clsa.ops` hands them on, and explains the letters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

Array = Any  # the backend's array type
Weight = Any  # an Array [out, in], or what `quantized_weight` or `float8_weight` returned


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [out, in] of 4- or 8-bit integers q with a scale and a bias per group: w = scale * q + bias.

    The layout of mlx.core.quantize: a group is `group_size` neighbours of a row; 32 / bits integers share a word, the
    first in its lowest bits.
    """

    packed: Array  # [out, in * bits / 32] uint32
    scales: Array  # [out, in / group_size] floating point
    biases: Array  # [out, in / group_size] floating point
    group_size: int  # 32, 64 or 128
    bits: int  # 4 or 8


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """A matrix [out, in] of float8 E4M3 with a scale per row: w = scale * value (`clsa.float8`)."""

    values: Array  # [out, in] E4M3
    scales: Array  # [out] float32: the largest magnitude of the row / 448, or 1 for a row of zeros


@dataclass(frozen=True, slots=True)
class Memory:
    """The global state that layers share: one row per token, addressed through pages (paper, section 2.1).

    Row `page * P + offset` holds one token; a page never belongs to two sequences unless they share the tokens.
    What `MemoryDtypes` asks to be "fp8" is stored as float8 E4M3 without a scale: K, V and K_idx are projections of
    normed rows, far below its largest number. Only ops look inside.
    """

    k: Array  # [N, G, D]
    v: Array  # [N, G, D]
    k_idx: Array | None  # [N, I]; None where no layer computes an index on this memory


@dataclass(frozen=True, slots=True)
class Window:
    """The last W tokens of each sequence for one sliding layer: a ring, position p at row `slot * W + p % W`."""

    k: Array  # [slots * W, G, D]
    v: Array  # [slots * W, G, D]
    size: int  # W


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """What turns the projections of a sliding layer into its queries and keys: QK norm, then rotary positions."""

    q: Array  # [D]
    k: Array  # [D]
    eps: float
    theta: float


@dataclass(frozen=True, slots=True)
class State:
    """All state of a model: `memories[plan.layers[i].memory]`, `windows[plan.layers[i].window]`."""

    memories: tuple[Memory, ...]
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """What the index chose, once per step: a set of positions per query, the same for all heads and layers.

    `rows` are the physical rows of those positions; every memory has the same pages, so the page table is walked
    once per step and not once per layer.
    """

    positions: Array  # [T, K] int32, ascending, -1 padded at the end
    rows: Array  # [T, K] int32, physical rows in the same order, -1 padded
    lengths: Array  # [T] int32, how many are valid


@dataclass(frozen=True, slots=True)
class Queries:
    """Who asks: T tokens of B sequences, packed sequence after sequence, positions ascending inside each.

    The two host tuples repeat what the arrays say, so that plain code can loop and kernels can size a grid without
    waiting for the device. Rows of sequence b are `cu_seqlens[b]:cu_seqlens[b + 1]`.
    """

    positions: Array  # [T] int32; -1 is a padded row
    sequence: Array  # [T] int32, row of block_table and window_slots
    block_table: Array  # [B, M] int32 page ids, -1 beyond the sequence's pages
    window_slots: Array  # [B] int32
    cu_seqlens: tuple[int, ...]  # host, B + 1 entries
    context_lens: tuple[int, ...]  # host, per sequence: highest query position + 1, or a bound above it

    @property
    def one_each(self) -> bool:
        """Whether every sequence asks with exactly one token (a decode step)."""
        return self.cu_seqlens == tuple(range(len(self.cu_seqlens)))


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step of the model: which tokens enter, where their state goes, whose logits are wanted.

    `logits_rows` None means that every row's logits are wanted (decode, evaluation); otherwise `logits_queries`
    describes the R rows that remain after the prefill exit.
    """

    tokens: Array  # [T] int32
    queries: Queries
    slot_mapping: Array  # [T] int32, row of the memories that the token is written to; -1: nowhere
    ring_mapping: Array  # [T] int32, row of the windows; -1: not among the last W tokens of its chunk
    logits_rows: Array | None  # [R] int32
    logits_queries: Queries | None

    @property
    def wants_logits(self) -> bool:
        """False for a chunk in the middle of a prompt: only its state is wanted."""
        return self.logits_rows is None or self.logits_rows.shape[0] > 0


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of R rows. The host flags only skip work; they never change a result."""

    temperature: Array  # [R] float32; 0 is greedy
    top_k: Array  # [R] int32; 0 is off
    top_p: Array  # [R] float32
    min_p: Array  # [R] float32
    repetition_penalty: Array  # [R] float32
    seed: Array  # [R, 2] uint32: low and high word
    positions: Array  # [R] int32: the position the sampled token will have
    penalty_tokens: Array | None  # [R, n] int32, -1 padded: tokens seen so far; None if no row has a penalty
    num_logprobs: int | None  # host: best tokens to report; None reports nothing
    all_greedy: bool  # host: every temperature is 0
    any_filter: bool  # host: some row uses top_k, top_p or min_p


@dataclass(frozen=True, slots=True)
class Sampled:
    """Result of `sample`; the three optional arrays are None unless `num_logprobs` was given."""

    tokens: Array  # [R] int32
    logprobs: Array | None  # [R] float32, of the sampled token under the unmodified distribution
    top_tokens: Array | None  # [R, n] int32, best first, equal ones by lower id
    top_logprobs: Array | None  # [R, n] float32


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows on their way through the layers: all T of them up to the prefill exit, the R wanted ones after it."""

    x: Array  # [T, C] or [R, C]
    queries: Queries
    selection: Selection | None  # the last one computed, whatever kind of layer did
    made: Mapping[str, Array] | None = None  # by name: what the layer that wrote a memory has projected for its queries


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Everything one step needs besides weights and state. On the host all arrays are NumPy's.

    A token that the step before has sampled is not on the host yet. The two sources tell where each token comes
    from: an index below the number of entries is the entry itself, an index beyond is a row of that sample.
    """

    batch: StepBatch
    sampling: SamplingBatch | None  # None where no logits are wanted
    token_source: Array | None  # [T] int32, into tokens and then the sample; None if all are known
    penalty_source: Array | None  # [R * n] int32, likewise for sampling.penalty_tokens


@dataclass(frozen=True, slots=True)
class RestInputs:
    """What a step needs from its prefill exit on, where each sequence has one row left, as in a decode step."""

    rows: Rows  # `x` and `selection` are on the device already, `queries` is the host's
    sampling: SamplingBatch
    penalty_source: Array | None  # as in StepInputs


Compute = Callable[[Any, Array | None, State], tuple[Sampled | None, State]]
# (StepInputs or RestInputs, tokens [n] int32 of the sample before, state) -> sample, new state


def map_arrays(value: Any, change: Callable[[Any], Any], kind: type = np.ndarray) -> Any:
    """A value with `change` applied to every array of a kind in it; dataclasses are walked, anything else is kept."""
    if isinstance(value, kind):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_arrays(getattr(value, f.name), change, kind) for f in fields(value)})
    return value


@dataclass(frozen=True, slots=True)
class StepSize:
    """How much one step takes at most: sequences that run together, and tokens of prompts and answers.

    A step with prompts is not recorded up to its prefill exit, so between steps that are it costs the host some
    milliseconds more. It pays for `min_prompt_tokens` of prompts; fewer wait for others to come, for some steps.
    """

    max_num_seqs: int
    max_tokens_per_step: int
    min_prompt_tokens: int = 1
