"""The whole model on random checkpoints of every layer plan: logits, selections, chunks, decode, packing.

Near-equal scores may be told apart differently in float32 and float64, and one exchanged token changes every later
number. So each selection of the backend is held against the specification's own scores (only ties within rounding may
differ), and then both sides go on with the same selection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.batch import SequenceChunk, build_batch
from clsa.config import PAGE_SIZE, ModelConfig
from clsa.model import forward, new_state
from clsa.ops import Ops, Selection
from clsa.params import nest, tensor_shapes
from clsa.plan import make_plan
from tests.ops.replay import ROUTING_SLACK, following, measuring, recording, replaying
from tests.tolerance import assert_close

SLIDING, FULL, CROSS = "sliding_attention", "full_attention", "cross_attention"
VOCAB = 97

PLANS: dict[str, tuple[list[str], str]] = {
    "transformer": ([FULL] * 3, "DDD"),
    "dsa": ([FULL] * 3, "FFF"),
    "indexcache": ([FULL] * 4, "FSFS"),
    "yoco": ([SLIDING] * 2 + [CROSS] * 2, "DD"),
    "clsa": ([SLIDING] * 2 + [CROSS] * 3, "FSS"),
    "mixed": ([SLIDING, CROSS, FULL, CROSS, SLIDING], "FDS"),
    "cross-only": ([CROSS, CROSS, SLIDING], "FF"),
    "sliding-only": ([SLIDING] * 3, ""),
}
# Every plan with one set of sizes, then each size that matters with the plans that use it.
CASES: dict[str, tuple[str, dict[str, int]]] = {
    **{name: (name, {}) for name in PLANS},
    "clsa-group1": ("clsa", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "clsa-group4": ("clsa", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "clsa-group8": ("clsa", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 6}),
    "transformer-group8": ("transformer", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "mixed-group4": ("mixed", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "clsa-long-window": ("clsa", {"sliding_window": 512}),
    "clsa-window1": ("clsa", {"sliding_window": 1}),
    "clsa-k1": ("clsa", {"index_topk": 1}),
    "clsa-k-larger-than-text": ("clsa", {"index_topk": 1000}),
    "dsa-k-larger-than-text": ("dsa", {"index_topk": 1000}),
    "clsa-blocks4": ("clsa", {"index_topk": 24, "index_block_size": 4}),
    "mixed-blocks4": ("mixed", {"index_topk": 12, "index_block_size": 4}),
    "indexcache-blocks16": ("indexcache", {"index_topk": 32, "index_block_size": 16}),
    "clsa-odd": ("clsa", {"hidden_size": 63, "intermediate_size": 111, "head_dim": 10, "index_head_dim": 65}),
}
# Checkpoints whose selections leave no near-ties; `test_steady_checkpoints_leave_no_ties` holds them to it.
SEEDS = {"clsa": 11, "mixed": 22, "clsa-blocks4": 3}
ALL_CASES = pytest.mark.parametrize("case", CASES)
FIVE_PLANS = pytest.mark.parametrize("case", [*PLANS, "clsa-blocks4", "clsa-long-window"])


class Model:
    """One random checkpoint on one backend, with a state of its own."""

    def __init__(self, ops: Ops, case: str) -> None:
        kinds, pattern = PLANS[CASES[case][0]]
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 9,
            "index_topk": 12,
            "index_head_dim": 16,
        }
        self.config = ModelConfig(
            vocab_size=VOCAB,
            num_hidden_layers=len(kinds),
            layer_types=tuple(kinds),
            index_topk_pattern=pattern,
            **(sizes | CASES[case][1]),  # type: ignore[arg-type]
        )
        self.ops, self.plan = ops, make_plan(self.config)
        rng = np.random.default_rng(SEEDS.get(case, 0))
        flat = {name: self._weight(rng, shape) for name, shape in tensor_shapes(self.config).items()}
        self.params = nest({name: ops.asarray(x, "float32") for name, x in flat.items()})
        self.reset()

    @staticmethod
    def _weight(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Large enough that attention is far from uniform and the residual stream does not drown a layer."""
        scale = 1.5 / np.sqrt(shape[-1]) if len(shape) > 1 else 1.0
        return (rng.standard_normal(shape) * scale + (0.0 if len(shape) > 1 else 1.0)).astype(np.float32)

    def reset(self, num_pages: int = 12, num_slots: int = 6) -> None:
        self.state = new_state(self.ops, self.plan, num_pages * PAGE_SIZE, num_slots, "float32")

    def step(self, chunks: Sequence[SequenceChunk], ops: Any = None) -> np.ndarray | None:
        """Run the chunks; float64 logits of the wanted rows, or None."""
        ops = ops or self.ops
        batch = build_batch(ops, chunks, self.config.sliding_window)
        logits, self.state = forward(ops, self.params, self.plan, batch, self.state)
        return None if logits is None else np.asarray(self.ops.to_numpy(logits), np.float64)


