"""One token per row, as a pure function of logits, parameters, seed and position; no host."""

from __future__ import annotations

import mlx.core as mx

from clsa.ops import Sampled, SamplingBatch
from clsa_mlx.fused import fused
from clsa_mlx.select import key_places, largest


def sample(logits: mx.array, sampling: SamplingBatch) -> Sampled:
    z = logits
    if sampling.penalty_tokens is not None:
        z = _penalize(z, sampling.repetition_penalty[:, None], sampling.penalty_tokens)
    tokens = mx.argmax(z, axis=1)
    if not sampling.all_greedy:
        is_random = sampling.temperature > 0
        temperature = mx.where(is_random, sampling.temperature, 1.0)[:, None]
        # The best logit becomes 0 first: a tiny temperature must not make it overflow.
        noisy = (z - z.max(axis=1, keepdims=True)) / temperature
        if sampling.any_filter:
            noisy = _filter(noisy, sampling)
        noisy = noisy + _gumbel(sampling.seed, sampling.positions, logits.shape[1])
        tokens = mx.where(is_random, mx.argmax(noisy, axis=1), tokens)
    best = logits.max(axis=1)
    is_sound = mx.isfinite(best) & ~mx.isnan(logits).any(axis=1)
    tokens = mx.where(is_sound, tokens.astype(mx.int32), -1)
    if sampling.num_logprobs is None:
        return Sampled(tokens, None, None, None)
    return _with_logprobs(tokens, logits, sampling.num_logprobs)


def _with_logprobs(tokens: mx.array, logits: mx.array, count: int) -> Sampled:
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs = shifted - mx.log(mx.exp(shifted).sum(axis=1, keepdims=True))
    chosen = mx.take_along_axis(logprobs, mx.maximum(tokens, 0)[:, None], axis=1)[:, 0]
    keys = mx.sort(largest(logprobs, min(count, logits.shape[1])), axis=1)[:, ::-1]
    top = key_places(keys)
    return Sampled(tokens, chosen, top, mx.take_along_axis(logprobs, top, axis=1))


def _penalize(logits: mx.array, penalty: mx.array, tokens: mx.array) -> mx.array:
    """Positive logits of seen tokens are divided by the penalty, negative ones multiplied: [R, V]."""
    num_rows, vocab_size = logits.shape
    seen = mx.zeros((num_rows, vocab_size + 1), mx.bool_)  # one column more, for the padding
    columns = mx.where(tokens < 0, vocab_size, tokens)
    seen = mx.put_along_axis(seen, columns, mx.array(True), axis=1)[:, :vocab_size]
    penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(seen, penalized, logits)


def _filter(logits: mx.array, sampling: SamplingBatch) -> mx.array:
    """Drop (to -inf) what min-p, then top-k, then top-p leave out. Rows [R, V] whose best logit is 0."""
    vocab_size = logits.shape[1]
    logits = mx.where(logits >= mx.log(sampling.min_p)[:, None], logits, -mx.inf)
    descending = mx.sort(logits, axis=1)[:, ::-1]
    last = mx.where(sampling.top_k > 0, mx.minimum(sampling.top_k, vocab_size), vocab_size)[:, None] - 1
    lowest = mx.take_along_axis(descending, last, axis=1)
    descending = mx.where(descending >= lowest, descending, -mx.inf)
    probabilities = mx.softmax(descending, axis=1, precise=True)
    before = mx.cumsum(probabilities, axis=1) - probabilities
    kept = (before < sampling.top_p[:, None]).sum(axis=1, keepdims=True)
    nucleus = mx.take_along_axis(descending, mx.maximum(kept, 1) - 1, axis=1)
    lowest = mx.where(sampling.top_p[:, None] < 1, mx.maximum(lowest, nucleus), lowest)
    return mx.where(logits >= lowest, logits, -mx.inf)


def _gumbel(seed: mx.array, positions: mx.array, vocab_size: int) -> mx.array:
    """Noise that depends on (seed, position, token id) alone: [R, 2] uint32, [R] -> [R, V] float32."""
    counters = positions.astype(mx.uint32)[:, None], mx.arange(vocab_size, dtype=mx.uint32)[None]
    bits, _ = threefry2x32(seed[:, :1], seed[:, 1:], *counters)
    uniform = ((bits >> 9).astype(mx.float32) + 0.5) * 2.0**-23  # 23 bits, exact in float32, never 0 or 1
    return -mx.log(-mx.log(uniform))


@fused
def threefry2x32(key_low: mx.array, key_high: mx.array, low: mx.array, high: mx.array) -> tuple[mx.array, mx.array]:
    """Threefry-2x32 with 20 rounds: uint32 words of key and counter in, two uint32 words out."""
    words = (key_low, key_high, key_low ^ key_high ^ 0x1BD11BDA)
    x, y = low + key_low, high + key_high
    for step in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[step % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x = x + words[(step + 1) % 3]
        y = y + words[(step + 2) % 3] + (step + 1)
    return x, y
