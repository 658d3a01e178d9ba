"""For `clsa bench`: mlx-lm's dense Qwen3 at the sizes of a config, with random weights and a random cache."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from clsa.config import ModelConfig
from clsa_mlx.ops import memory_stats
from clsa_mlx.state import DTYPES

_PREFILL_STEP = 2048  # mlx-lm's own default
_GROWTH = 256  # tokens that its cache grows by at a time
_MEMORY_SHARE = 0.9


def bench_peers(config: ModelConfig, dtype: str, device: str | None) -> list[MlxLm]:
    """mlx-lm, if it is installed. It runs on MLX's default device, which `open` has set."""
    try:
        installed = version("mlx-lm")
    except PackageNotFoundError:
        return []
    return [MlxLm(config, DTYPES[dtype], f"mlx-lm {installed} dense")]


class MlxLm:
    """A dense decoder in which every layer keeps K and V; see `clsa.bench.peers.Peer`."""

    def __init__(self, config: ModelConfig, dtype: mx.Dtype, name: str) -> None:
        from mlx_lm.models.qwen3 import Model, ModelArgs

        self.name, self._config, self._dtype = name, config, dtype
        c = config
        self._model = Model(
            ModelArgs(
                model_type="qwen3",
                hidden_size=c.hidden_size,
                num_hidden_layers=c.num_hidden_layers,
                intermediate_size=c.intermediate_size,
                num_attention_heads=c.num_attention_heads,
                rms_norm_eps=c.rms_norm_eps,
                vocab_size=c.vocab_size,
                num_key_value_heads=c.num_key_value_heads,
                max_position_embeddings=c.max_position_embeddings,
                head_dim=c.head_dim,
                tie_word_embeddings=c.tie_word_embeddings,
                rope_theta=c.rope_theta,
            )
        )
        self._model.update(tree_map(self._random_weight, self._model.parameters()))
        mx.eval(self._model.parameters())

    def _random_weight(self, weight: mx.array) -> mx.array:
        return (0.02 * mx.random.normal(weight.shape) + (weight.ndim == 1)).astype(self._dtype)

    def decode(self, context: int, batch: int) -> Callable[[], None]:
        """Steps as mlx-lm's generate runs them: the next one is started before the last one is waited for."""
        self._check_memory(context + _GROWTH, batch)
        caches = self._caches(context, batch)
        last = mx.random.randint(0, self._config.vocab_size, (batch,))

        def step() -> None:
            nonlocal last
            following = mx.argmax(self._model(last[:, None], cache=caches)[:, -1], axis=-1)
            mx.async_eval(following)
            mx.eval(last)
            last = following

        return step

    def prefill(self, tokens: int, batch: int) -> Callable[[], None]:
        """Prompts of equal length as one batch, in mlx-lm's chunks."""
        self._check_memory(tokens, batch)
        prompts = mx.random.randint(0, self._config.vocab_size, (batch, tokens))

        def run() -> None:
            from mlx_lm.models.cache import KVCache

            caches = [KVCache() for _ in self._model.layers]
            for start in range(0, tokens - 1, _PREFILL_STEP):
                self._model(prompts[:, start : min(start + _PREFILL_STEP, tokens - 1)], cache=caches)
                mx.eval([cache.state for cache in caches])
            mx.eval(mx.argmax(self._model(prompts[:, -1:], cache=caches)[:, -1], axis=-1))

        return run

    def _caches(self, context: int, batch: int) -> list[Any]:
        from mlx_lm.models.cache import KVCache

        c = self._config
        caches: list[Any] = []
        shape = (batch, c.num_key_value_heads, -(-(context + 1) // _GROWTH) * _GROWTH, c.head_dim)
        for _ in self._model.layers:
            cache = KVCache()
            cache.keys, cache.values = (mx.random.uniform(-1.7, 1.7, shape, self._dtype) for _ in range(2))
            cache.offset = context
            mx.eval(cache.keys, cache.values)
            caches.append(cache)
        return caches

    def _check_memory(self, tokens: int, batch: int) -> None:
        c = self._config
        rows = 2 * c.num_hidden_layers * batch * tokens
        needed = rows * c.num_key_value_heads * c.head_dim * self._dtype.size
        free = memory_stats()["free"]
        if needed > _MEMORY_SHARE * free:
            raise MemoryError(f"its cache needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
