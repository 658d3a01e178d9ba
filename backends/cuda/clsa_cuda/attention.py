"""Softmax attention over whatever rows a caller gathered, in float32, block of keys after block of keys."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Small beside the memory of any machine this runs on, large enough that a GPU is busy with one block.
MAX_TEMPORARY_BYTES = 256 << 20
# Queries of one block in prefill: enough for large matrix products, few enough to leave room for long rows of scores.
MAX_QUERIES = 512


def block_length(bytes_per_item: int, limit: int) -> int:
    """How many items fit into one temporary: at least 1, at most `limit`."""
    return max(1, min(limit, MAX_TEMPORARY_BYTES // max(1, bytes_per_item)))


def attend(q: Tensor, blocks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """GQA attention of Q queries in each of n groups, scale 1/sqrt(D): q [n, Q, H, D] -> [n, Q, H, D].

    A block of S keys is (k [n, S, G, D], v [n, S, G, D], visible [n, Q, S]); k and v are finite where nothing is
    visible. No blocks, or nothing visible in any of them, gives zeros.
    """
    n, Q, H, D = q.shape
    out = torch.zeros(n, H, Q, D, device=q.device)
    total = torch.zeros(n, H, Q, 1, device=q.device)
    highest = torch.full_like(total, -torch.inf)
    scaled = q.float().transpose(1, 2) * D**-0.5  # [n, H, Q, D]
    for k, v, visible in blocks:
        G, S = k.shape[2], k.shape[1]
        queries = scaled.reshape(n, G, -1, D)  # heads of a group read the same keys
        scores = (queries @ k.permute(0, 2, 3, 1).float()).view(n, H, Q, S)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        base = torch.where(new_highest == -torch.inf, 0.0, new_highest)  # -inf - -inf is NaN
        weights = (scores - base).exp()
        keep = (highest - base).exp()
        added = weights.view(n, G, -1, S) @ v.transpose(1, 2).float()
        out = out * keep + added.view(n, H, Q, D)
        total = total * keep + weights.sum(-1, keepdim=True)
        highest = new_highest
    return (out / torch.where(total == 0, 1.0, total)).transpose(1, 2).to(q.dtype)
