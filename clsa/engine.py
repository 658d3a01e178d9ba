"""The loop: schedule, launch, read the step before, turn tokens into text, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from clsa.config import EngineConfig, SamplingParams
from clsa.errors import ClsaError
from clsa.model import Params
from clsa.ops import Ops, Sampled
from clsa.outputs import Delta, TokenLogprob
from clsa.plan import Plan
from clsa.request import Request, State
from clsa.runner import Runner
from clsa.scheduler import Scheduler, StepPlan
from clsa.sizing import plan_sizes
from clsa.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer


@dataclass(frozen=True, slots=True)
class _Answer:
    """The text of a request while it grows."""

    decoder: IncrementalDecoder
    matcher: StopMatcher


@dataclass(frozen=True, slots=True)
class _Read:
    """Samples of one step on the host; the optional ones as in `ops.Sampled`."""

    tokens: np.ndarray
    logprobs: np.ndarray | None
    top_tokens: np.ndarray | None
    top_logprobs: np.ndarray | None

    def logprob(self, row: int, wanted: int | None) -> TokenLogprob | None:
        if wanted is None or self.logprobs is None or self.top_tokens is None or self.top_logprobs is None:
            return None
        top = zip(self.top_tokens[row, :wanted].tolist(), self.top_logprobs[row, :wanted].tolist(), strict=True)
        return TokenLogprob(int(self.tokens[row]), float(self.logprobs[row]), tuple(top))


class Engine:
    """Many requests over one model. `step` launches a step and reports what the step before it brought.

    The device is one step ahead of the host: a request that stops is noticed one step later, and the sample it
    made in between is dropped. Raises ConfigError if the state cannot fit.
    """

    def __init__(
        self, ops: Ops, params: Params, plan: Plan, tokenizer: Tokenizer, dtype: str, config: EngineConfig
    ) -> None:
        sizes = plan_sizes(ops, plan, dtype, config)
        self.sizes = sizes
        self.scheduler = Scheduler(
            num_pages=sizes.num_pages,
            num_slots=sizes.num_slots,
            num_snapshots=sizes.num_snapshots,
            max_tokens_per_step=config.max_tokens_per_step,
            max_model_len=sizes.max_model_len,
            window=plan.config.sliding_window if plan.num_windows else 0,
            max_waiting=config.max_waiting,
            max_cached_pages=sizes.num_cached_pages,
            eos_token_ids=plan.config.eos_token_ids,
        )
        self._ops, self._tokenizer, self._max_waiting = ops, tokenizer, config.max_waiting
        self._runner = Runner(ops, params, plan, dtype, sizes.num_pages, sizes.num_slots + sizes.num_snapshots)
        self._answers: dict[str, _Answer] = {}
        self._in_flight: tuple[StepPlan, Sampled | None] | None = None
        self._ids = count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def has_room(self) -> bool:
        """Whether one more request may be added to the queue."""
        return self.scheduler.num_waiting < self._max_waiting

    def make_request(
        self, tokens: Sequence[int], params: SamplingParams, *, priority: int = 0, salt: str = ""
    ) -> Request:
        """A request of this engine, not yet added. Raises RequestError if it can never run."""
        request = Request(f"{next(self._ids)}", list(tokens), params, priority, salt)
        self.scheduler.check(request)
        return request

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if the queue is full."""
        self.scheduler.add(request)
        decoder = IncrementalDecoder(self._tokenizer)
        self._answers[request.id] = _Answer(decoder, StopMatcher(request.params.stop))

    def step(self) -> list[Delta]:
        """Launch the next step, then read the one before it: what each request got, in order of service."""
        expired = self.scheduler.expire(time.monotonic())
        plan = self.scheduler.schedule()
        before, self._in_flight = self._in_flight, None
        if plan is not None:
            sampled = self._runner.launch(plan, None if before is None else before[1])
            self._in_flight = (plan, sampled)
        deltas = [self._ended(request) for request in expired]
        return deltas if before is None else deltas + self._read(*before)

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests in whatever state they are, and read what is under way so that their pages come back."""
        for request in requests:
            self.scheduler.cancel(request.id)
            self._answers.pop(request.id, None)
        if self._in_flight is not None and not any(self._answers):
            before, self._in_flight = self._in_flight, None
            self._read(*before)

    def stats(self) -> dict[str, int]:
        return self.scheduler.stats()

    def _read(self, plan: StepPlan, sampled: Sampled | None) -> list[Delta]:
        """Wait for a step, hand its samples to the scheduler, report them."""
        read = None if sampled is None else self._to_host(sampled)
        tokens = [] if read is None else read.tokens.tolist()
        samples = [token if token >= 0 else ClsaError("the model's logits are not finite") for token in tokens]
        changed = {request.id for request in self.scheduler.complete(plan, samples)}
        deltas = []
        wanted = [chunk.request for chunk in plan.chunks if chunk.wants_logits]
        for row, (request, token) in enumerate(zip(wanted, tokens, strict=True)):
            if request.id not in changed or request.id not in self._answers:
                continue
            if token < 0 or read is None:
                deltas.append(self._ended(request))
            else:
                deltas.append(self._report(request, token, read.logprob(row, request.params.logprobs)))
        return deltas

    def _to_host(self, sampled: Sampled) -> _Read:
        optional = (sampled.logprobs, sampled.top_tokens, sampled.top_logprobs)
        return _Read(
            self._ops.to_numpy(sampled.tokens), *(None if x is None else self._ops.to_numpy(x) for x in optional)
        )

    def _report(self, request: Request, token: int, logprob: TokenLogprob | None) -> Delta:
        """The text that one more token makes certain. A stop string ends the request here."""
        answer = self._answers[request.id]
        stops = token in request.stop_ids
        text, stopped = answer.matcher.push("" if stops else answer.decoder.push(token))
        if stopped:
            self.scheduler.finish(request, "stop")
        elif request.state is State.FINISHED:
            rest, stopped = answer.matcher.push(answer.decoder.flush())
            text += rest if stopped else rest + answer.matcher.flush()
        if request.state is State.FINISHED:
            del self._answers[request.id]
        return Delta(request, token, text, logprob, request.finish_reason)

    def _ended(self, request: Request) -> Delta:
        """The end of a request without a token: what was held back is given out."""
        answer = self._answers.pop(request.id)
        text, stopped = answer.matcher.push(answer.decoder.flush())
        return Delta(request, None, text if stopped else text + answer.matcher.flush(), None, request.finish_reason)
