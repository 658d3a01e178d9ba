"""Sampling as a pure function, with the same Threefry bits as the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from clsa.ops import Sampled, SamplingBatch
from clsa_cuda.select import key_positions, ordered_keys

_WORD = 0xFFFFFFFF  # torch has no uint32 arithmetic: words live in int64 and are cut after each addition and shift


def threefry2x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds: 32-bit words in int64 tensors, in and out."""
    words = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (counter[0] + words[0]) & _WORD, (counter[1] + words[1]) & _WORD
    for step in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[step % 2]:
            x = (x + y) & _WORD
            y = ((y << rotation) & _WORD | (y >> (32 - rotation))) ^ x
        x = (x + words[(step + 1) % 3]) & _WORD
        y = (y + words[(step + 2) % 3] + (step + 1)) & _WORD
    return x, y


def gumbel(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Noise that depends on (seed, position, token id) alone: [R, 2], [R] -> [R, V] float32."""
    tokens = torch.arange(vocab_size, device=seed.device)[None]
    seed = seed.long()
    bits, _ = threefry2x32((seed[:, :1], seed[:, 1:]), (positions[:, None].long() & _WORD, tokens))
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # 24 significant bits: exact in float32
    return -(-uniform.log()).log()


def sample(logits: Tensor, sampling: SamplingBatch) -> Sampled:
    logits = logits.float()
    z = penalize(logits, sampling)
    if not sampling.all_greedy:
        z = _draw(z, sampling)
    is_defined = logits.amax(1).isfinite()  # NaN anywhere makes the maximum NaN
    tokens = torch.where(is_defined, z.argmax(1), -1).int()  # argmax takes the first of equal values
    return with_logprobs(tokens, logits, sampling)


def with_logprobs(tokens: Tensor, logits: Tensor, sampling: SamplingBatch) -> Sampled:
    """The sample [R], and what `sampling` wants to know of logits [R, V] float32."""
    if sampling.num_logprobs is None:
        return Sampled(tokens, None, None, None)
    logprobs = logits.log_softmax(1)
    num_best = min(sampling.num_logprobs, logits.shape[1])
    best = key_positions(ordered_keys(logits).topk(num_best, dim=1).values)
    chosen = logprobs.gather(1, tokens[:, None].clamp(min=0).long())[:, 0]
    return Sampled(tokens, chosen, best.int(), logprobs.gather(1, best))


def penalize(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    if sampling.penalty_tokens is None:
        return logits
    tokens = sampling.penalty_tokens.long()
    num_rows, vocab_size = logits.shape
    seen = torch.zeros(num_rows, vocab_size + 1, dtype=torch.bool, device=logits.device)
    seen.scatter_(1, torch.where(tokens < 0, vocab_size, tokens), True)  # the last column takes the padding
    penalty = sampling.repetition_penalty[:, None]
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen[:, :-1], penalized, logits)


def _draw(z: Tensor, sampling: SamplingBatch) -> Tensor:
    """Logits whose argmax is the sample: tempered, filtered and noisy where temperature > 0, else unchanged."""
    is_random = sampling.temperature[:, None] > 0
    tempered = z / torch.where(is_random, sampling.temperature[:, None], 1.0)
    if sampling.any_filter:
        tempered = torch.where(tempered >= _last_kept(tempered, sampling), tempered, -torch.inf)
    noise = gumbel(sampling.seed, sampling.positions, z.shape[1])
    return torch.where(is_random, tempered + noise, z)


def _last_kept(z: Tensor, sampling: SamplingBatch) -> Tensor:
    """The lowest logit that min-p, then top-k, then top-p keep: [R, V] -> [R, 1]."""
    vocab_size = z.shape[1]
    descending = z.sort(dim=1, descending=True).values
    last = descending[:, :1] + sampling.min_p[:, None].log()  # log 0 = -inf: off
    top_k = sampling.top_k[:, None].long()
    kth = descending.gather(1, (top_k - 1).clamp(0, vocab_size - 1))
    last = torch.maximum(last, torch.where((top_k > 0) & (top_k < vocab_size), kth, -torch.inf))
    kept = torch.where(descending >= last, descending, -torch.inf)
    probabilities = kept.softmax(1)
    before = probabilities.cumsum(1) - probabilities
    top_p = sampling.top_p[:, None]
    nucleus = torch.where(before < top_p, kept, torch.inf).amin(1, keepdim=True)
    return torch.maximum(last, torch.where(top_p < 1, nucleus, -torch.inf))
