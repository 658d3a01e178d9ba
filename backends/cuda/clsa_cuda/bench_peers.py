"""For `clsa bench`: transformers' dense Qwen3 at the sizes of a config, with random weights and a random cache."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from clsa.config import ModelConfig
from clsa.hostmemory import host_memory_stats
from clsa_cuda.plain import DTYPES

_GROWTH = 256
_MEMORY_SHARE = 0.45  # its cache is copied whenever it grows


def bench_peers(config: ModelConfig, dtype: str, device: str | None) -> list[Transformers]:
    """transformers, if it is installed, on `device` ("cpu", "cuda", "cuda:N"; None: a GPU if there is one)."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return []
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return [Transformers(config, DTYPES[dtype], where, f"transformers {installed} dense")]


class Transformers:
    """A dense decoder in which every layer keeps K and V; see `clsa.bench.peers.Peer`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, name: str) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.name, self._config, self._dtype, self._device = name, config, dtype, device
        c = config
        make: Any = Qwen3Config
        self._settings = make(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            max_position_embeddings=c.max_position_embeddings,
            tie_word_embeddings=c.tie_word_embeddings,
            attn_implementation="sdpa",
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                self._model: Any = Qwen3ForCausalLM(self._settings).eval()
        finally:
            torch.set_default_dtype(before)

    def decode(self, context: int, batch: int) -> Callable[[], None]:
        """Steps with the cache that `generate` uses by default."""
        self._check_memory(context + _GROWTH, batch)
        cache = self._cache(context, batch)
        last = self._tokens(1, batch)

        @torch.inference_mode()
        def step() -> None:
            nonlocal last
            logits = self._model(input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            last = logits[:, -1:].argmax(-1)
            last.cpu()

        return step

    def prefill(self, tokens: int, batch: int) -> Callable[[], None]:
        """Prompts of equal length as one batch, in one call."""
        self._check_memory(tokens, batch)
        prompts = self._tokens(tokens, batch)

        @torch.inference_mode()
        def run() -> None:
            try:
                self._model(input_ids=prompts, use_cache=True, logits_to_keep=1).logits.argmax(-1).cpu()
            except torch.OutOfMemoryError as error:
                raise MemoryError(f"out of memory: {' '.join(str(error).split())[:120]}") from None

        return run

    def _tokens(self, length: int, batch: int) -> torch.Tensor:
        return torch.randint(self._config.vocab_size, (batch, length), device=self._device)

    def _cache(self, context: int, batch: int) -> Any:
        from transformers import DynamicCache

        c = self._config
        cache = DynamicCache(config=self._settings)
        shape = (batch, c.num_key_value_heads, context, c.head_dim)
        for layer in range(c.num_hidden_layers):
            k, v = (torch.randn(shape, dtype=self._dtype, device=self._device) for _ in range(2))
            cache.update(k, v, layer)
        return cache

    def _check_memory(self, tokens: int, batch: int) -> None:
        c = self._config
        rows = 2 * c.num_hidden_layers * batch * tokens
        needed = rows * c.num_key_value_heads * c.head_dim * self._dtype.itemsize
        free = self._free()
        if needed > _MEMORY_SHARE * free:
            raise MemoryError(
                f"its cache needs {needed / 1e9:.1f} GB, and again while it grows; {free / 1e9:.1f} are free"
            )

    def _free(self) -> int:
        if self._device.type == "cpu":
            return host_memory_stats()["free"]
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])
