"""The floors against numbers worked out by hand for the paper's 4B sizes (bf16)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clsa.bench import floors
from clsa.bench.sizes import PLANS, SIZES, plan_config
from clsa.config import FP8, MemoryDtypes, ModelConfig, Quantization
from clsa.errors import RequestError
from clsa.params import state_bytes_per_token, window_bytes

K = 1 << 10
CONTEXT = 128 * K
BF16 = 2


def paper(plan: str) -> ModelConfig:
    return plan_config("4b", plan, CONTEXT)


def test_clsa_at_128k() -> None:
    got = floors.decode_bytes(paper("clsa"), CONTEXT, 1, BF16)
    # 16 sliding layers with K and V, 16 without; feed-forward in all; the shared memory's projections; the head.
    sliding = 2 * 2560 * 2560 + 2 * 512 * 2560 + 2 * 128
    cross = 2 * 2560 * 2560
    every = 3 * 2560 * 7680 + 2 * 2560
    shared = 2 * 512 * 2560 + 2 * 128 * 2560 + 2560
    head = 151936 * 2560 + 2560
    assert got.weights == 2 * (16 * sliding + 16 * cross + 32 * every + shared + head)
    assert got.weights == pytest.approx(5.48e9, rel=2e-3)
    assert got.index_keys == CONTEXT * 128 * 2 == 33_554_432
    assert got.windows == 16 * 512 * (2 * 4 * 128) * 2 == 16_777_216
    assert got.selected == 16 * 2048 * (2 * 4 * 128) * 2 == 67_108_864
    assert got.dense == 0
    assert got.total == got.weights + 33_554_432 + 16_777_216 + 67_108_864


@pytest.mark.parametrize(
    ("plan", "batch", "milliseconds"),
    [("clsa", 1, 1.27), ("clsa", 32, 2.10), ("transformer", 1, 3.2), ("transformer", 32, 64)],
)
def test_steps_at_4_4_terabytes_per_second(plan: str, batch: int, milliseconds: float) -> None:
    total = floors.decode_bytes(paper(plan), CONTEXT, batch, BF16).total
    assert total / 4.4e12 * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_other_plans_at_128k() -> None:
    kv = 2 * 4 * 128 * BF16
    assert floors.decode_bytes(paper("transformer"), CONTEXT, 1, BF16).dense == CONTEXT * 64 * K
    yoco = floors.decode_bytes(paper("yoco"), CONTEXT, 1, BF16)
    assert (yoco.dense, yoco.windows, yoco.index_keys) == (16 * CONTEXT * kv, 16_777_216, 0)
    dsa = floors.decode_bytes(paper("dsa"), CONTEXT, 3, BF16)
    assert (dsa.index_keys, dsa.selected) == (3 * 32 * CONTEXT * 256, 3 * 32 * 2048 * kv)
    shared = floors.decode_bytes(paper("indexcache"), CONTEXT, 1, BF16)
    assert (shared.index_keys, shared.selected) == (8 * CONTEXT * 256, 32 * 2048 * kv)


def test_short_contexts_read_what_there_is() -> None:
    got = floors.decode_bytes(paper("clsa"), 100, 2, BF16)
    kv = 2 * 4 * 128 * BF16
    assert (got.windows, got.selected, got.index_keys) == (2 * 16 * 100 * kv, 2 * 16 * 100 * kv, 2 * 100 * 256)


def test_a_tied_embedding_is_read_as_the_head() -> None:
    config = plan_config("0.2b", "clsa", CONTEXT)
    untied = replace(config, tie_word_embeddings=False)
    assert floors.weight_bytes(config, 4) == floors.weight_bytes(untied, 4)


def test_quantised_weights_are_counted_as_they_are_stored() -> None:
    plain = plan_config("0.2b", "clsa", CONTEXT)
    packed = replace(plain, quantization=Quantization(group_size=64, bits=4))
    # Per 64 numbers: 32 bytes of integers, a scale and a bias of 2 bytes each, in place of 128 bytes.
    norms = floors.weight_bytes(plain, BF16) * 36 / 128
    assert floors.weight_bytes(packed, BF16) == pytest.approx(norms, rel=1e-3)


def test_prefill_of_128k() -> None:
    # Products of a self-decoder layer: q and o, k and v, feed-forward; then K, V and K_idx of the shared memory.
    layer = 2 * 2560 * 2560 + 2 * 512 * 2560 + 3 * 2560 * 7680
    products = 2 * CONTEXT * (16 * layer + (2 * 512 + 128) * 2560)
    assert products == pytest.approx(3.14e14, rel=2e-3)
    window_pairs = CONTEXT * 512 - 511 * 512 // 2
    windows = 16 * 4 * window_pairs * 20 * 128
    assert floors.prefill_flops(paper("clsa"), CONTEXT) == products + windows
    assert floors.prefill_flops(paper("transformer"), CONTEXT) == pytest.approx(3.4e15, rel=0.02)


def test_ops_at_128k_and_batch_32() -> None:
    config = paper("clsa")

    def milliseconds(op: str) -> float:
        return floors.op_bytes(op, config, CONTEXT, 32, BF16) / 4.4e12 * 1e3

    assert milliseconds("select") == pytest.approx(0.244, rel=0.01)
    assert milliseconds("gather_attention") == pytest.approx(0.031, rel=0.02)
    closing = 2560 * 2560 + 3 * 2560 * 7680
    assert floors.op_bytes("close_layer", config, CONTEXT, 1, BF16) == 2 * closing + 3 * 2 * 2560
    assert floors.op_flops("close_layer", config, CONTEXT, 8) == 2 * 8 * closing
    assert floors.op_flops("select", config, CONTEXT, 32) == 2 * 32 * CONTEXT * 128
    assert floors.op_flops("dense_attention", config, CONTEXT, 32) == 4 * 32 * CONTEXT * 20 * 128
    assert floors.op_flops("gather_attention", config, 100, 1) == 4 * 100 * 20 * 128
    assert floors.op_flops("sample", config, CONTEXT, 1) == 0


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_never_reads_more_than_there_is(sizes: str, plan: str) -> None:
    config = plan_config(sizes, plan, 4096)
    got = floors.decode_bytes(config, 4096, 1, BF16)
    layers = config.num_hidden_layers
    assert got.dense + got.index_keys <= layers * 4096 * state_bytes_per_token(config, "bfloat16")
    assert got.windows == window_bytes(config, "bfloat16")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RequestError, match="sizes must be one of 4b"):
        plan_config("7b", "clsa", 64)
    with pytest.raises(RequestError, match="plans must be among transformer"):
        plan_config("tiny", "mamba", 64)


def test_what_is_kept_in_8_bits_counts_a_byte() -> None:
    plain = floors.decode_bytes(paper("clsa"), CONTEXT, 1, BF16)
    both = MemoryDtypes(FP8, FP8)
    kept = floors.decode_bytes(paper("clsa"), CONTEXT, 1, BF16, both)
    assert (2 * kept.index_keys, 2 * kept.selected) == (plain.index_keys, plain.selected)
    assert (kept.weights, kept.windows) == (plain.weights, plain.windows)
    keys_alone = floors.decode_bytes(paper("clsa"), CONTEXT, 1, BF16, MemoryDtypes(index=FP8))
    assert (keys_alone.index_keys, keys_alone.selected) == (kept.index_keys, plain.selected)
    yoco = floors.decode_bytes(paper("yoco"), CONTEXT, 1, BF16, both)
    assert 2 * yoco.dense == floors.decode_bytes(paper("yoco"), CONTEXT, 1, BF16).dense
    # The head and the norms stay as they are; a row of a projection has a scale.
    head = 151936 * 2560 * BF16
    sliding = (2 * 2560 * 2560 + 2 * 512 * 2560, 2 * 2560 + 2 * 512)
    cross, every = (2 * 2560 * 2560, 2 * 2560), (3 * 2560 * 7680, 2 * 7680 + 2560)
    shared = (2 * 512 * 2560 + 2 * 128 * 2560, 2 * 512 + 2 * 128)
    numbers, rows = (16 * sliding[i] + 16 * cross[i] + 32 * every[i] + shared[i] for i in range(2))
    norms = BF16 * (32 * 2 * 2560 + 16 * 2 * 128 + 2 * 2560)
    weights = floors.decode_bytes(paper("clsa"), CONTEXT, 1, BF16, weight_dtype=FP8).weights
    assert weights == numbers + 4 * rows + norms + head


def test_ops_on_what_is_kept_in_8_bits() -> None:
    config, both = paper("clsa"), MemoryDtypes(FP8, FP8)

    def saved(op: str) -> int:
        plain = floors.op_bytes(op, config, CONTEXT, 8, BF16)
        return plain - floors.op_bytes(op, config, CONTEXT, 8, BF16, both, FP8)

    assert saved("select") == 8 * CONTEXT * 128
    assert saved("gather_attention") == 8 * 2048 * 2 * 4 * 128
    assert saved("dense_attention") == 8 * CONTEXT * 2 * 4 * 128
    assert saved("linear") == 2560 * 7680 - 4 * 7680
    assert saved("close_layer") == 2560 * 2560 + 3 * 2560 * 7680 - 4 * (2 * 2560 + 2 * 7680)
    assert saved("attend_window") == saved("lm_head") == saved("sample") == 0
    ring = floors.op_bytes("attend_window", config, CONTEXT, 1, BF16) - 2 * 20 * 128 * BF16
    assert ring == (512 + 1) * 2 * 4 * 128 * BF16
