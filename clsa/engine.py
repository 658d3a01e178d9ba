"""The loop: schedule, launch, read the step before, turn tokens into text, report."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from clsa.config import PAGE_SIZE, EngineConfig, SamplingParams
from clsa.errors import ClsaError, RequestError
from clsa.model import Params
from clsa.ops import Ops, Sampled
from clsa.outputs import Delta, TokenLogprob
from clsa.plan import Plan
from clsa.prefix_state import PrefixState, find, make_room, publish
from clsa.request import Request, State
from clsa.residency import num_pages
from clsa.runner import Launched, Runner, StepFailed
from clsa.scheduler import Scheduler
from clsa.sizing import Sizes
from clsa.step_plan import StepPlan
from clsa.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer, WholeDecoder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Answer:
    """A request and its text while it grows."""

    request: Request
    decoder: IncrementalDecoder | WholeDecoder
    matcher: StopMatcher


class Engine:
    """Many requests over one model. `step` launches a step and reports what the step before it brought.

    The device is one step ahead of the host: a request that stops is noticed one step later, and the sample it
    made in between is dropped.

    A step that fails on the device ends the running requests with an error and empties the prefix cache, because
    nothing on the device is certain any more; those that wait go on with an empty state. Any exception that leaves a
    method, such as Ctrl-C but not RequestError, has ended every request with an error. Either way the engine may be
    used again.

    Threads wait for each other's calls. Whoever calls `step` gets what it brought to all: `SharedEngine` hands it on.
    """

    def __init__(
        self,
        ops: Ops,
        params: Params,
        plan: Plan,
        tokenizer: Tokenizer,
        dtype: str,
        config: EngineConfig,
        sizes: Sizes,
    ) -> None:
        """Allocate the state. Args: `dtype` of the state; `sizes` from `plan_sizes`, made before anything else."""
        self.sizes = sizes
        self._plan, self._tokenizer, self._config = plan, tokenizer, config
        self.scheduler = self._new_scheduler()
        num_slots, max_pages = sizes.num_slots + sizes.num_snapshots, num_pages(sizes.max_model_len)
        self._runner = Runner(ops, params, plan, dtype, sizes.num_pages, num_slots, max_pages, config.memory_dtypes)
        self._answers: dict[str, _Answer] = {}
        self._in_flight: tuple[StepPlan, Launched | None] | None = None
        self._outbox: list[Delta] = []
        self._ids = count()
        self._alone = threading.RLock()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to report."""
        return self.scheduler.has_work or bool(self._outbox)

    @property
    def has_room(self) -> bool:
        """Whether one more request may be added to the queue."""
        return self.scheduler.num_waiting < self._config.max_waiting

    def make_request(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: str = "",
        deadline: float | None = None,
    ) -> Request:
        """A request of this engine, not yet added. Raises RequestError if it can never run.

        Args: `priority` lower first; `salt` the tenant whose prefixes it may share; `deadline` in the clock of
        `time.monotonic`.
        """
        request = Request(f"{next(self._ids)}", list(tokens), params, priority, salt, deadline)
        self.scheduler.check(request)
        return request

    def add(self, request: Request, *, in_pieces: bool = True) -> None:
        """Queue a request. Raises RequestError if the queue is full.

        Without `in_pieces` its text comes with its last delta, unless stop strings are looked for in it.
        """
        stop = request.params.stop
        decoder = IncrementalDecoder(self._tokenizer) if in_pieces or stop else WholeDecoder(self._tokenizer)
        answer = _Answer(request, decoder, StopMatcher(stop))
        with self._all_or_restart():
            self.scheduler.add(request)
            self._answers[request.id] = answer

    def step(self) -> list[Delta]:
        """Launch the next step, then read the one before it: what each request got, in order of service."""
        with self._alone:
            with self._all_or_restart():
                self._advance()
            deltas, self._outbox = self._outbox, []
            return deltas

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests in whatever state they are, without a report.

        What they hold comes back when the step under way has been read; if nobody else waits for it, that is now.
        """
        with self._all_or_restart():
            for request in requests:
                self._answers.pop(request.id, None)
                self.scheduler.cancel(request.id)
            if self._in_flight is not None and not self._answers:
                self._advance()

    def read_prefix(self, tokens: Sequence[int], salt: str) -> PrefixState:
        """The longest part of `tokens` that the prefix cache has, on the host; it may be empty."""
        found = None
        with self._all_or_restart():
            residency = self.scheduler.residency
            hit = find(residency, tokens, salt)
            residency.pool.release(hit.pages)  # nothing runs in between
            slot = 0 if hit.snapshot is None else hit.snapshot
            arrays = self._runner.read_prefix(hit.pages, slot) if hit.pages else {}
            found = PrefixState(list(tokens[: hit.num_tokens]), arrays)
        return _done(found)

    def write_prefix(self, prefix: PrefixState, salt: str) -> None:
        """Put a prefix into the prefix cache. Raises RequestError if there is no room."""
        found = None
        with self._all_or_restart():
            residency = self.scheduler.residency
            pages, slot = make_room(residency, len(prefix.tokens) // PAGE_SIZE)
            self._runner.write_prefix(pages, 0 if slot is None else slot, prefix.arrays)
            found = publish(residency, prefix.tokens, salt, pages, slot)
        if not _done(found):
            raise RequestError("what runs holds the prefix cache; try again when it has ended")

    def stats(self) -> dict[str, int]:
        """Counters, by name; they start again after a step that failed."""
        return self.scheduler.stats()

    # -- one step ------------------------------------------------------------------------------------------------
    @contextmanager
    def _all_or_restart(self) -> Iterator[None]:
        """What goes wrong in here leaves nothing half done."""
        with self._alone:
            try:
                yield
            except RequestError:
                raise  # a refusal, before anything was done
            except StepFailed as failure:
                self._restart(str(failure), keep_waiting=True)
            except BaseException:
                self._restart("the engine was interrupted in the middle of a step", keep_waiting=False)
                raise

    def _advance(self) -> None:
        self._outbox += [self._ended(request) for request in self.scheduler.expire(time.monotonic())]
        plan = self.scheduler.schedule()
        before, self._in_flight = self._in_flight, None
        failed = None
        if plan is not None:
            try:
                self._in_flight = plan, self._runner.launch(plan, None if before is None else before[1])
            except StepFailed as failure:
                failed = str(failure)  # not the exception: its traceback would keep the old state alive
        if before is not None:
            self._read(*before)
        if failed is not None:
            raise StepFailed(failed)

    def _restart(self, reason: str, *, keep_waiting: bool) -> None:
        """A new scheduler and an empty state. Ends what ran; the old scheduler may be half done and isn't asked."""
        self.scheduler, self._in_flight = self._new_scheduler(), None
        self._runner.reset()
        for request in [answer.request for answer in self._answers.values()]:
            if keep_waiting and request.state is State.WAITING:
                self.scheduler.add(request)
                continue
            if request.state is not State.FINISHED:
                request.state, request.finish_reason, request.error = State.FINISHED, "error", reason
            self._outbox.append(self._ended(request))

    def _new_scheduler(self) -> Scheduler:
        config, sizes = self._plan.config, self.sizes
        return Scheduler(
            num_pages=sizes.num_pages,
            num_slots=sizes.num_slots,
            num_snapshots=sizes.num_snapshots,
            max_tokens_per_step=sizes.step_size.max_tokens_per_step,
            min_prompt_tokens=sizes.step_size.min_prompt_tokens,
            max_model_len=sizes.max_model_len,
            window=config.sliding_window if self._plan.num_windows else 0,
            max_waiting=self._config.max_waiting,
            max_cached_pages=sizes.num_cached_pages,
            eos_token_ids=config.eos_token_ids,
        )

    # -- reports -------------------------------------------------------------------------------------------------
    def _read(self, plan: StepPlan, launched: Launched | None) -> None:
        """Wait for a step, hand its samples to the scheduler, report them."""
        read = None if launched is None else self._runner.read(launched)
        tokens: list[int] = [] if read is None else read.tokens.tolist()
        samples = [token if token >= 0 else ClsaError("the model's logits are not finite") for token in tokens]
        changed = {request.id for request in self.scheduler.complete(plan, samples)}
        wanted = [chunk.request for chunk in plan.chunks if chunk.wants_logits]
        for row, (request, token) in enumerate(zip(wanted, tokens, strict=True)):
            if request.id not in changed or request.id not in self._answers:
                continue
            delta = self._ended(request) if token < 0 else self._report(request, token, _logprob(request, read, row))
            self._outbox.append(delta)

    def _report(self, request: Request, token: int, logprob: TokenLogprob | None) -> Delta:
        """The text that one more token makes certain. A stop string ends the request here."""
        answer = self._answers[request.id]
        text, stopped = answer.matcher.push("" if token in request.stop_ids else answer.decoder.push(token))
        if stopped:
            self.scheduler.finish(request, "stop")
            del self._answers[request.id]
            return Delta(request, token, text, logprob, "stop")  # also where its length would have ended it
        if request.state is not State.FINISHED:
            return Delta(request, token, text, logprob, None)
        end = self._ended(request)
        return Delta(request, token, text + end.text, logprob, end.finish_reason)

    def _ended(self, request: Request) -> Delta:
        """The end of a request without another token: what was held back is given out."""
        answer = self._answers.pop(request.id)
        text, stopped = answer.matcher.push(answer.decoder.flush())
        if not stopped:
            return Delta(request, None, text + answer.matcher.flush(), None, request.finish_reason)
        return Delta(request, None, text, None, "stop" if request.finish_reason == "length" else request.finish_reason)


def _done(result: T | None) -> T:
    if result is None:
        raise ClsaError("the device failed while state was moved, and the engine started over; try again")
    return result


def _logprob(request: Request, read: Sampled | None, row: int) -> TokenLogprob | None:
    num = request.params.logprobs
    if num is None or read is None or read.logprobs is None or read.top_tokens is None or read.top_logprobs is None:
        return None
    top = zip(read.top_tokens[row, :num].tolist(), read.top_logprobs[row, :num].tolist(), strict=True)
    return TokenLogprob(int(read.tokens[row]), float(read.logprobs[row]), tuple(top))