class Text:
    """A sequence with pages in random order and a window slot, cut into chunks."""

    def __init__(self, seed: int, length: int, pages: Sequence[int], slot: int) -> None:
        self.tokens = np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
        self.pages, self.slot = list(pages), slot

    def chunk(self, start: int, stop: int, logits: Any = "all") -> SequenceChunk:
        return SequenceChunk(self.tokens[start:stop], start, self.pages, self.slot, logits)

    def chunks(self, sizes: int | Sequence[int], logits: Any = "all") -> Iterator[SequenceChunk]:
        length = len(self.tokens)
        bounds = range(0, length, sizes) if isinstance(sizes, int) else np.cumsum([0, *sizes[:-1]]).tolist()
        for start, stop in zip(bounds, [*list(bounds)[1:], length]):
            yield self.chunk(start, stop, logits)


TEXT = Text(0, 150, [7, 2, 5], 3)


def assert_parity(ops: Ops, case: str, steps: Sequence[Sequence[SequenceChunk]]) -> np.ndarray:
    """Run the steps on both; hold selections and logits against each other; return the backend's logits."""
    ours, theirs = Model(ops, case), Model(spec, case)
    outputs = []
    for i, chunks in enumerate(steps):
        record: list[Selection] = []
        got = ours.step(chunks, recording(ops, record))
        want = theirs.step(chunks, replaying(ops, record))
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert_close("logits", "float32", got, want, f"{case}, step {i}")
            outputs.append(got)
    return np.concatenate(outputs)


@ALL_CASES
def test_logits_of_a_prompt(ops: Ops, case: str) -> None:
    logits = assert_parity(ops, case, [[TEXT.chunk(0, 150)]])
    assert logits.shape == (150, VOCAB)
    assert logits.std() > 0.1, "the checkpoint is too tame to prove anything"


@FIVE_PLANS
@pytest.mark.parametrize("size", [7, 64])
def test_logits_of_a_prompt_in_chunks(ops: Ops, case: str, size: int) -> None:
    assert_parity(ops, case, [[chunk] for chunk in TEXT.chunks(size)])


@ALL_CASES
def test_logits_of_decode_after_the_prefill_exit(ops: Ops, case: str) -> None:
    """A prompt of which only the last logits are wanted, then token after token."""
    assert_parity(ops, case, [[TEXT.chunk(0, 111, "last")]] + [[TEXT.chunk(i, i + 1)] for i in range(111, 131)])


@FIVE_PLANS
def test_logits_of_a_packed_step(ops: Ops, case: str) -> None:
    """Prompts, a chunk in the middle of one, and decode rows in the same step; not everyone's logits are wanted."""
    a, b, c, d = PACKED
    assert_parity(
        ops,
        case,
        [
            [a.chunk(0, 63, "none"), b.chunk(0, 64, "none")],
            [b.chunk(64, 127, "last"), a.chunk(63, 64, "none"), c.chunk(0, 1, "last"), d.chunk(0, 70, "all")],
            [a.chunk(64, 65), b.chunk(127, 128)],
            [b.chunk(128, 129, "last"), Text(5, 9, [8], 4).chunk(0, 9, "last")],
        ],
    )


