"""What comes out: deltas of the engine, pieces of a stream, outputs of a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from clsa.errors import ClsaError
from clsa.request import Request


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a sampled token under the unmodified distribution, and the best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # best first


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one request. `token` is None where it ended without one (deadline, error)."""

    request: Request
    token: int | None
    text: str
    logprob: TokenLogprob | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt. `token_ids` include the token that stopped it, `text` does not."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop", "length", "cancelled", "deadline" or "error"
    prompt_tokens: int
    cached_tokens: int  # prompt tokens taken from the prefix cache
    logprobs: list[TokenLogprob] | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a stream. Speeds are tokens per second so far; `peak_memory` is in bytes."""

    text: str
    token: int  # -1 where the request ended without one
    logprob: float | None
    top: tuple[tuple[int, float], ...]  # the best tokens and their logprobs, as many as `logprobs` asked for
    prompt_tokens: int
    cached_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: int
    finish_reason: str | None


def collect(request: Request, deltas: Sequence[Delta]) -> RequestOutput:
    """The output of a finished request from everything its steps added."""
    logprobs = [delta.logprob for delta in deltas if delta.logprob is not None]
    return RequestOutput(
        text="".join(delta.text for delta in deltas),
        token_ids=[delta.token for delta in deltas if delta.token is not None],
        finish_reason=(deltas[-1].finish_reason if deltas else None) or "cancelled",
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=request.cached_tokens,
        logprobs=None if request.params.logprobs is None else logprobs,
        error=request.error,
    )


class PieceClock:
    """Turns the deltas of one request into pieces, with the speeds a reader wants to see."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._started = time.perf_counter()
        self._first: float | None = None
        self._tokens = 0

    def piece(self, delta: Delta, peak_memory: int) -> Piece:
        """Raises ClsaError if the request ended with an error."""
        if delta.token is None and delta.finish_reason == "error":
            raise ClsaError(self._request.error or "the request failed")
        now = time.perf_counter()
        self._first = self._first or now
        self._tokens += delta.token is not None
        computed = self._request.num_prompt_tokens - self._request.cached_tokens
        seconds = now - self._first
        return Piece(
            text=delta.text,
            token=-1 if delta.token is None else delta.token,
            logprob=None if delta.logprob is None else delta.logprob.logprob,
            top=() if delta.logprob is None else delta.logprob.top,
            prompt_tokens=self._request.num_prompt_tokens,
            cached_tokens=self._request.cached_tokens,
            prompt_tps=computed / max(self._first - self._started, 1e-9),
            generation_tokens=self._tokens,
            generation_tps=(self._tokens - 1) / seconds if seconds > 0 else 0.0,
            peak_memory=peak_memory,
            finish_reason=delta.finish_reason,
        )
