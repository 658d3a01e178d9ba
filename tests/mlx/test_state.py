"""Writes go in place, whoever still holds the old state. Whole steps: test_record."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import pytest

from clsa.config import ModelConfig
from clsa.ops import Memory, Ops

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def ops() -> Ops:
    from clsa_mlx import backend

    return backend.open("cpu")


class Growth:
    """Bytes that MLX held at the most inside a `with` block, and after it, beyond what it held before."""

    def __enter__(self) -> Growth:
        mx.synchronize()
        mx.reset_peak_memory()
        self._base = mx.get_active_memory()
        return self

    def __exit__(self, *_: object) -> None:
        mx.synchronize()
        self.bytes = mx.get_peak_memory() - self._base
        self.left = mx.get_active_memory() - self._base


def test_a_write_costs_its_rows_and_not_the_buffer(ops: Ops) -> None:
    memory = ops.new_memory(1 << 17, 2, 128, 128, "float32")  # 134 MB for K, the same for V
    size = memory.k.nbytes
    kv, index = mx.ones((4, 2, 128)), mx.ones((4, 128))
    started = time.perf_counter()
    mx.eval(memory.k + 0)
    copy = time.perf_counter() - started
    old: list[Memory] = []  # a caller that keeps every state must not make it a copy
    times: list[float] = []
    with Growth() as growth:
        for i in range(100):
            started = time.perf_counter()
            old.append(memory)
            slots = mx.array([i, 1000 + i, -1, -1])
            memory = ops.write_memory(memory, kv, kv, index, slots)
            ops.evaluate(memory)
            mx.synchronize()
            times.append(time.perf_counter() - started)
    assert growth.bytes < size / 20, f"{growth.bytes / 1e6:.1f} MB more for writes of 4 rows"
    assert median(times) < copy / 5, f"a write took {median(times):.6f} s, a copy {copy:.6f} s"
    assert memory.k.sum().item() == 200 * 2 * 128 + 2 * 128  # the last row takes what -1 discards


def _params(c: ModelConfig) -> dict[str, Any]:
    def weight(*shape: int) -> Any:
        return mx.random.normal(shape) * 0.05

    def layer(kind: str) -> dict[str, Any]:
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        attn = {"q_proj": weight(q, c.hidden_size), "o_proj": weight(c.hidden_size, q)}
        if kind == "sliding_attention":
            attn |= {"k_proj": weight(kv, c.hidden_size), "v_proj": weight(kv, c.hidden_size)}
            attn |= {"q_norm": weight(c.head_dim), "k_norm": weight(c.head_dim)}
        mlp = {name: weight(c.intermediate_size, c.hidden_size) for name in ("gate_proj", "up_proj")}
        mlp["down_proj"] = weight(c.hidden_size, c.intermediate_size)
        return {
            "input_layernorm": weight(c.hidden_size),
            "self_attn": attn,
            "indexer": {"q_proj": weight(c.index_head_dim, c.hidden_size)},
            "post_attention_layernorm": weight(c.hidden_size),
            "mlp": mlp,
        }

    kv = c.num_key_value_heads * c.head_dim
    return {
        "embed_tokens": weight(c.vocab_size, c.hidden_size),
        "layers": [layer(kind) for kind in c.layer_types],
        "memory": {
            "norm": weight(c.hidden_size),
            "k_proj": weight(kv, c.hidden_size),
            "v_proj": weight(kv, c.hidden_size),
            "index_k_proj": weight(c.index_head_dim, c.hidden_size),
        },
        "norm": weight(c.hidden_size),
        "lm_head": weight(c.vocab_size, c.hidden_size),
    }


def model() -> tuple[ModelConfig, dict[str, Any]]:
    """Two layers that read and write rings, two that read the shared memory."""
    config = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        layer_types=("sliding_attention", "sliding_attention", "cross_attention", "cross_attention"),
        index_topk_pattern="FS",
        index_topk=64,
        index_head_dim=32,
        sliding_window=256,
    )
    return config, _params(config)


def test_own_rows_never_show(ops: Ops) -> None:
    """What -1 discards lands behind the rows; the zero row, which stands in for nothing, stays zero."""
    from clsa_mlx.state import zero_row

    nan = mx.full((2, 1, 4), float("nan"))
    nowhere = mx.array([-1, -1])
    memory = ops.write_memory(ops.new_memory(64, 1, 4, 4, "float16"), nan, nan, nan[:, 0], nowhere)
    window = ops.write_window(ops.new_window(3, 5, 1, 4, "float16"), nan, nan, nowhere)
    for rows, asked in ((memory.k, 64), (memory.v, 64), (memory.k_idx, 64), (window.k, 15), (window.v, 15)):
        assert rows is not None
        out = ops.to_numpy(rows)
        assert not out[:asked].any() and zero_row(rows) >= asked
        assert not out[zero_row(rows)].any() and np.isnan(out[-1]).all()


def test_state_that_does_not_fit_is_refused(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    from clsa import BackendError
    from clsa_mlx import state

    def refuse(*_: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr(state.mx, "eval", refuse)
    with pytest.raises(BackendError, match=r"cannot allocate 0\.0 GB of state .*ask for a smaller memory"):
        ops.new_memory(64, 1, 4, None, "float32")
