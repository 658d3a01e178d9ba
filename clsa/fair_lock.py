"""A lock for threads that come again and again, each of which would keep an ordinary one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class FairLock:
    """A lock that goes to whoever has waited longest. A thread must not wait for it while it holds it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._holder: threading.Lock | None = None  # each turn is a gate of its own, which its thread goes through
        self._waiting: deque[threading.Lock] = deque()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for it, and give it on at the end. An exception while it waits, such as Ctrl-C, leaves the queue."""
        gate = threading.Lock()
        try:
            with self._guard:
                if self._holder is None:
                    self._holder = gate
                else:
                    gate.acquire()
                    self._waiting.append(gate)
            gate.acquire()
            yield
        finally:
            with self._guard:  # no function of ours: Ctrl-C could come between its call and its first line
                if self._holder is not gate:
                    if gate in self._waiting:
                        self._waiting.remove(gate)
                elif self._waiting:
                    self._holder = self._waiting.popleft()
                    self._holder.release()
                else:
                    self._holder = None
