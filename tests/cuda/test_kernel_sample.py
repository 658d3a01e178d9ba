"""The kernels behind `sample`: the specification's tokens for rows of all kinds, and its bounds of what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clsa import spec
from clsa.ops import Ops
from clsa_cuda.kernels.bounds import lowest_kept
from clsa_cuda.kernels.draw import draw
from clsa_cuda.sample import penalize
from tests.cuda.conftest import DEVICE
from tests.ops.test_sample import FILTERS, batch
from tests.tolerance import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # log 0, in the interpreter
KINDS: list[dict[str, Any]] = [{}, {"temperature": 0.0, "top_k": 3}, *FILTERS]
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def all_kinds(times: int = 1) -> dict[str, Any]:
    """Parameters of rows, `times` of each kind."""
    return {name: np.array([kind.get(name, PLAIN[name]) for kind in KINDS] * times) for name in PLAIN}


def drawn(ops: Ops, logits: np.ndarray, **values: Any) -> list[int]:
    sampling = batch(ops, len(logits), **values)
    array: Any = ops.asarray(logits.astype(np.float32), "float32")
    tokens: list[int] = draw(array, penalize(array, sampling), sampling).tolist()
    return tokens


def wanted(logits: np.ndarray, **values: Any) -> list[int]:
    tokens: list[int] = spec.sample(logits.astype(np.float64), batch(spec, len(logits), **values)).tokens.tolist()
    return tokens


@pytest.mark.parametrize("vocab_size", [1, 111, 5000])
def test_rows_of_all_kinds(ops: Ops, vocab_size: int) -> None:
    logits = (np.random.default_rng(vocab_size).standard_normal((len(KINDS), vocab_size)) * 3).astype(np.float32)
    seeds = np.array([0, 1, 2**32 - 1, 2**32, 2**63 - 1, *range(5, len(KINDS))])
    values = all_kinds() | {"seed": seeds, "positions": np.arange(len(KINDS)) * 1000}
    assert drawn(ops, logits, **values) == wanted(logits, **values)


def test_ties_and_penalties(ops: Ops) -> None:
    """Small integers as logits: the last one kept is shared by many tokens, some of them in another program."""
    rng = np.random.default_rng(3)
    logits = rng.integers(-2, 3, (len(KINDS), 4200)) * 2.0
    seen = rng.integers(-1, 4200, (len(KINDS), 40))
    values = all_kinds() | {"repetition_penalty": 1.5, "penalty_tokens": seen}
    assert drawn(ops, logits, **values) == wanted(logits, **values)


def test_nothing_to_sample_from(ops: Ops) -> None:
    logits = np.random.default_rng(6).standard_normal((7, 1030))
    logits[0, 5] = logits[3, 1029] = np.nan
    logits[1] = -np.inf
    logits[2, 1028] = np.inf
    logits[4, 1:] = -np.inf  # one token is left
    logits[5, 3:] = -np.inf
    for values in ({}, {"top_p": 0.5, "top_k": 3, "min_p": 0.1}, {"temperature": 0.0, "min_p": 0.1}):
        tokens = drawn(ops, logits, **values)
        assert tokens == wanted(logits, **values) and tokens[:5] == [-1, -1, -1, -1, 0]


def test_bounds_by_hand(ops: Ops) -> None:
    """Probabilities 0.4, 0.3, 0.2, 0.1; -0.0 equals 0.0, and a bound may be negative or -inf."""
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    rows = np.stack([logits, logits, logits, logits, [0.0, -0.0, -1.0, -2.0]]).astype(np.float32)
    values = {"top_p": [0.39, 0.45, 0.95, 1.0, 1.0], "top_k": [0, 3, 0, 0, 1], "min_p": [0.0, 0.0, 0.0, 0.7, 0.0]}
    got = lowest_kept(torch.from_numpy(rows).to(DEVICE), batch(ops, 5, **values)).cpu().numpy()
    want = [logits[0], logits[1], logits[3], np.log(0.4 * 0.7), 0.0]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert lowest_kept(torch.from_numpy(rows[:1]).to(DEVICE), batch(ops, 1)).item() == -np.inf


def test_a_row_alone_draws_what_it_draws_in_a_batch(ops: Ops) -> None:
    logits = np.random.default_rng(8).standard_normal((3, 4100))
    values = {"top_p": np.array([0.5, 0.9, 1.0]), "top_k": np.array([0, 50, 7]), "seed": np.array([3, 2**40, 0])}
    together = drawn(ops, logits, **values)
    for r in (0, 2):
        assert drawn(ops, logits[r : r + 1], **{k: v[r : r + 1] for k, v in values.items()}) == [together[r]]


def test_no_rows(ops: Ops) -> None:
    assert drawn(ops, np.empty((0, 10))) == []


@pytest.mark.cuda
def test_a_whole_vocabulary(ops: Ops) -> None:
    """Like the plain op, but for rows where the two round differently at the edge of the nucleus: none here."""
    torch.manual_seed(0)
    logits = torch.randn(8 * len(KINDS), 151_936, device=DEVICE) * 4
    values = all_kinds(8) | {"positions": np.arange(len(logits))}
    sampling = batch(ops, len(logits), **values)
    tokens = [draw(logits, logits, sampling).tolist() for _ in range(3)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert_equal("sample", np.array(tokens[0]), ops.sample(logits, sampling).tokens.cpu().numpy())
