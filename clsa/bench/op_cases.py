"""One decode step's ops with inputs of their own: several sets of them, so that a cache is not the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clsa.batch import upload
from clsa.bench import gates
from clsa.bench.random_arrays import RandomRows, fill_memory, fill_window
from clsa.config import MODEL_DTYPE, PAGE_SIZE, MemoryDtypes, ModelConfig, SamplingParams
from clsa.ops import Array, HeadNorms, Memory, Ops, Queries, Selection, Weight
from clsa.sampling import SamplingRow, pack_sampling

ROTATION_BYTES = 256 << 20  # that all sets of inputs of an op should read together, where memory allows
MAX_SETS = 16
MEMORY_SHARE = 0.5  # of the free memory that inputs may take

EACH_CONTEXT = ("select", "gather_attention", "dense_attention", "attend_window")  # the others do not depend on it
OPS = (*EACH_CONTEXT, "linear", "close_layer", "lm_head", "sample", "sample_top_p")


@dataclass(frozen=True, slots=True)
class OpCase:
    """An op and its inputs. `gate` judges what the first set gave, whoever computed it."""

    op: str
    call: Callable[..., Any]
    arguments: Sequence[tuple[Any, ...]]  # one tuple for each set of inputs
    gate: gates.Gate
    note: str = ""

    @property
    def num_inputs(self) -> int:
        return len(self.arguments)

    def run(self, i: int) -> Any:
        """Call the op on the i-th set of inputs."""
        return self.call(*self.arguments[i])


@dataclass(frozen=True, slots=True)
class Paged:
    """A memory larger than any cache, and several batches of queries that lie in it."""

    memory: Memory
    batches: list[Queries]
    note: str


class OpInputs:
    """Makes the cases of one model size, context and batch. Large inputs are made when they are first needed."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        dtype: str,
        context: int,
        batch: int,
        stored: MemoryDtypes = MODEL_DTYPE,
        weight_dtype: str | None = None,
        *,
        chunk: int = 1,
        max_sets: int = MAX_SETS,
    ) -> None:
        """`chunk` queries of each sequence at the end of its context, as in prefill (`gather_attention` takes 1)."""
        self._ops, self._config, self._dtype = ops, config, dtype
        self._context, self._batch, self._chunk, self._max_sets = context, batch, chunk, max_sets
        self._stored, self._weight_dtype = stored, weight_dtype
        self._rng = np.random.default_rng([context, batch])
        self._paged: Paged | None = None

    def cases(self, names: tuple[str, ...]) -> Iterator[OpCase]:
        """The cases of these ops, made one after the other."""
        makers: dict[str, Callable[[], OpCase]] = {
            "select": self._select,
            "gather_attention": self._gather,
            "dense_attention": self._dense,
            "attend_window": self._window,
            "linear": lambda: self._linear("linear", self._config.intermediate_size, self._weight_dtype),
            "close_layer": self._close_layer,
            "lm_head": lambda: self._linear("lm_head", self._config.vocab_size),
            "sample": lambda: self._sample("sample", SamplingParams()),
            "sample_top_p": lambda: self._sample("sample_top_p", SamplingParams(temperature=0.8, top_p=0.95)),
        }
        for name in names:
            yield makers[name]()

    # -- over the memory ---------------------------------------------------------------------------------------------
    def _select(self) -> OpCase:
        ops, paged, c = self._ops, self._pages(), self._config
        sets = [(self._rows(c.index_head_dim), paged.memory, queries, c.index_topk, 1) for queries in paged.batches]
        return OpCase("select", ops.select, sets, gates.select_gate(ops, *sets[0][:4]), paged.note)

    def _gather(self) -> OpCase:
        ops, paged = self._ops, self._pages()
        chosen = [self._selection(queries) for queries in paged.batches]
        selections = [Selection(*(ops.asarray(x) for x in host)) for host in chosen]
        sets = [(self._heads(self._config.num_attention_heads), paged.memory, selected) for selected in selections]
        gate = gates.attention_gate(ops, sets[0][0], paged.memory, lambda b: chosen[0][1][b], self._dtype)
        return OpCase("gather_attention", ops.gather_attention, sets, gate, paged.note)

    def _dense(self) -> OpCase:
        ops, paged = self._ops, self._pages()
        sets = [(self._heads(self._config.num_attention_heads), paged.memory, queries) for queries in paged.batches]
        q, memory, queries = sets[0]
        gate = gates.attention_gate(ops, q, memory, lambda b: gates.rows_of(queries, ops, b), self._dtype)
        return OpCase("dense_attention", ops.dense_attention, sets, gate, paged.note)

    def _pages(self) -> Paged:
        if self._paged is None:
            self._paged = self._make_pages()
        return self._paged

    def _make_pages(self) -> Paged:
        ops, c = self._ops, self._config
        per_sequence = -(-self._context // PAGE_SIZE)
        index_bytes = c.index_head_dim * ops.itemsize(self._stored.index or self._dtype)
        kv_numbers = 2 * c.num_key_value_heads * c.head_dim
        row_bytes = index_bytes + kv_numbers * ops.itemsize(self._stored.kv or self._dtype)
        wanted = self._batch * per_sequence
        sets = max(1, min(self._max_sets, -(-ROTATION_BYTES // (wanted * PAGE_SIZE * index_bytes))))
        fit = int(MEMORY_SHARE * ops.memory_stats()["free"]) // (row_bytes * PAGE_SIZE)
        pages = max(per_sequence, min(sets * wanted, fit))
        sets = max(1, min(sets, pages // wanted))
        memory = ops.new_memory(
            pages * PAGE_SIZE, c.num_key_value_heads, c.head_dim, c.index_head_dim, self._dtype, self._stored
        )
        kv = RandomRows(ops, c.num_key_value_heads * c.head_dim, self._dtype, seed=2)
        memory = fill_memory(ops, memory, c, pages * PAGE_SIZE, kv, RandomRows(ops, c.index_head_dim, self._dtype, 2))
        order = self._rng.permutation(pages)
        batches = [self._queries(order[(np.arange(wanted) + i * wanted) % pages]) for i in range(sets)]
        note = "" if pages >= wanted else f"sequences share pages: {pages:,} of {wanted:,} fit"
        return Paged(memory, batches, note)

    def _queries(self, pages: np.ndarray) -> Queries:
        """Queries at the last positions of each sequence, whose pages lie anywhere."""
        batch, context, chunk, ops = self._batch, self._context, self._chunk, self._ops
        ids = np.arange(batch, dtype=np.int32)
        positions = np.tile(np.arange(context - chunk, context, dtype=np.int32), batch)
        table = pages.reshape(batch, -1).astype(np.int32)
        cu_seqlens, lengths = tuple(range(0, batch * chunk + 1, chunk)), (context,) * batch
        sequence = ops.asarray(np.repeat(ids, chunk))
        return Queries(ops.asarray(positions), sequence, ops.asarray(table), ops.asarray(ids), cu_seqlens, lengths)

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
    def _window(self) -> OpCase:
        ops, c = self._ops, self._config
        ring_bytes = 2 * c.sliding_window * c.num_key_value_heads * c.head_dim * ops.itemsize(self._dtype)
        sets = max(1, min(self._max_sets, -(-ROTATION_BYTES // (self._batch * ring_bytes))))
        kv = RandomRows(ops, c.num_key_value_heads * c.head_dim, self._dtype, seed=3)
        queries = self._queries(np.arange(self._batch * -(-self._context // PAGE_SIZE)))
        norms = HeadNorms(self._head_norm(), self._head_norm(), c.rms_norm_eps, c.rope_theta)
        own = np.arange(self._batch) * c.sliding_window + (self._context - 1) % c.sliding_window
        ring_mapping = ops.asarray(own.astype(np.int32))
        inputs = []
        for _ in range(sets):
            empty = ops.new_window(self._batch, c.sliding_window, c.num_key_value_heads, c.head_dim, self._dtype)
            window = fill_window(ops, empty, c, self._batch * c.sliding_window, kv)
            q, k, v = (self._heads(h) for h in (c.num_attention_heads, *[c.num_key_value_heads] * 2))
            inputs.append((q, k, v, norms, window, queries, ring_mapping))
        q, k, v, *_ = inputs[0]
        gate = gates.window_gate(ops, q, k, v, norms, queries, ring_mapping, self._dtype)
        return OpCase("attend_window", ops.attend_window, inputs, gate)

    def _head_norm(self) -> Array:
        """Weight of a norm over one head, around one."""
        return self._ops.asarray(self._rng.normal(1.0, 0.1, self._config.head_dim).astype(np.float32), self._dtype)

    def _linear(self, name: str, width: int, weight_dtype: str | None = None) -> OpCase:
        ops, c = self._ops, self._config
        source = RandomRows(ops, c.hidden_size, self._dtype, seed=4, std=0.02)
        sets = self._weight_sets(c.hidden_size * width, weight_dtype)
        weights = [self._weight(source, width, weight_dtype) for _ in range(sets)]
        x = self._rows(c.hidden_size)
        gate = gates.linear_gate(ops, x, weights[0], self._dtype)
        return OpCase(name, ops.linear, [(x, weight) for weight in weights], gate)

    def _close_layer(self) -> OpCase:
        ops, c = self._ops, self._config
        attended = c.num_attention_heads * c.head_dim
        shapes = {"o": (c.hidden_size, attended), "gate": (c.intermediate_size, c.hidden_size)}
        shapes |= {"up": shapes["gate"], "down": (c.hidden_size, c.intermediate_size)}
        sources = {width: RandomRows(ops, width, self._dtype, seed=5, std=0.02) for _, width in shapes.values()}
        numbers = sum(rows * width for rows, width in shapes.values())
        x, o, norm = self._rows(c.hidden_size), self._rows(attended), self._rows(c.hidden_size)[0]
        sets = []
        for _ in range(self._weight_sets(numbers, self._weight_dtype)):
            out, gate, up, down = (
                self._weight(sources[width], rows, self._weight_dtype) for rows, width in shapes.values()
            )
            sets.append((x, o, out, norm, c.rms_norm_eps, gate, up, down))
        return OpCase("close_layer", ops.close_layer, sets, gates.close_layer_gate(ops, *sets[0], self._dtype))

    def _sample(self, name: str, params: SamplingParams) -> OpCase:
        ops, vocab = self._ops, self._config.vocab_size
        logits = ops.asarray(2 * self._rng.standard_normal((self._batch, vocab), np.float32))
        rows = [SamplingRow(params, self._context, ()) for _ in range(self._batch)]
        packed, _ = pack_sampling(rows)
        sampling = upload(ops, packed)
        gate = gates.sample_gate(ops, logits, packed)
        return OpCase(name, ops.sample, [(logits, sampling)], gate)

    def _weight(self, source: RandomRows, rows: int, weight_dtype: str | None) -> Weight:
        matrix = source.matrix(rows)
        return self._ops.float8_weight(matrix) if weight_dtype else matrix

    def _weight_sets(self, numbers: int, weight_dtype: str | None) -> int:
        num_bytes = numbers * self._ops.itemsize(weight_dtype or self._dtype)
        fit = int(MEMORY_SHARE * self._ops.memory_stats()["free"]) // num_bytes
        return max(1, min(self._max_sets, -(-ROTATION_BYTES // num_bytes), fit))

    def _rows(self, width: int) -> Array:
        shape = (self._batch * self._chunk, width)
        return self._ops.asarray(self._rng.standard_normal(shape, np.float32), self._dtype)

    def _heads(self, heads: int) -> Array:
        return self._rows(heads * self._config.head_dim).reshape(self._batch * self._chunk, heads, -1)
