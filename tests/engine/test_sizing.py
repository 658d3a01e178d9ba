"""What fits is decided before anything is allocated, and a refusal says the sizes in one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

import clsa
from clsa.config import PAGE_SIZE, EngineConfig, ModelConfig
from clsa.errors import ConfigError, RequestError
from clsa.ops import Ops, StepSize
from clsa.params import num_parameters
from clsa.plan import make_plan
from clsa.sizing import MAX_ROWS, Sizes, plan_sizes, step_bytes
from tests.engine import models
from tests.engine.models import CONFIG, CROSS, FULL, SLIDING

# Of CONFIG, in numbers: K, V and K_idx of one memory; K and V of two windows of 16 tokens.
TOKEN, RING = 2 * 2 * 8 + 16, 2 * 16 * 2 * 2 * 8
WEIGHTS = num_parameters(CONFIG)


class Budget:
    """Ops that have so many bytes free and refuse to allocate any."""

    device, step_size, temporary_bytes = "a device of the tests", StepSize(32, 2048, 3), 1 << 20

    def __init__(self, free: int, itemsize: int = 4) -> None:
        self.free, self._itemsize = free, itemsize

    def itemsize(self, dtype: str) -> int:
        return self._itemsize

    def memory_stats(self) -> dict[str, int]:
        return {"total": self.free, "free": self.free, "peak": 0}


def sizes(free: int = 1 << 40, config: ModelConfig = CONFIG, itemsize: int = 4, **engine: Any) -> Sizes:
    ops = cast(Ops, Budget(free, itemsize))
    return plan_sizes(ops, make_plan(config), "float32", EngineConfig(**engine))


def test_plenty_of_memory() -> None:
    got = sizes(max_num_seqs=4)
    assert (got.max_model_len, got.num_slots, got.num_pages) == (1024, 4, 4 * 1024 // PAGE_SIZE)
    assert got.num_snapshots == 16 and got.num_cached_pages == got.num_pages
    assert got.num_bytes == 4 * (20 * RING + 64 * PAGE_SIZE * TOKEN)
    assert sizes(max_num_seqs=4, max_model_len=100).num_pages == 7
    assert sizes(max_num_seqs=4, max_tokens_in_memory=1).num_pages == 1


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("max_num_seqs", [1, 7, 32])
@pytest.mark.parametrize("spare", [0, 1, 100_000, 10_000_000])
def test_the_state_stays_within_its_share(itemsize: int, max_num_seqs: int, spare: int) -> None:
    least = itemsize * (max_num_seqs * RING + PAGE_SIZE * TOKEN)  # a window each and one page
    others = itemsize * WEIGHTS + step(max_num_seqs)
    engine: dict[str, Any] = {"itemsize": itemsize, "max_num_seqs": max_num_seqs, "memory_fraction": 0.5}
    engine["max_tokens_per_step"] = 2048
    got = sizes(others + 2 * (least + spare), **engine)
    assert got.num_pages >= 1 and got.num_bytes <= least + spare
    state = (max_num_seqs + got.num_snapshots) * RING + got.num_pages * PAGE_SIZE * TOKEN
    assert got.num_bytes == itemsize * state
    assert got.weight_bytes + got.step_bytes == others
    full = got.num_pages == max_num_seqs * 1024 // PAGE_SIZE
    assert full or got.num_bytes + itemsize * PAGE_SIZE * TOKEN > least + spare, "no room is wasted"
    with pytest.raises(ConfigError, match=f"needs {least:,} bytes and {least - 1:,} may be used .50% of what"):
        sizes(others + 2 * least - 2, **engine)


def step(max_num_seqs: int = 32, max_tokens_per_step: int = 2048) -> int:
    ops, size = cast(Ops, Budget(0)), StepSize(max_num_seqs, max_tokens_per_step)
    return step_bytes(ops, make_plan(CONFIG), EngineConfig(), size, 1024)


def test_what_a_step_takes_grows_with_what_it_holds() -> None:
    assert step(1) < step(32) < step(32, max_tokens_per_step=4096)
    few = step(4, max_tokens_per_step=8)
    assert few < 1 << 20, "an op has no temporaries larger than its work"
    assert step(64, max_tokens_per_step=1) == step(1, max_tokens_per_step=1), "no more rows than tokens"


def test_a_step_that_nobody_sized_leaves_room_for_memories() -> None:
    seen = set()
    for spare in range(3_000_000, 90_000_000, 1_000_000):
        got = sizes(4 * WEIGHTS + spare)
        assert 4 * RING * got.num_slots + got.step_bytes <= spare // 4 or got.num_slots == 1
        assert got.step_size == StepSize(got.num_slots, max(256, 64 * got.num_slots), 3)
        seen.add(got.num_slots)
    assert {1, 4, 8, 16, 32} <= seen
    got = sizes(4 * WEIGHTS + 20_000_000, max_num_seqs=20)
    assert got.num_slots == 20 and got.step_size.max_tokens_per_step < 2048, "what was asked for stays"
    got = sizes(4 * WEIGHTS + 15_500_000, max_tokens_per_step=600)
    assert got.step_size.max_tokens_per_step == 600 and 1 < got.num_slots < 32


@pytest.mark.parametrize("cache", [0, 1, 4 * RING, 200_000, 1 << 30])
def test_the_prefix_cache_is_bounded_in_bytes(cache: int) -> None:
    got = sizes(prefix_cache_bytes=cache)
    assert 4 * (got.num_snapshots * RING + got.num_cached_pages * PAGE_SIZE * TOKEN) <= cache
    assert got.num_cached_pages <= got.num_pages
    if cache >= 200_000:
        assert got.num_snapshots and got.num_cached_pages


def refused(match: str, *args: Any, **engine: Any) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        sizes(*args, **engine)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_cannot_fit_is_refused() -> None:
    refused(r"the weights need [\d,]+ bytes in float32 and 1,000 are free on a device of the tests", 1000)
    others, size = 4 * WEIGHTS + step(), {"max_num_seqs": 32, "max_tokens_per_step": 2048}
    refused(r"the buffers of a step need [\d,]+ bytes and the weights leave [\d,]+ free on", others - 1, **size)
    refused(r"the buffers of a step need", 4 * WEIGHTS + step(1, 256) - 1)
    refused(r"the state needs [\d,]+ bytes and 30,000 may be used .* lower max_num_seqs", others + 50_000, **size)
    refused("the state needs", others + 10_000_000, max_tokens_in_memory=1 << 32)
    refused("the state needs", 4 * WEIGHTS + step(4096) + 10_000_000, max_num_seqs=4096, max_tokens_per_step=2048)
    refused("max_model_len must be at most the model's 1024 positions, got 1025", max_model_len=1025)
    refused("rows; lower max_num_seqs", 1 << 60, replace(CONFIG, sliding_window=1 << 20), max_num_seqs=4096)


def test_rows_fit_their_integers() -> None:
    got = sizes(1 << 60, max_tokens_in_memory=1 << 32, max_num_seqs=4096, prefix_cache_bytes=1 << 44)
    assert MAX_ROWS - PAGE_SIZE < got.num_pages * PAGE_SIZE <= MAX_ROWS
    wide = replace(CONFIG, sliding_window=1 << 19)
    got = sizes(1 << 60, wide, max_num_seqs=4095, prefix_cache_bytes=1 << 44)
    assert (got.num_slots + got.num_snapshots) << 19 <= MAX_ROWS


def test_models_without_windows_or_without_a_memory() -> None:
    full = replace(CONFIG, layer_types=(FULL,) * 4, index_topk_pattern="DDDD")
    got = sizes(config=full)
    assert got.num_snapshots == 0 and got.num_cached_pages == got.num_pages == 32 * 1024 // PAGE_SIZE
    assert sizes(config=full, prefix_cache_bytes=0).num_cached_pages == 0
    sliding = replace(CONFIG, layer_types=(SLIDING,) * 4, index_topk_pattern="", max_position_embeddings=1 << 24)
    got = sizes(config=sliding, max_num_seqs=4096)
    assert (1 << 24) // PAGE_SIZE <= got.num_pages <= 1 << 20
    refused(
        "the state needs",
        4 * num_parameters(sliding) + step() + 1000,
        sliding,
        max_tokens_per_step=2048,
        max_num_seqs=32,
    )
    assert sizes(config=replace(CONFIG, layer_types=(CROSS,) * 4, index_topk_pattern="FSSS")).num_snapshots == 0


@models.on_backends
def test_nothing_is_allocated_before_a_refusal(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.folder()

    def touched(self: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(clsa.checkpoint.Checkpoint, "tensors", touched)
    with pytest.raises(ConfigError, match="the state needs") as caught:
        models.load(backend, folder, max_tokens_in_memory=1 << 32)
    assert "\n" not in str(caught.value)


def test_bytes_are_those_of_the_backend() -> None:
    """The specification keeps everything in float64, whatever dtype was asked for."""
    ops = models.open_ops("numpy")
    engine = EngineConfig(max_num_seqs=3, max_tokens_in_memory=640)
    got = plan_sizes(ops, make_plan(CONFIG), "bfloat16", engine)
    assert got.num_bytes == 8 * ((3 + got.num_snapshots) * RING + 640 * TOKEN)


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    llm = models.load(max_tokens_in_memory=128)
    with pytest.raises(RequestError, match=r"needs 140 tokens \(100 of prompt and 40 of max_tokens\).*holds 128"):
        llm.generate([[1, 2, 3], [5] * 100], clsa.SamplingParams(max_tokens=40))
    assert llm.stats()["steps"] == 0


def test_stats_show_the_plan() -> None:
    llm = models.load(max_num_seqs=2, max_tokens_in_memory=640, max_model_len=300)
    wanted = {"max_model_len": 300, "max_tokens_in_memory": 640, "max_tokens_cached": 640, "pages_total": 10}
    stats = llm.stats()
    assert wanted.items() <= stats.items() and stats["slots_total"] == 2 and stats["snapshots_total"] == 8
    assert stats["state_bytes"] == 8 * (10 * RING + 640 * TOKEN)
    assert stats["weight_bytes"] == 8 * WEIGHTS and stats["step_bytes"] > 0


@pytest.mark.mlx
@pytest.mark.parametrize(
    ("layer_types", "pattern"),
    [((SLIDING, SLIDING, CROSS, CROSS), "FS"), ((FULL,) * 4, "FFFF"), ((FULL,) * 4, "DDDD")],
)
def test_a_step_takes_no_more_than_was_planned(layer_types: tuple[str, ...], pattern: str) -> None:
    import mlx.core as mx

    config = replace(CONFIG, layer_types=layer_types, index_topk_pattern=pattern)
    llm = models.load("mlx", models.folder(layer_types=layer_types, index_topk_pattern=pattern))
    params = clsa.SamplingParams(max_tokens=3, temperature=1.0, top_p=0.9, logprobs=3, ignore_eos=True)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    llm.generate([[i % config.vocab_size for i in range(n)] for n in (900, 900, *[20] * 30)], params)
    took, planned = mx.get_peak_memory() - before, llm.stats()["step_bytes"]
    assert planned / 20 < took <= planned
