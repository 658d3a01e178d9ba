"""sample: the specification's token for every seed, the right distribution, defined corner cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clsa import spec
from clsa.ops import Ops, Sampled, SamplingBatch
from tests.ops.cases import integers
from tests.tolerance import assert_close, assert_equal

FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.97, "temperature": 2.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.01, "top_k": 20, "top_p": 0.9, "temperature": 1.5},
    {"min_p": 0.9, "top_k": 50, "top_p": 0.99},  # fewer survive min-p than top-k would keep
]


def batch(ops: Ops, num_rows: int, **values: Any) -> SamplingBatch:
    """Parameters of R rows; a scalar holds for all of them, the host flags follow from the values."""
    defaults: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": np.arange(num_rows),
        "positions": 7,
        "penalty_tokens": None,
        "num_logprobs": None,
    }
    v = defaults | values
    row = {name: np.broadcast_to(np.asarray(v[name]), num_rows) for name in list(defaults)[:7]}
    seed = row["seed"].astype(np.uint64)
    words = np.stack([seed & np.uint64(0xFFFFFFFF), seed >> np.uint64(32)], axis=1).astype(np.uint32)
    penalty_tokens = v["penalty_tokens"]

    def floats(name: str) -> Any:
        return ops.asarray(row[name].astype(np.float32), "float32")

    def ints(name: str) -> Any:
        return ops.asarray(row[name].astype(np.int32))

    return SamplingBatch(
        temperature=floats("temperature"),
        top_k=ints("top_k"),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        repetition_penalty=floats("repetition_penalty"),
        seed=ops.asarray(words),
        positions=ints("positions"),
        penalty_tokens=None if penalty_tokens is None else ops.asarray(np.asarray(penalty_tokens, np.int32)),
        num_logprobs=v["num_logprobs"],
        all_greedy=bool((row["temperature"] == 0).all()),
        any_filter=bool(((row["top_k"] > 0) | (row["top_p"] < 1) | (row["min_p"] > 0)).any()),
    )


def draw(ops: Ops, logits: np.ndarray, **values: Any) -> Sampled:
    return ops.sample(ops.asarray(logits.astype(np.float32), "float32"), batch(ops, len(logits), **values))


def assert_same_tokens(ops: Ops, case: object, logits: np.ndarray, **values: Any) -> np.ndarray:
    got, want = (integers(o, draw(o, logits, **values).tokens) for o in (ops, spec))
    assert_equal("sample", got, want, case)
    return got


RANDOM_BITS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize("key, counter, want", RANDOM_BITS)
def test_threefry_known_answers(key: tuple[int, int], counter: tuple[int, int], want: tuple[int, int]) -> None:
    """The vectors of Random123 for Threefry-2x32 with 20 rounds."""
    words = [np.array([x], np.uint32) for x in (*key, *counter)]
    got = spec.threefry2x32((words[0], words[1]), (words[2], words[3]))
    assert tuple(int(x[0]) for x in got) == want


@pytest.mark.parametrize("vocab_size", [2, 63, 64, 65, 1000])
@pytest.mark.parametrize("position", [0, 1, 2**24])
def test_plain_draws(ops: Ops, vocab_size: int, position: int) -> None:
    rng = np.random.default_rng(0)
    seeds = np.r_[0, 1, 2**32 - 1, 2**32, 2**63 - 1, rng.integers(0, 2**63, 59)]
    logits = rng.standard_normal((64, vocab_size)) * 3
    assert_same_tokens(ops, (vocab_size, position), logits, seed=seeds, positions=position)


def test_flat_logits_show_the_noise_alone(ops: Ops) -> None:
    """Every (seed, position) orders the vocabulary anew; with equal logits only the random bits decide."""
    tokens = assert_same_tokens(ops, "flat", np.zeros((256, 2048)), positions=np.arange(256) % 5)
    assert len(np.unique(tokens)) > 220


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_filters(ops: Ops, values: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).standard_normal((256, 111)) * 2
    assert_same_tokens(ops, values, logits, **values)


def test_rows_of_all_kinds_in_one_batch(ops: Ops) -> None:
    rng = np.random.default_rng(2)
    n = 300
    values = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 3.0], n),
        "top_k": rng.choice([0, 1, 7, 64, 1000], n),
        "top_p": rng.choice([1.0, 0.9, 0.3], n),
        "min_p": rng.choice([0.0, 0.05, 0.5], n),
        "repetition_penalty": rng.choice([1.0, 1.3, 0.5], n),
        "penalty_tokens": rng.integers(-1, 65, (n, 12)),
        "positions": rng.integers(0, 5000, n),
    }
    assert_same_tokens(ops, "mixed", rng.standard_normal((n, 65)) * 3, **values)


def test_ties_with_the_last_one_kept_stay(ops: Ops) -> None:
    """Small integers as logits: the k-th best and the edge of the nucleus are shared by many tokens."""
    logits = np.random.default_rng(3).integers(0, 4, (400, 64)) * 4.0
    for values in ({"top_k": 3}, {"top_p": 0.4}, {"top_k": 20, "top_p": 0.7}):
        tokens = assert_same_tokens(ops, values, logits, **values)
        best = logits.max(1)
        assert (logits[np.arange(400), tokens] == best).all(), values
        chosen = np.array([np.flatnonzero(np.flatnonzero(row == row.max()) == t)[0] for row, t in zip(logits, tokens)])
        assert (chosen >= 3).any(), "only the first few of the tied tokens were ever drawn"


def test_greedy_takes_the_lower_of_equal_tokens(ops: Ops) -> None:
    logits = np.random.default_rng(4).integers(0, 3, (100, 63)).astype(float)
    tokens = assert_same_tokens(ops, "greedy", logits, temperature=0.0)
    assert tokens.tolist() == logits.argmax(1).tolist()


def test_greedy_rows_ignore_filters_and_noise(ops: Ops) -> None:
    logits = np.random.default_rng(5).standard_normal((50, 65))
    temperature = np.arange(50) % 2
    tokens = assert_same_tokens(ops, "greedy", logits, temperature=temperature, top_k=3, min_p=0.2, top_p=0.5)
    assert (tokens[::2] == logits[::2].argmax(1)).all()


def test_repetition_penalty(ops: Ops) -> None:
    logits = np.array([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0], [-1.0, -1.5, -1.7], [-1.0, -1.5, -1.7]])
    seen = [[0, -1], [-1, -1], [0, 0], [0, 1]]  # -1 is padding, not the last token; seen twice counts once
    tokens = assert_same_tokens(ops, "penalty", logits, temperature=0.0, repetition_penalty=2.0, penalty_tokens=seen)
    assert tokens.tolist() == [1, 0, 1, 2]


def test_nothing_to_sample_from(ops: Ops) -> None:
    """NaN anywhere, or a best logit that is not finite, gives -1; such a row does not touch its neighbours."""
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((7, 64))
    logits[0, 5] = np.nan
    logits[1] = -np.inf
    logits[2, 3] = np.inf
    logits[3] = np.nan
    logits[4, :63] = -np.inf  # one token is left
    for values in ({}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 3, "min_p": 0.1}):
        tokens = assert_same_tokens(ops, values, logits, **values)
        assert tokens[:5].tolist() == [-1, -1, -1, -1, 63]
        alone = integers(ops, draw(ops, logits[5:], seed=np.array([5, 6]), **values).tokens)
        assert tokens[5:].tolist() == alone.tolist()


def test_the_host_flags_change_no_result(ops: Ops) -> None:
    rng = np.random.default_rng(7)
    logits = ops.asarray(rng.standard_normal((64, 111)).astype(np.float32))
    greedy = batch(ops, 64, temperature=0.0)
    plain = batch(ops, 64)
    for sampling, flags in (
        (greedy, {"all_greedy": False}),
        (greedy, {"any_filter": True}),
        (plain, {"any_filter": True}),
    ):
        fields = {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}
        fast, slow = (ops.sample(logits, SamplingBatch(**(fields | more))) for more in ({}, flags))
        assert_equal("sample", integers(ops, slow.tokens), integers(ops, fast.tokens), flags)


def test_a_row_alone_draws_what_it_draws_in_a_batch(ops: Ops) -> None:
    logits = np.random.default_rng(8).standard_normal((5, 65))
    seeds, positions = np.array([3, 3, 9, 2**40, 0]), np.array([0, 1, 0, 77, 5])
    together = integers(ops, draw(ops, logits, seed=seeds, positions=positions).tokens)
    for r in range(5):
        alone = draw(ops, logits[r : r + 1], seed=seeds[r : r + 1], positions=positions[r : r + 1])
        assert integers(ops, alone.tokens).tolist() == [together[r]]


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float((np.square(counts - expected) / expected).sum())


@pytest.mark.parametrize("by", ["seed", "positions"])
def test_distribution(ops: Ops, by: str) -> None:
    """20,000 draws by successive seeds, or by successive positions of one seed, follow the softmax."""
    num_draws, vocab_size = 20_000, 16
    logits = np.random.default_rng(9).standard_normal(vocab_size)
    probabilities = spec.softmax(logits / 0.8)
    values = {"seed": 0, "positions": 0} | {by: np.arange(num_draws)}
    drawn = draw(ops, np.broadcast_to(logits, (num_draws, vocab_size)), temperature=0.8, **values)
    counts = np.bincount(integers(ops, drawn.tokens), minlength=vocab_size)
    # 15 degrees of freedom: more than 44.3 has a probability of 1 in 10,000; the draws never change.
    assert chi_square(counts, probabilities) < 44.3


def test_filtered_tokens_are_never_drawn(ops: Ops) -> None:
    num_draws = 5_000
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    for values, allowed in (({"top_k": 2}, 2), ({"top_p": 0.71}, 3), ({"min_p": 0.3}, 3)):
        drawn = draw(ops, np.broadcast_to(logits, (num_draws, 5)), seed=np.arange(num_draws), **values)
        counts = np.bincount(integers(ops, drawn.tokens), minlength=5)
        assert not counts[allowed:].any(), (values, counts)
        kept = np.exp(logits[:allowed]) / np.exp(logits[:allowed]).sum()
        assert chi_square(counts[:allowed], kept) < 18.5, (
            values,
            counts,
        )  # 1 in 10,000 at 2 degrees of freedom


@pytest.mark.parametrize("num_logprobs", [0, 1, 5, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs(ops: Ops, num_logprobs: int, temperature: float) -> None:
    """Of the unmodified distribution, best first, equal ones by lower id."""
    rng = np.random.default_rng(10)
    logits = np.concatenate([rng.standard_normal((5, 111)) * 4, rng.integers(-2, 3, (5, 111))])
    values = {
        "temperature": temperature,
        "repetition_penalty": 1.5,
        "penalty_tokens": np.arange(30).reshape(10, 3),
        "num_logprobs": num_logprobs,
    }
    got: Any
    want: Any
    got, want = (draw(o, logits, **values) for o in (ops, spec))
    assert_equal("tokens", integers(ops, got.tokens), want.tokens)
    assert_equal("top_tokens", integers(ops, got.top_tokens), want.top_tokens)
    assert_close("logprobs", "float32", ops.to_numpy(got.logprobs), want.logprobs)
    assert_close("logprobs", "float32", ops.to_numpy(got.top_logprobs), want.top_logprobs)
    without = draw(ops, logits, **(values | {"num_logprobs": None}))
    assert without.logprobs is None and without.top_tokens is None and without.top_logprobs is None


def test_more_logprobs_than_tokens(ops: Ops) -> None:
    got = draw(ops, np.array([[0.0, 1.0, 0.5]]), num_logprobs=20)
    assert integers(ops, got.top_tokens).tolist() == [[1, 2, 0]]


def test_logprobs_with_impossible_tokens_and_a_failed_row(ops: Ops) -> None:
    logits = np.array([[0.0, -np.inf, 1.0], [np.nan, 0.0, 0.0]])
    got = draw(ops, logits, temperature=0.0, num_logprobs=3)
    assert integers(ops, got.tokens).tolist() == [2, -1]
    assert integers(ops, got.top_tokens)[0].tolist() == [2, 0, 1]
    assert ops.to_numpy(got.top_logprobs)[0, 2] == -np.inf
