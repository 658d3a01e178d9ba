"""What is special to MLX arrays: bfloat16 on the host, lazy values, indices nobody checks, compiled functions."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from clsa.ops import Memory, Ops, State, Window

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def ops() -> Ops:
    from clsa_mlx import backend

    return backend.open("cpu")


def test_every_bfloat16_survives_the_round_trip(ops: Ops) -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
    array = ops.asarray(x)
    assert array.dtype == mx.bfloat16
    assert np.array_equal(np.array(array.view(mx.uint16)), x.view(np.uint16))
    out = ops.to_numpy(array)
    assert out.dtype == np.float32
    assert np.array_equal(out, x.astype(np.float32), equal_nan=True)


def test_float32_is_rounded_to_the_nearest_bfloat16(ops: Ops) -> None:
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x[:2] = 1 + 2**-8, 1 + 3 * 2**-8  # halfway: to even
    want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(ops.to_numpy(ops.asarray(x, "bfloat16")), want)


def test_scalars_keep_their_shape(ops: Ops) -> None:
    assert ops.to_numpy(ops.asarray(np.array(3.5))).shape == ()


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any


def test_evaluate_finds_arrays_in_nested_values(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [mx.array(float(i)) for i in range(8)]
    a, b, c, d, e, f, g, h = arrays
    state = State((Memory(a, b, None),), (Window(c, d, 4),))
    found: list[Any] = []
    monkeypatch.setattr(mx, "async_eval", lambda *values: found.extend(values))
    ops.evaluate(state, Pair(e, {"x": [f, (g,)]}), None, 3, "text", Pair, h)
    assert [id(x) for x in found] == [id(x) for x in arrays]
    ops.evaluate()


def test_a_row_without_a_token_reads_within_bounds(ops: Ops) -> None:
    weight = mx.arange(12, dtype=mx.float32).reshape(4, 3)
    out = ops.to_numpy(ops.embed(weight, mx.array([-1, 3, 2**31 - 1], mx.int32)))
    assert out.tolist() == [[0, 1, 2], [9, 10, 11], [9, 10, 11]]


@pytest.mark.parametrize("count", [1, 5, 63, 64])
def test_largest_ranks_every_score_and_no_two_alike(count: int) -> None:
    from clsa_mlx.select import key_places, largest

    rng = np.random.default_rng(count)
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0]
    scores = rng.choice(special, (50, 64)).astype(np.float32)
    ranked = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=1, kind="stable")[:, :count]
    keys = mx.sort(largest(mx.array(scores), count), axis=1)[:, ::-1]
    assert np.array_equal(np.array(key_places(keys)), ranked)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_functions_that_metal_compiles_give_the_same_compiled() -> None:
    from clsa_mlx.ops import swiglu
    from clsa_mlx.sample import threefry2x32

    words = [mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32) for shape in ((3, 1), (3, 1), (3, 1), (1, 65))]
    for whole, compiled in zip(threefry2x32(*words), mx.compile(threefry2x32, shapeless=True)(*words)):
        assert mx.array_equal(whole, compiled)
    for rows in (1, 5):  # one graph for all shapes
        gate, up = (mx.random.normal((rows, 64)).astype(mx.bfloat16) for _ in range(2))
        assert mx.array_equal(swiglu(gate, up), mx.compile(swiglu, shapeless=True)(gate, up))


def test_another_thread_computes_on_the_same_device(ops: Ops) -> None:
    found: list[Any] = []

    def work() -> None:
        x = ops.linear(mx.ones((2, 3)), mx.ones((4, 3)))
        found.extend([mx.default_device(), ops.to_numpy(x).sum()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [mx.Device(mx.cpu), 24]


def test_memory_stats_are_bytes_of_the_host(ops: Ops) -> None:
    stats = ops.memory_stats()
    assert 0 < stats["free"] <= stats["total"] and 0 < stats["peak"] <= stats["total"]
