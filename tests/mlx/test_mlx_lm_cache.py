"""The prompt cache that mlx-lm holds: saved, copied, trimmed and refused, and what a step on it costs."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clsa import CheckpointError, RequestError
from clsa.config import ModelConfig
from tests.engine import models
from tests.engine.models import CROSS, FULL, SLIDING

pytestmark = pytest.mark.mlx
mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
from mlx_lm.models.cache import (  # noqa: E402
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import clsa_mlx.mlx_lm  # noqa: E402, F401
from clsa_mlx.mlx_lm_model import Model  # noqa: E402

W = models.CONFIG.sliding_window
FULL_PLAN: dict[str, Any] = {"layer_types": (FULL,) * 4, "index_topk_pattern": "FSFS"}
IDS = np.random.default_rng(1).integers(2, models.CONFIG.vocab_size, 400).tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return mlx_lm.load(str(models.folder()))[0]


def filled(model: Any, tokens: list[int]) -> list[Any]:
    cache = make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    return cache


def logits(model: Any, tokens: list[int], cache: list[Any] | None = None) -> np.ndarray:
    return np.array(model(mx.array([tokens]), cache=cache)[0])


def assert_goes_on(model: Any, cache: list[Any], before: list[int], after: list[int]) -> None:
    """The cache stands for the tokens `before`, in one step or token by token."""
    wanted = logits(model, before + after)[len(before) :]
    assert cache[0].offset == len(before)
    stepped = copy.deepcopy(cache)
    np.testing.assert_allclose(logits(model, after, cache), wanted, atol=1e-4)
    single = np.concatenate([logits(model, [token], stepped) for token in after])
    np.testing.assert_allclose(single, wanted, atol=1e-4)


@pytest.mark.parametrize("length", [0, 1, 10, W, 63, 64, 65, 200])
def test_saved_and_loaded(model: Any, tmp_path: Path, length: int) -> None:
    cache = filled(model, IDS[:length]) if length else make_prompt_cache(model)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, cache, {"model": "m"})
    loaded, metadata = load_prompt_cache(file, return_metadata=True)
    assert metadata == {"model": "m"}
    assert loaded[0].nbytes == cache[0].nbytes
    for each in (loaded, cache):
        assert_goes_on(model, each, IDS[:length], IDS[200:230])


@pytest.mark.parametrize("changes", [FULL_PLAN, {"layer_types": (SLIDING,) * 4, "index_topk_pattern": ""}])
def test_saved_caches_of_other_plans(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = mlx_lm.load(str(models.folder(**changes)))[0]
    save_prompt_cache(str(tmp_path / "c.safetensors"), filled(model, IDS[:100]))
    assert_goes_on(model, load_prompt_cache(str(tmp_path / "c.safetensors")), IDS[:100], IDS[200:230])


def damage_pages(state: dict[str, Any]) -> None:
    state["pages"][0] = mx.array([0, 1, 5000], mx.int32)


def damage_twice(state: dict[str, Any]) -> None:
    state["pages"][0] = mx.array([0, 1, 1], mx.int32)


def damage_memory(state: dict[str, Any]) -> None:
    state["memories"][0]["v"] = state["memories"][0]["v"][:64]


def damage_window(state: dict[str, Any]) -> None:
    state["windows"][1] = {name: array[:5] for name, array in state["windows"][1].items()}


def damage_dtype(state: dict[str, Any]) -> None:
    state["memories"][0]["k_idx"] = state["memories"][0]["k_idx"].astype(mx.int32)


@pytest.mark.parametrize(
    "damage",
    [
        damage_pages,
        damage_twice,
        damage_memory,
        damage_window,
        damage_dtype,
        lambda state: state.update(lengths=[10_000]),
        lambda state: state.update(lengths=[-1]),
        lambda state: state.update(lengths=[1, 1]),
        lambda state: state.update(window="many"),
        lambda state: state.pop("window"),
        lambda state: state.pop("memories"),
    ],
)
def test_damaged_caches_are_refused(model: Any, tmp_path: Path, damage: Any) -> None:
    state = filled(model, IDS[:150])[0].state
    damage(state)
    file = str(tmp_path / "damaged.safetensors")
    save_prompt_cache(file, [type("ClsaCache", (), {"state": state})()])
    with pytest.raises((CheckpointError, RequestError), match=r"damaged|other sizes") as caught:
        logits(model, IDS[:3], load_prompt_cache(file))
    assert "\n" not in str(caught.value)


def test_caches_of_other_models_are_refused(model: Any) -> None:
    other = mlx_lm.load(str(models.folder(index_head_dim=8)))[0]
    with pytest.raises(RequestError, match="other sizes"):
        logits(model, IDS[:3], filled(other, IDS[:20]))
    with pytest.raises(RequestError, match="draft model"):
        logits(model, IDS[:3], make_prompt_cache(model) * 2)
    with pytest.raises(RequestError, match="holds 1 sequences, got 2 rows"):
        model(mx.array([IDS[:3], IDS[:3]]), cache=filled(model, IDS[:20]))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: [type(c[0]).from_state(c[0].state)]])
def test_copies_are_independent(model: Any, copied: Any) -> None:
    cache = filled(model, IDS[:100])
    other = copied(cache) if copied is not copy.copy else [copy.copy(cache[0])]
    logits(model, IDS[300:340], other)
    assert_goes_on(model, cache, IDS[:100], IDS[200:230])


def test_padded_prompts_in_several_chunks(model: Any) -> None:
    """As mlx-lm's prompt batches do it: what is padding enters no state, and a row may be through before the others."""
    prompts = [IDS[:5], IDS[100:170], IDS[200:233], IDS[50:82]]
    lengths = [len(prompt) for prompt in prompts]
    padded = mx.array([prompt + [0] * (70 - len(prompt)) for prompt in prompts])
    cache = make_prompt_cache(model)[0].merge([make_prompt_cache(model)[0] for _ in prompts])
    cache.prepare(lengths=lengths, right_padding=[70 - length for length in lengths])
    parts = [model(padded[:, first : first + 16], cache=[cache]) for first in range(0, 70, 16)]
    cache.finalize()
    np.testing.assert_array_equal(np.array(parts[-1])[[0, 2, 3]], 0)  # padding only
    for i, prompt in enumerate(prompts):
        assert_goes_on(model, [cache.extract(i)], prompt, IDS[300:330])


