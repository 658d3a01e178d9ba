"""One decode step's ops with inputs of their own: several sets of them, so that a cache is not the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from clsa.batch import upload
from clsa.bench import gates
from clsa.bench.random_arrays import RandomRows, fill_memory, fill_window
from clsa.bench.timing import Call
from clsa.config import PAGE_SIZE, ModelConfig, SamplingParams
from clsa.ops import Array, Memory, Ops, Queries, Selection
from clsa.sampling import SamplingRow, pack_sampling

ROTATION_BYTES = 256 << 20  # that all sets of inputs of an op should read together, where memory allows
MAX_SETS = 16
MEMORY_SHARE = 0.5  # of the free memory that inputs may take

OPS = (
    "select",
    "gather_attention",
    "dense_attention",
    "sliding_attention",
    "linear",
    "mlp",
    "lm_head",
    "sample",
    "sample_top_p",
)


@dataclass(frozen=True, slots=True)
class OpCase:
    """An op and its inputs: `run(i)` calls it on the i-th set, `gate` judges what it returned for the first."""

    op: str
    run: Call
    num_inputs: int
    gate: gates.Gate
    note: str = ""


@dataclass(frozen=True, slots=True)
class Paged:
    """A memory larger than any cache, and several batches of queries that lie in it."""

    memory: Memory
    batches: list[Queries]
    note: str


class OpInputs:
    """Makes the cases of one model size, context and batch. Large inputs are made when they are first needed."""

    def __init__(self, ops: Ops, config: ModelConfig, dtype: str, context: int, batch: int) -> None:
        self._ops, self._config, self._dtype = ops, config, dtype
        self._context, self._batch = context, batch
        self._rng = np.random.default_rng([context, batch])
        self._paged: Paged | None = None

    def cases(self, names: tuple[str, ...]) -> Iterator[OpCase]:
        """The cases of these ops, made one after the other."""
        makers: dict[str, Callable[[], OpCase]] = {
            "select": self._select,
            "gather_attention": self._gather,
            "dense_attention": self._dense,
            "sliding_attention": self._sliding,
            "linear": lambda: self._linear("linear", self._config.intermediate_size),
            "mlp": self._mlp,
            "lm_head": lambda: self._linear("lm_head", self._config.vocab_size),
            "sample": lambda: self._sample("sample", SamplingParams()),
            "sample_top_p": lambda: self._sample("sample_top_p", SamplingParams(temperature=0.8, top_p=0.95)),
        }
        for name in names:
            yield makers[name]()

    # -- over the memory ---------------------------------------------------------------------------------------------
    def _select(self) -> OpCase:
        ops, paged, c = self._ops, self._pages(), self._config
        q_idx = [self._rows(c.index_head_dim) for _ in paged.batches]

        def run(i: int) -> Any:
            return ops.select(q_idx[i], paged.memory, paged.batches[i], c.index_topk, 1)

        gate = gates.select_gate(ops, q_idx[0], paged.memory, paged.batches[0], c.index_topk)
        return OpCase("select", run, len(paged.batches), gate, paged.note)

    def _gather(self) -> OpCase:
        ops, paged = self._ops, self._pages()
        q = [self._heads(self._config.num_attention_heads) for _ in paged.batches]
        chosen = [self._selection(queries) for queries in paged.batches]
        selections = [Selection(*(ops.asarray(x) for x in host)) for host in chosen]

        def run(i: int) -> Any:
            return ops.gather_attention(q[i], paged.memory, selections[i])

        gate = gates.attention_gate(ops, q[0], paged.memory, lambda b: chosen[0][1][b], self._dtype)
        return OpCase("gather_attention", run, len(paged.batches), gate, paged.note)

    def _dense(self) -> OpCase:
        ops, paged = self._ops, self._pages()
        q = [self._heads(self._config.num_attention_heads) for _ in paged.batches]

        def run(i: int) -> Any:
            return ops.dense_attention(q[i], paged.memory, paged.batches[i])

        rows = gates.rows_of
        gate = gates.attention_gate(ops, q[0], paged.memory, lambda b: rows(paged.batches[0], ops, b), self._dtype)
        return OpCase("dense_attention", run, len(paged.batches), gate, paged.note)

    def _pages(self) -> Paged:
        if self._paged is None:
            self._paged = self._make_pages()
        return self._paged

    def _make_pages(self) -> Paged:
        ops, c = self._ops, self._config
        per_sequence = -(-self._context // PAGE_SIZE)
        index_bytes = c.index_head_dim * ops.itemsize(self._dtype)
        row_bytes = index_bytes + 2 * c.num_key_value_heads * c.head_dim * ops.itemsize(self._dtype)
        wanted = self._batch * per_sequence
        sets = max(1, min(MAX_SETS, -(-ROTATION_BYTES // (wanted * PAGE_SIZE * index_bytes))))
        fit = int(MEMORY_SHARE * ops.memory_stats()["free"]) // (row_bytes * PAGE_SIZE)
        pages = max(per_sequence, min(sets * wanted, fit))
        sets = max(1, min(sets, pages // wanted))
        memory = ops.new_memory(pages * PAGE_SIZE, c.num_key_value_heads, c.head_dim, c.index_head_dim, self._dtype)
        kv = RandomRows(ops, c.num_key_value_heads * c.head_dim, self._dtype, seed=2)
        memory = fill_memory(ops, memory, c, pages * PAGE_SIZE, kv, RandomRows(ops, c.index_head_dim, self._dtype, 2))
        order = self._rng.permutation(pages)
        batches = [self._queries(order[(np.arange(wanted) + i * wanted) % pages]) for i in range(sets)]
        note = "" if pages >= wanted else f"sequences share pages: {pages:,} of {wanted:,} fit"
        return Paged(memory, batches, note)

    def _queries(self, pages: np.ndarray) -> Queries:
        """Decode queries at the last position of each sequence, whose pages lie anywhere."""
        batch, context, ops = self._batch, self._context, self._ops
        ids = np.arange(batch, dtype=np.int32)
        positions = np.full(batch, context - 1, np.int32)
        table = pages.reshape(batch, -1).astype(np.int32)
        rows = ops.asarray(ids)
        cu_seqlens, lengths = tuple(range(batch + 1)), (context,) * batch
        return Queries(ops.asarray(positions), rows, ops.asarray(table), rows, cu_seqlens, lengths)

    def _selection(self, queries: Queries) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random positions, their rows, and their number, on the host."""
        k = self._config.index_topk
        count = min(k, self._context)
        positions = np.full((self._batch, k), -1, np.int32)
        rows = positions.copy()
        for b in range(self._batch):
            positions[b, :count] = np.sort(self._rng.permutation(self._context)[:count])
            rows[b, :count] = gates.rows_of(queries, self._ops, b)[positions[b, :count]]
        return positions, rows, np.full(self._batch, count, np.int32)

    # -- over the rest -----------------------------------------------------------------------------------------------
    def _sliding(self) -> OpCase:
        ops, c = self._ops, self._config
        ring_bytes = 2 * c.sliding_window * c.num_key_value_heads * c.head_dim * ops.itemsize(self._dtype)
        sets = max(1, min(MAX_SETS, -(-ROTATION_BYTES // (self._batch * ring_bytes))))
        kv = RandomRows(ops, c.num_key_value_heads * c.head_dim, self._dtype, seed=3)
        queries = self._queries(np.arange(self._batch * -(-self._context // PAGE_SIZE)))
        windows, inputs = [], []
        for _ in range(sets):
            empty = ops.new_window(self._batch, c.sliding_window, c.num_key_value_heads, c.head_dim, self._dtype)
            windows.append(fill_window(ops, empty, c, self._batch * c.sliding_window, kv))
            kv_heads = c.num_key_value_heads
            inputs.append((self._heads(c.num_attention_heads), self._heads(kv_heads), self._heads(kv_heads)))

        def run(i: int) -> Any:
            q, k, v = inputs[i]
            return ops.sliding_attention(q, k, v, windows[i], queries)

        gate = gates.sliding_gate(ops, *inputs[0], windows[0], queries, self._dtype)
        return OpCase("sliding_attention", run, sets, gate)

    def _linear(self, name: str, width: int) -> OpCase:
        ops, c = self._ops, self._config
        source = RandomRows(ops, c.hidden_size, self._dtype, seed=4, std=0.02)
        weights = [source.matrix(width) for _ in range(self._weight_sets(c.hidden_size * width))]
        x = self._rows(c.hidden_size)
        gate = gates.linear_gate(ops, x, weights[0], self._dtype)
        return OpCase(name, lambda i: ops.linear(x, weights[i]), len(weights), gate)

    def _mlp(self) -> OpCase:
        ops, c = self._ops, self._config
        wide = RandomRows(ops, c.hidden_size, self._dtype, seed=5, std=0.02)
        narrow = RandomRows(ops, c.intermediate_size, self._dtype, seed=5, std=0.02)
        weights = [
            (wide.matrix(c.intermediate_size), wide.matrix(c.intermediate_size), narrow.matrix(c.hidden_size))
            for _ in range(self._weight_sets(3 * c.hidden_size * c.intermediate_size))
        ]
        x = self._rows(c.hidden_size)

        def run(i: int) -> Any:
            gate, up, down = weights[i]
            return ops.linear(ops.swiglu(ops.linear(x, gate), ops.linear(x, up)), down)

        return OpCase("mlp", run, len(weights), gates.mlp_gate(ops, x, weights[0], self._dtype))

    def _sample(self, name: str, params: SamplingParams) -> OpCase:
        ops, vocab = self._ops, self._config.vocab_size
        logits = ops.asarray(2 * self._rng.standard_normal((self._batch, vocab), np.float32))
        rows = [SamplingRow(params, self._context, ()) for _ in range(self._batch)]
        packed, _ = pack_sampling(rows)
        sampling = upload(ops, packed)
        gate = gates.sample_gate(ops, logits, packed)
        return OpCase(name, lambda i: ops.sample(logits, sampling), 1, gate)

    def _weight_sets(self, numbers: int) -> int:
        num_bytes = numbers * self._ops.itemsize(self._dtype)
        fit = int(MEMORY_SHARE * self._ops.memory_stats()["free"]) // num_bytes
        return max(1, min(MAX_SETS, -(-ROTATION_BYTES // num_bytes), fit))

    def _rows(self, width: int) -> Array:
        return self._ops.asarray(self._rng.standard_normal((self._batch, width), np.float32), self._dtype)

    def _heads(self, heads: int) -> Array:
        return self._rows(heads * self._config.head_dim).reshape(self._batch, heads, -1)
