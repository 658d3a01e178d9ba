"""Tiny random checkpoints, with a tokenizer, that behave like models: every part of them matters to the next token."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clsa
from clsa.backend import load_backend
from clsa.checkpoint import find_tokenizer_files, save_checkpoint
from clsa.config import EngineConfig, ModelConfig, SamplingParams
from clsa.engine import Engine
from clsa.llm import LLM
from clsa.ops import Ops
from clsa.outputs import Delta, RequestOutput, collect
from clsa.params import init_params, nest
from clsa.plan import make_plan
from clsa.request import Request
from clsa.sizing import plan_sizes
from clsa.tokenizer import load_tokenizer
from clsa.train.bpe import save_tokenizer, train_tokenizer

SLIDING, FULL, CROSS = "sliding_attention", "full_attention", "cross_attention"
CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layer_types=(SLIDING, SLIDING, CROSS, CROSS),
    index_topk_pattern="FS",
    sliding_window=16,
    index_topk=24,
    index_head_dim=16,
    max_position_embeddings=1024,
    torch_dtype="float32",
    bos_token_id=0,
    eos_token_id=1,
)
# Fixed here, so that the tokens, and with them every test, are the same wherever the tests run.
TEXT = (
    "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n\n"
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n\n"
    "for name in sorted(names):\n    print(name, len(name))\nif __name__ == '__main__':\n    main()\n"
    "äöü – “quoted” 漢字 😀\n"
) * 3


def params(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a size at which attention, routing and feed-forward all change the logits a lot."""
    return {name: w if w.ndim == 1 else w * 10 for name, w in init_params(config, seed).items()}


@functools.cache
def _tokenizer_files() -> tuple[Path, ...]:
    folder = Path(tempfile.mkdtemp(prefix="clsa-test-"))
    save_tokenizer(train_tokenizer([TEXT], CONFIG.vocab_size), folder)
    return tuple(find_tokenizer_files(folder))


def save(folder: Path, config: ModelConfig = CONFIG, weights: dict[str, np.ndarray] | None = None) -> Path:
    """A checkpoint in `folder`."""
    save_checkpoint(folder, config, weights or params(config), tokenizer_files=list(_tokenizer_files()))
    return folder


@functools.cache
def folder(**changes: Any) -> Path:
    """The checkpoint of CONFIG with these changes, made once per process."""
    return save(Path(tempfile.mkdtemp(prefix="clsa-test-")) / "model", replace(CONFIG, **changes))


def load(backend: str = "numpy", model: Path | None = None, **engine: Any) -> LLM:
    """The model on a backend in float32 ("cuda" means torch on the CPU); `engine` are fields of EngineConfig."""
    return clsa.load(
        str(model or folder()),
        backend=backend,
        device="cpu" if backend == "cuda" else None,
        dtype="float32",
        engine=EngineConfig(**{"prefix_cache_bytes": 1 << 24, "max_num_seqs": 8} | engine),
    )


def exchange_ops(llm: LLM, ops: Any) -> None:
    """Let the next steps use other ops."""
    runner = llm._engine._runner
    runner._ops = runner._compute.ops = ops


on_backends = pytest.mark.parametrize(
    "backend", ["numpy", pytest.param("mlx", marks=pytest.mark.mlx), pytest.param("cuda", id="cuda-cpu")]
)


def mixed_requests(count: int, seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 400 tokens, many of them short, with every way to sample and to stop."""
    rng = random.Random(seed)
    shared = [rng.randrange(CONFIG.vocab_size) for _ in range(400)]
    requests = []
    for _ in range(count):
        length = min(400, int(np.exp(rng.uniform(0, np.log(401)))))
        common = rng.choice((0, 0, length // 2, length))  # of the prompt, how much others may have too
        prompt = shared[:common] + [rng.randrange(CONFIG.vocab_size) for _ in range(length - common)]
        requests.append((prompt, sampling(rng)))
    return requests


def sampling(rng: random.Random, max_tokens: int | None = None) -> SamplingParams:
    """Any parameters; up to 40 tokens, most of them few, if not told."""
    greedy = rng.random() < 0.5
    return SamplingParams(
        max_tokens=max_tokens or min(40, int(np.exp(rng.uniform(0, np.log(41))))),
        temperature=0.0 if greedy else rng.choice((0.3, 1.0, 2.0)),
        top_k=rng.choice((0, 0, 1, 5, 50)),
        top_p=rng.choice((1.0, 1.0, 0.5, 0.9)),
        min_p=rng.choice((0.0, 0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.3, 0.8)),
        seed=rng.choice((0, rng.getrandbits(63))),
        stop=rng.choice(((), (), ("e",), ("in", "\n"), ("never there",))),
        stop_token_ids=rng.choice(((), (), (7, 300))),
        ignore_eos=rng.random() < 0.3,
        logprobs=rng.choice((None, None, 0, 3)),
    )


def engine(
    ops: Ops, weights: dict[str, np.ndarray] | None = None, config: ModelConfig = CONFIG, **sizes: Any
) -> Engine:
    """The engine without the LLM around it, in float32."""
    plan, settings = make_plan(config), EngineConfig(**{"prefix_cache_bytes": 1 << 24, "max_num_seqs": 4} | sizes)
    tree = nest({name: ops.asarray(w, "float32") for name, w in (weights or params(config)).items()})
    tokenizer = load_tokenizer(folder(), CONFIG)
    return Engine(ops, tree, plan, tokenizer, "float32", settings, plan_sizes(ops, plan, "float32", settings))


def open_ops(backend: str) -> Ops:
    return load_backend(backend, "cpu" if backend == "cuda" else None)[0]


def run(engine: Engine, requests: Sequence[Request]) -> dict[Request, RequestOutput]:
    """Add these requests and run the engine until it has nothing left to do."""
    for request in requests:
        engine.add(request)
    return finish(engine, requests)


def finish(engine: Engine, requests: Sequence[Request]) -> dict[Request, RequestOutput]:
    deltas: dict[Request, list[Delta]] = {request: [] for request in requests}
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request].append(delta)
    assert_all_returned(engine.stats())
    return {request: collect(request, parts) for request, parts in deltas.items()}


def assert_all_returned(stats: dict[str, int]) -> None:
    """Nothing runs, and nobody but the cache holds anything."""
    assert stats["running"] == stats["waiting"] == 0
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
    assert stats["slots_free"] == stats["slots_total"]
    assert stats["snapshots_free"] + stats["snapshots_cached"] == stats["snapshots_total"]


class Failing:
    """Ops that raise `error` in the n-th call of one function from now on, or in every one from then on."""

    def __init__(self, ops: Ops) -> None:
        self._ops, self._function, self._left = ops, "", 0
        self._error: BaseException | None = None
        self._for_ever = False

    def fail(self, function: str, n: int, error: BaseException, *, for_ever: bool = False) -> None:
        self._function, self._left, self._error, self._for_ever = function, n, error, for_ever

    def mend(self) -> None:
        self._error = None

    @property
    def has_failed(self) -> bool:
        return self._left <= 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ops, name)
        if name != self._function or self._error is None:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._error is not None and (self._left == 0 or (self._left < 0 and self._for_ever)):
                raise self._error
            return value(*args, **kwargs)

        return call
