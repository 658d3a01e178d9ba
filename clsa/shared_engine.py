"""One engine for several callers, in one thread or in many: who finds nothing in its mail runs the next step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, compress
from operator import and_
from typing import TypeVar

from clsa.engine import Engine
from clsa.errors import ClsaError, RequestError
from clsa.fair_lock import FairLock
from clsa.outputs import Delta, RequestOutput, collect
from clsa.request import Request

K = TypeVar("K")
Progress = Callable[[int, int], None]  # tokens of a prompt that are done, and all of them


class _Mine(threading.local):
    """What each thread has of its own."""

    is_inside = False


class SharedEngine:
    """Lets callers take turns at an engine. A step serves all of them, whoever runs it.

    One thread at a time is inside, in the order in which they came. What belongs to a caller, such as its source of
    requests and its callback, never runs inside.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.max_model_len = engine.sizes.max_model_len
        self._mail: dict[str, deque[Delta]] = {}
        self._closed: deque[Sequence[Request]] = deque()  # to be cancelled at the end of a turn
        self._lock, self._mine = FairLock(), _Mine()

    @contextmanager
    def turn(self) -> Iterator[Engine]:
        """The engine, for this thread alone. Waits for others; raises ClsaError if this thread is inside already."""
        if self._mine.is_inside:
            raise ClsaError("the model was called from within its own step, as by a signal handler; call it afterwards")
        try:
            self._mine.is_inside = True
            with self._lock.held():
                try:
                    yield self._engine
                finally:
                    self._cancel_closed()
        finally:
            self._mine.is_inside = False

    def deltas(self, request: Request, progress: Progress | None = None) -> Generator[Delta]:
        """Run the engine until a request has ended. What its steps bring to others waits in their mail.

        Closing the generator cancels the request. Raises RequestError if the queue is full.
        """
        mail = self._mail.setdefault(request.id, deque())
        try:
            with self.turn() as engine:
                engine.add(request)
            has_ended = False
            while not has_ended:
                while not mail:
                    done = request.num_computed
                    self._step_unless(lambda: bool(mail))
                    if progress is not None and done < request.num_prompt_tokens:
                        progress(max(done, request.cached_tokens), request.num_prompt_tokens)
                delta = mail.popleft()
                has_ended = delta.finish_reason is not None
                yield delta
        finally:
            self._close([request])

    def serve(
        self, source: Iterator[tuple[K, Request | RequestError]], window: int, *, ordered: bool
    ) -> Generator[tuple[K, RequestOutput | RequestError]]:
        """Results as they finish, or in order. At most `window` requests were taken and have not come out.

        Closing the generator cancels what is open.
        """
        inside: deque[tuple[K, Request | RequestError]] = deque()
        more = True

        def can_read() -> bool:
            return more and len(inside) < window and self._engine.has_room

        try:
            while more or inside:
                while can_read():
                    entry = next(source, None)
                    more = entry is not None
                    if entry is not None:
                        inside.append(entry)
                        self._enter(entry[1])
                done = [self._has_ended(request) for _, request in inside]
                if ordered:
                    done = list(accumulate(done, and_))  # nobody before those in front of it
                finished = [(key, self._output(request)) for key, request in compress(inside, done)]
                inside = deque(entry for entry, out in zip(inside, done, strict=True) if not out)
                yield from finished
                if not finished and (inside or more):
                    waited_for = [request for _, request in (list(inside)[:1] if ordered else inside)]
                    self._step_unless(lambda: can_read() or any(map(self._has_ended, waited_for)))  # noqa: B023
        finally:
            self._close([request for _, request in inside if isinstance(request, Request)])

    def _enter(self, request: Request | RequestError) -> None:
        """Add a request as soon as there is room: others may have taken what there was."""
        if isinstance(request, RequestError):
            return
        is_added = False
        while not is_added:
            with self.turn() as engine:
                is_added = engine.has_room
                if is_added:
                    self._mail[request.id] = deque()
                    engine.add(request, in_pieces=False)
                else:
                    self._step()

    def _step_unless(self, has_come: Callable[[], bool]) -> None:
        """Run a step, unless what the caller waits for came while it waited for its turn."""
        with self.turn():
            if not has_come():
                self._step()

    def _step(self) -> None:
        assert self._engine.has_work, "somebody waits for a request that the engine does not have"
        for delta in self._engine.step():
            if (mail := self._mail.get(delta.request.id)) is not None:
                mail.append(delta)

    def _has_ended(self, request: Request | RequestError) -> bool:
        if isinstance(request, RequestError):
            return True
        mail = self._mail[request.id]
        return bool(mail) and mail[-1].finish_reason is not None

    def _output(self, request: Request | RequestError) -> RequestOutput | RequestError:
        if isinstance(request, RequestError):
            return request
        return collect(request, list(self._mail.pop(request.id)))

    def _close(self, requests: Sequence[Request]) -> None:
        self._closed.append(requests)
        # A generator may be collected in the middle of a turn of its own thread, the end of which then sees to it.
        if not self._mine.is_inside:
            with self.turn():
                pass

    def _cancel_closed(self) -> None:
        while self._closed:
            requests = self._closed.popleft()
            self._engine.cancel(requests)
            for request in requests:
                self._mail.pop(request.id, None)
