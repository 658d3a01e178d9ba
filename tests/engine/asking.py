"""Random prompts, and what the engine answers to them."""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any, cast

from clsa.config import SamplingParams
from clsa.engine import Engine
from clsa.outputs import Piece
from tests.engine.models import run

BAD = 50  # the token whose embedding is broken
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def prompts(count: int, length: int = 40, seed: int = 0) -> list[list[int]]:
    """Random prompts without BAD."""
    rng = random.Random(seed)
    return [[rng.choice([t for t in range(320) if t != BAD]) for _ in range(length)] for _ in range(count)]


def answers(engine: Engine, tokens: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    requests = [engine.make_request(prompt, params) for prompt in tokens]
    outputs = run(engine, requests)
    assert all(outputs[request].error is None for request in requests)
    return [outputs[request].token_ids for request in requests]


def close(pieces: Any) -> None:
    cast("Generator[Piece, None, None]", pieces).close()
