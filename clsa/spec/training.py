"""The loss that the indexer learns from (paper, equations 5-6)."""

from __future__ import annotations

import numpy as np

from clsa.ops import Array


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def teacher(q: Array, k: Array) -> Array:
    """Dense causal attention, mean of layers and heads (equation 5): [L, n, H, D], [L, n, G, D] -> [n, n]."""
    length, num_heads, head_dim = q.shape[1:]
    k = np.repeat(k, num_heads // k.shape[2], axis=2)
    scores = np.einsum("lthd,lshd->lhts", q, k) / np.sqrt(head_dim)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    return softmax(scores).mean(axis=(0, 1))


def index_kd_loss(q_idx: Array, k_idx: Array, q: Array, k: Array) -> float:
    """Mean over positions of KL(teacher || softmax(q_idx . k_idx / sqrt(I))), causal (equations 5-6).

    Shapes: [n, I], [n, I], [L, n, H, D], [L, n, G, D]. The teacher carries no gradient.
    """
    length, index_dim = q_idx.shape
    target = teacher(q, k)
    scores = np.where(np.tril(np.ones((length, length), bool)), q_idx @ k_idx.T / np.sqrt(index_dim), -np.inf)
    student = softmax(scores)
    ratio = np.log(np.where(target > 0, target, 1.0)) - np.log(np.where(target > 0, student, 1.0))
    return float((target * ratio).sum(axis=-1).mean())