# -- trimming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "n"), [(W, 1), (W, W - 1), (W, W), (10, 4), (10, 99)])
def test_trimming_is_exact_while_the_window_holds_all(model: Any, length: int, n: int) -> None:
    cache = filled(model, IDS[:length])
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, n) == min(n, length)
    assert_goes_on(model, cache, IDS[: max(0, length - n)], IDS[200:250])


def test_trimming_is_refused_once_a_window_lost_a_token(model: Any) -> None:
    cache = filled(model, IDS[: W + 1])
    assert not can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 1) == 0
    with pytest.raises(RequestError, match=f"last {W} tokens"):
        cache[0].trim(1)
    assert_goes_on(model, cache, IDS[: W + 1], IDS[200:230])


def test_without_windows_any_trim_is_exact() -> None:
    model = mlx_lm.load(str(models.folder(**FULL_PLAN)))[0]
    cache = filled(model, IDS[:300])
    assert trim_prompt_cache(cache, 170) == 170
    assert_goes_on(model, cache, IDS[:130], IDS[200:250])


def test_speculative_decoding_is_refused_before_any_work(model: Any) -> None:
    from mlx_lm.generate import speculative_generate_step

    with pytest.raises(ValueError, match="trimmable"):
        next(speculative_generate_step(mx.array(IDS[:5]), model, model))


def test_quantised_caches_are_refused(model: Any) -> None:
    from mlx_lm.generate import generate_step

    with pytest.raises(RequestError, match="kv_bits"):
        next(generate_step(mx.array(IDS[:5]), model, kv_bits=8, quantized_kv_start=0))


# -- work and memory -------------------------------------------------------------------------------------------


def test_a_broken_off_step_leaves_no_usable_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from clsa_mlx import ops

    cache = filled(model, IDS[:30])

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops, "gather_attention", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(model, IDS[:3], cache)
    with pytest.raises(RequestError, match="half written"):
        logits(model, IDS[:3], cache)


def test_a_cache_goes_on_in_another_thread(model: Any) -> None:
    """MLX's streams belong to threads: nothing that a cache needs may be left to the one that filled it."""
    from mlx_lm.generate import generate_step

    cache, done = make_prompt_cache(model), list[bool]()

    def fill() -> None:
        tokens = [token for token, _ in generate_step(mx.array(IDS[:50]), model, max_tokens=4, prompt_cache=cache)]
        done.append(len(tokens) == 4)

    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
    assert done == [True]
    assert np.isfinite(logits(model, IDS[:3], cache)).all()


def big_model(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 1 << 15,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "layer_types": (SLIDING, SLIDING, CROSS, CROSS),
        "index_topk_pattern": "FS",
        "sliding_window": 16,
        "index_topk": 64,
        "index_head_dim": 64,
        "torch_dtype": "float32",
    }
    model = Model(ModelConfig(**(sizes | changes)))
    mx.eval(model.parameters())
    return model


def peak_growth(action: Any) -> int:
    mx.synchronize()
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    action()
    mx.synchronize()
    return int(mx.get_peak_memory() - base)


def test_a_prompt_stops_at_the_prefill_exit() -> None:
    """mlx-lm throws the logits of a prompt away and asks for the state; then nothing beyond it is computed."""
    model = big_model()
    tokens = mx.array([IDS * 2])
    logits_bytes = tokens.size * model.args.vocab_size * 4  # 105 MB

    def prefill() -> None:
        cache = make_prompt_cache(model)
        model(tokens, cache=cache)
        mx.eval([c.state for c in cache])

    def score() -> None:
        mx.eval(model(tokens, cache=make_prompt_cache(model)))

    assert peak_growth(prefill) < logits_bytes / 4
    assert peak_growth(score) >= logits_bytes


def test_a_decode_step_copies_no_state() -> None:
    model = big_model(vocab_size=64)
    cache = make_prompt_cache(model)
    model(mx.array([IDS[:1]]), cache=cache)
    for _ in range(8):
        model(mx.zeros((1, 4000), mx.int32), cache=cache)
    mx.eval([c.state for c in cache])
    state_bytes = cache[0].nbytes
    assert state_bytes > 20e6

    def decode() -> None:
        token = mx.array([[1]])
        for _ in range(40):
            token = model(token, cache=cache).argmax(axis=-1)
            mx.async_eval(token)
        mx.eval(token)

    decode()  # up to here the memory may grow once
    assert peak_growth(decode) < state_bytes / 4
