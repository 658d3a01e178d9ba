"""From logits to a token: penalties, filters, and noise that depends on nothing but seed, position and token."""

from __future__ import annotations

import numpy as np

from clsa.ops import Array, Sampled, SamplingBatch


def threefry2x32(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): uint32 words in, two uint32 words out."""
    with np.errstate(over="ignore"):
        words = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
        x, y = counter[0] + words[0], counter[1] + words[1]
        for step in range(5):
            for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[step % 2]:
                x = x + y
                y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
                y = y ^ x
            x = x + words[(step + 1) % 3]
            y = y + words[(step + 2) % 3] + np.uint32(step + 1)
    return x, y


def gumbel(seed: Array, positions: Array, vocab_size: int) -> Array:
    """Noise that depends on (seed, position, token id) alone: [R, 2], [R] -> [R, V]."""
    key = (seed[:, :1].astype(np.uint32), seed[:, 1:].astype(np.uint32))
    counter = (positions[:, None].astype(np.uint32), np.arange(vocab_size, dtype=np.uint32)[None])
    bits, _ = threefry2x32(key, counter)
    uniform = ((bits >> np.uint32(9)).astype(np.float64) + 0.5) * 2.0**-23  # 23 bits, never 0 or 1
    return -np.log(-np.log(uniform))


def penalize(logits: Array, penalty: float, tokens: Array) -> Array:
    """Positive logits of seen tokens are divided, negative ones multiplied: [V], [n] -> [V]."""
    seen = np.zeros(len(logits), bool)
    seen[tokens[tokens >= 0]] = True
    penalized = np.where(logits > 0, logits / penalty, logits * penalty)
    return np.where(seen, penalized, logits)


def filter_logits(logits: Array, top_k: int, top_p: float, min_p: float) -> Array:
    """To -inf what min-p, then top-k, then top-p leave out; ties with the last one kept stay: [V] -> [V]."""
    if min_p > 0:
        logits = np.where(logits >= logits.max() + np.log(min_p), logits, -np.inf)
    descending = np.sort(logits)[::-1]
    if 0 < top_k < len(logits):
        logits = np.where(logits >= descending[top_k - 1], logits, -np.inf)
        descending = np.sort(logits)[::-1]
    if top_p < 1:
        probabilities = np.exp(descending - descending[0])
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        last_kept = descending[before < top_p][-1]
        logits = np.where(logits >= last_kept, logits, -np.inf)
    return logits


def sample(logits: Array, sampling: SamplingBatch) -> Sampled:
    num_rows, vocab_size = logits.shape
    noise = gumbel(sampling.seed, sampling.positions, vocab_size)
    tokens = np.full(num_rows, -1, np.int32)
    for r in range(num_rows):
        if np.isnan(logits[r]).any() or not np.isfinite(logits[r].max()):
            continue
        z = logits[r]
        if sampling.penalty_tokens is not None:
            z = penalize(z, sampling.repetition_penalty[r], sampling.penalty_tokens[r])
        if sampling.temperature[r] > 0:
            z = z / sampling.temperature[r]
            z = filter_logits(z, sampling.top_k[r], sampling.top_p[r], sampling.min_p[r]) + noise[r]
        tokens[r] = np.argmax(z)
    if sampling.num_logprobs is None:
        return Sampled(tokens, None, None, None)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    top = np.argsort(-logprobs, axis=1, kind="stable")[:, : sampling.num_logprobs].astype(np.int32)
    chosen = np.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return Sampled(tokens, chosen, top, np.take_along_axis(logprobs, top, axis=1))
