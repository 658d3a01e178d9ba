"""What mlx-lm asks of a model file: `ModelArgs` and `Model`. The computation is `clsa.model` on the ops of clsa_mlx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from clsa.batch import SequenceChunk, build_batch
from clsa.config import ModelConfig
from clsa.errors import BackendError, ConfigError, RequestError
from clsa.model import forward, new_state
from clsa.ops import Array, Ops, QuantizedWeight, State
from clsa.params import nest, tensor_shapes
from clsa.plan import Plan, make_plan
from clsa_mlx import ops as mlx_ops
from clsa_mlx.mlx_lm_cache import ClsaCache
from clsa_mlx.mlx_lm_state import DTYPE_NAMES

ops = cast(Ops, mlx_ops)


class ModelArgs:
    """Reads config.json for mlx-lm, into a ModelConfig."""

    @staticmethod
    def from_dict(params: Mapping[str, Any]) -> ModelConfig:
        """`ModelConfig.from_dict`, after what mlx-lm puts into the config on its own. Raises ConfigError."""
        config = dict(params)
        if config.pop("quantize_activations", False):
            raise ConfigError("a clsa model cannot quantise activations; leave quantize_activations out")
        quantization = config.get("quantization")
        if config.get("quantization_config") == quantization:
            config.pop("quantization_config", None)
        if isinstance(quantization, Mapping) and quantization.get("mode") == "affine":
            config["quantization"] = {key: value for key, value in quantization.items() if key != "mode"}
        return ModelConfig.from_dict(config)


class Model(nn.Module):
    """The weights as modules under the names of the checkpoint, so that mlx-lm can load, quantise and save them."""

    def __init__(self, args: ModelConfig) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self._plan = make_plan(args)
        tree = nest({name: _leaf(name, shape) for name, shape in tensor_shapes(args).items()})
        if "lm_head" in tree:
            self.lm_head = tree.pop("lm_head")
        self.model = _modules(tree)
        self.eval()

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def make_cache(self) -> list[ClsaCache]:
        """One prompt cache for all layers together."""
        return [ClsaCache(_window(self._plan))]

    def __call__(self, inputs: mx.array, cache: Sequence[ClsaCache] | None = None) -> mx.array:
        """Logits of every position, float32: [B, T] token ids -> [B, T, V]. Without a cache, of prompts from 0 on.

        Nothing beyond the state is computed until the logits are used. Zeros stand where a row is padded.
        Raises RequestError if the cache is none of this model's, or while the model is in training mode.
        """
        if self.training:
            raise RequestError("mlx-lm cannot train a CLSA model; use clsa train, or call model.eval() first")
        own = self.make_cache()[0] if cache is None else self._own(cache)
        num_rows, width = inputs.shape
        params = _weights(self.model)
        if not self.args.tie_word_embeddings:
            params["lm_head"] = _weights(self.lm_head)
        dtype = DTYPE_NAMES[_floating(params["embed_tokens"]).dtype]
        counts, sequences, state = own.begin(
            num_rows, width, lambda rows, slots: new_state(ops, self._plan, rows, slots, dtype)
        )
        _check_fits(self._plan, state)
        held = [
            SequenceChunk(range(count), s.length, s.pages, slot, "all")
            for slot, (s, count) in enumerate(zip(sequences, counts, strict=True))
            if count > 0
        ]
        rows = None if sum(counts) == num_rows * width else _rows(counts, width)
        tokens = inputs.reshape(-1).astype(mx.int32)
        logits = None
        if held:
            batch = build_batch(ops, held, self.args.sliding_window, tokens if rows is None else tokens[rows])
            logits, state = forward(ops, params, self._plan, batch, state)
        own.commit(counts, state)
        if cache is not None:
            ops.evaluate(state)  # so that a cache depends on no unfinished work of the thread that filled it
        return _spread(logits, rows, (num_rows, width, self.args.vocab_size))

    def _own(self, cache: Sequence[ClsaCache]) -> ClsaCache:
        if len(cache) != 1 or not isinstance(cache[0], ClsaCache) or cache[0].window != _window(self._plan):
            raise RequestError(
                "a CLSA model takes the one prompt cache that its make_cache gives, for all layers together; this is "
                "another model's, or speculative decoding with a draft model, which it cannot do"
            )
        return cache[0]


def _window(plan: Plan) -> int:
    return plan.config.sliding_window if plan.num_windows else 0


def _check_fits(plan: Plan, state: State) -> None:
    """Raise RequestError if the state is that of a model of other sizes, as a saved prompt cache may be."""
    c = plan.config
    kv = (c.num_key_value_heads, c.head_dim)
    index = tuple(c.index_head_dim if has_index else None for has_index in plan.memory_has_index)
    if (
        tuple(None if m.k_idx is None else m.k_idx.shape[1] for m in state.memories) != index
        or len(state.windows) != plan.num_windows
        or any(x.shape[1:] != kv for x in [m.k for m in state.memories] + [w.k for w in state.windows])
    ):
        raise RequestError("the prompt cache was made by a model of other sizes; process the prompt with this one")


def _rows(counts: Sequence[int], width: int) -> mx.array:
    """Where the tokens that are no padding stand in [B * width]."""
    return mx.array(np.concatenate([slot * width + np.arange(count) for slot, count in enumerate(counts)]))


def _spread(logits: Array | None, rows: mx.array | None, shape: tuple[int, int, int]) -> mx.array:
    """Logits of the tokens at `rows` (None: all of them) among zeros for the padding: [R, V] -> [B, T, V]."""
    if rows is not None or logits is None:
        padded = mx.zeros((shape[0] * shape[1], shape[2]), mx.float32)
        if logits is not None:
            padded[rows] = logits
        logits = padded
    return logits.reshape(shape)


# -- weights as modules, and modules as weights ----------------------------------------------------------------


def _leaf(name: str, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 1:
        return nn.RMSNorm(*shape)
    if name == "model.embed_tokens.weight":
        return nn.Embedding(*shape)
    return nn.Linear(shape[1], shape[0], bias=False)


def _modules(tree: Any) -> Any:
    """The same tree with modules in place of its dicts."""
    if isinstance(tree, list):
        return [_modules(item) for item in tree]
    if isinstance(tree, nn.Module):
        return tree
    module = nn.Module()
    for name, item in tree.items():
        setattr(module, name, _modules(item))
    return module


def _weights(module: Any) -> Any:
    """The tree that `clsa.model` reads. Raises BackendError on modules that it has no value for."""
    if isinstance(module, list):
        return [_weights(item) for item in module]
    kind = type(module)
    if kind in (nn.Linear, nn.Embedding, nn.RMSNorm):
        return module.weight
    if kind in (nn.QuantizedLinear, nn.QuantizedEmbedding) and module.mode == "affine":
        return QuantizedWeight(module.weight, module.scales, module.biases, module.group_size, module.bits)
    if kind is not nn.Module:
        raise BackendError(
            f"a CLSA model cannot use {kind.__name__} layers in mlx-lm (plain and affine quantised ones only); "
            "fuse adapters into the checkpoint first"
        )
    return {name: _weights(item) for name, item in module.items()}


def _floating(weight: mx.array | QuantizedWeight) -> mx.array:
    return weight.scales if isinstance(weight, QuantizedWeight) else weight


__all__ = ["Model", "ModelArgs"]