# Within one backend the same numbers are computed in other shapes, so sums are rounded differently. That must not
# exchange a tie: the first test below proves that these checkpoints have none.
STEADY_CASES = ["transformer", "yoco", "clsa", "mixed", "sliding-only", "clsa-blocks4"]
STEADY = pytest.mark.parametrize("case", STEADY_CASES)
PACKED = [Text(1, 65, [4, 0], 5), Text(2, 131, [11, 1, 9], 0), Text(3, 1, [3], 2), Text(4, 70, [6, 10], 1)]


@pytest.mark.parametrize("case", [case for case in STEADY_CASES if "F" in PLANS[CASES[case][0]][1]])
def test_steady_checkpoints_leave_no_ties(case: str) -> None:
    margins: list[float] = []
    for chunks in ([TEXT.chunk(0, 150)], [text.chunk(0, len(text.tokens)) for text in PACKED]):
        Model(spec, case).step(chunks, measuring(margins))
    assert len(margins) > 100 and min(margins) > ROUTING_SLACK


@STEADY
@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunked_prefill_is_prefill(ops: Ops, case: str, size: int) -> None:
    """Chunks of one are decode: the same logits as all at once, too."""
    model = Model(ops, case)
    whole = model.step([TEXT.chunk(0, 150)])
    model.reset()
    parts = [model.step([chunk]) for chunk in TEXT.chunks(size)]
    assert_close("logits", "float32", np.concatenate(parts), whole, (case, size))  # type: ignore[arg-type]


@STEADY
def test_the_prefill_exit_changes_no_logits(ops: Ops, case: str) -> None:
    model = Model(ops, case)
    whole = model.step([TEXT.chunk(0, 150)])
    assert whole is not None
    for sizes in ([150], [64, 86], [149, 1], [7, 64, 79]):
        model.reset()
        *before, last = TEXT.chunks(sizes, "none")
        assert all(model.step([chunk]) is None for chunk in before)
        logits = model.step([TEXT.chunk(last.start, 150, "last")])
        assert_close("logits", "float32", logits, whole[-1:], (case, sizes))  # type: ignore[arg-type]


@STEADY
def test_packed_sequences_are_as_alone(ops: Ops, case: str) -> None:
    model = Model(ops, case)
    packed = model.step([text.chunk(0, len(text.tokens)) for text in PACKED])
    assert packed is not None
    start = 0
    for text in PACKED:
        model.reset()
        stop = start + len(text.tokens)
        alone = model.step([text.chunk(0, len(text.tokens))])
        assert_close("logits", "float32", packed[start:stop], alone, (case, len(text.tokens)))  # type: ignore[arg-type]
        start = stop


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["transformer", "clsa", "mixed-blocks4", "clsa-k-larger-than-text"])
def test_16_bit_weights_run(ops: Ops, case: str, dtype: str) -> None:
    """Rounding of activations adds up over layers, so this only proves the right order of magnitude."""
    model, reference = Model(ops, case), Model(spec, case)
    flat = _leaves(model.params)
    rounded = {id(x): ops.cast(x, dtype) for x in flat}
    model.params = _mapped(model.params, lambda x: rounded[id(x)])
    reference.params = _mapped(model.params, lambda x: spec.asarray(ops.to_numpy(x)))
    model.state = new_state(ops, model.plan, 12 * PAGE_SIZE, 6, dtype)
    record: list[Selection] = []
    got = model.step([TEXT.chunk(0, 111)], recording(ops, record))
    k = len(record)
    want = reference.step([TEXT.chunk(0, 111)], following(ops, record))
    assert got is not None and want is not None and (k > 0) == ("F" in model.config.index_topk_pattern)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < {"bfloat16": 5e-2, "float16": 7e-3}[dtype], error


def _mapped(tree: Any, function: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, function) for value in tree]
    return function(tree)


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(tree, found.append)
    return found
