"""What a request knows about its own tokens."""

from __future__ import annotations

import random

from clsa.config import SamplingParams
from clsa.request import Request


def test_distinct_tokens_follow_the_answer() -> None:
    rng = random.Random(0)
    request = Request("a", [rng.randrange(50) for _ in range(40)], SamplingParams())
    for _ in range(100):
        assert list(request.distinct_tokens()) == list(dict.fromkeys(request.tokens))
        request.tokens.extend(rng.randrange(80) for _ in range(rng.randrange(3)))
