"""What cannot work is said in one sentence, before any work. No Metal and an old MLX: test_backend."""

from __future__ import annotations

import logging

import pytest

import clsa
from clsa.ops import Ops

pytestmark = pytest.mark.mlx


@pytest.fixture
def ops() -> Ops:
    from clsa_mlx import backend

    return backend.open("cpu")


def test_a_chip_without_enough_memory(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    from clsa_mlx import ops as module

    def never(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(module, "memory_stats", lambda: {"total": 8 << 30, "free": 1 << 20, "peak": 0})
    monkeypatch.setattr(module, "asarray", never)
    with pytest.raises(clsa.ClsaError, match=r"(?s)bytes.*cpu \(MLX\)") as refused:
        clsa.load("demo", backend="mlx", device="cpu")
    assert "\n" not in str(refused.value)


def test_a_context_beyond_the_plan(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    from clsa import runner

    llm = clsa.load("demo", backend="mlx", device="cpu")

    def never(*_: object) -> None:
        raise AssertionError("a step was launched")

    monkeypatch.setattr(runner.Runner, "launch", never)
    longest = llm.config.max_position_embeddings
    with pytest.raises(clsa.RequestError, match=rf"max_model_len is {longest}; shorten the prompt"):
        llm.generate([[1] * (longest + 1)])


@pytest.mark.parametrize(("head_dim", "warned"), [(64, False), (100, True), (256, False), (264, True)])
def test_a_head_dim_without_a_kernel(
    ops: Ops, head_dim: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from clsa_mlx import kernels
    from clsa_mlx.kernels.attend import warn_of_head_dim

    warn_of_head_dim.cache_clear()
    for enabled, count in ((False, 0), (True, int(warned)), (True, int(warned))):
        monkeypatch.setattr(kernels, "enabled", enabled)
        with caplog.at_level(logging.WARNING):
            ops.new_memory(64, 1, head_dim, None, "float32")
        assert len(caplog.messages) == count, "once, and only where there are kernels"
    assert all(f"head_dim {head_dim} has no Metal kernel" in message for message in caplog.messages)
