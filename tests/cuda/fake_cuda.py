"""A GPU's streams, events and graphs without a GPU: what was queued runs late, in any order that events allow.

Data moves when an operation runs, not when it is queued, so an order that nobody asked for shows as wrong numbers.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa.ops import Compute, Sampled, State
from clsa_cuda import transfer
from clsa_cuda.ops import TorchOps
from clsa_cuda.recorder import Recorder

CPU = torch.device("cpu")
Work = Callable[[], object]


class Mark:
    """A place in a stream."""

    is_past = False


class Stream:
    def __init__(self, *_: Any) -> None:
        self.queue: deque[Work | Mark] = deque()  # a mark of its own is passed, one of another stream is waited for
        self.own: set[Mark] = set()
        self.works: list[Work] = []  # all that was ever queued, marks left out

    def wait_event(self, event: Event) -> None:
        if event.mark is not None:
            self.queue.append(event.mark)


class Event:
    gpu: FakeCuda

    def __init__(self) -> None:
        self.mark: Mark | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.gpu.current
        self.mark = Mark()
        stream.own.add(self.mark)
        stream.queue.append(self.mark)

    def synchronize(self) -> None:
        while self.mark is not None and not self.mark.is_past:
            self.gpu.advance()


class Graph:
    gpu: FakeCuda

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.made: list[Tensor] = []  # in the pool that graphs share: free for those that are recorded later

    def capture_begin(self, pool: str | None, *, capture_error_mode: str) -> None:
        self.gpu.graphs.append(self)
        self.gpu.capturing = self

    def capture_end(self) -> None:
        self.gpu.capturing = None

    def replay(self) -> None:
        others = [x for graph in self.gpu.graphs if graph is not self for x in graph.made]
        self.gpu.queue(lambda: [x.fill_(-1 - x.numel()) for x in others])
        for work in self.works:
            self.gpu.queue(work)

    def pool(self) -> str:
        return "pool"


class FakeCuda:
    """Stands in for `torch.cuda`, `Tensor.copy_`, `torch.add(out=)` and pinned memory.

    What `torch.zeros` makes in a recording lies where other recordings have their own, and each replay writes over it.
    Other memory is never given away.
    """

    def __init__(self, patch: pytest.MonkeyPatch, seed: int) -> None:
        self._random = random.Random(seed)
        self.main = self.current = Stream()
        self._streams, self._weights = [self.main], [self._weight()]
        self.capturing: Graph | None = None
        self.graphs: list[Graph] = []
        self.is_late = False  # nothing runs before somebody waits for it
        copy, add, zeros = Tensor.copy_, torch.add, torch.zeros
        patch.setattr(transfer, "_streams", {})
        patch.setattr(transfer, "pinned", lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))

        def copied(to: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
            self.queue(lambda: copy(to, x))
            return to

        def made(*args: Any, **kwargs: Any) -> Tensor:
            new = zeros(*args, **kwargs)
            if self.capturing is not None:
                self.capturing.made.append(new)
            return new

        patch.setattr(torch, "zeros", made)
        patch.setattr(Tensor, "copy_", copied)
        patch.setattr(Tensor, "record_stream", lambda x, stream: None)
        patch.setattr(torch, "add", lambda x, y, out: self.queue(lambda: add(x, y, out=out)))
        for name, value in {
            "Stream": self._new_stream,
            "Event": type("Event", (Event,), {"gpu": self}),
            "CUDAGraph": type("Graph", (Graph,), {"gpu": self}),
            "set_device": lambda device: None,
            "current_stream": lambda device=None: self.current,
            "stream": self._stream,
        }.items():
            patch.setattr(torch.cuda, name, value)

    def queue(self, work: Work) -> None:
        """What a launch does."""
        if self.capturing is not None:
            self.capturing.works.append(work)
            return
        self.current.queue.append(work)
        self.current.works.append(work)
        for _ in range(0 if self.is_late else self._random.choice((0, 0, 1, 8))):
            self.advance(idle=True)

    def advance(self, idle: bool = False) -> None:
        """Run one operation of some stream."""
        able = [stream for stream in self._streams if stream.queue and self._can_run(stream, stream.queue[0])]
        if not able:
            assert idle, "everything waits for something"
            return
        weights = [self._weights[self._streams.index(stream)] for stream in able]
        (stream,) = self._random.choices(able, weights)
        head = stream.queue.popleft()
        if not isinstance(head, Mark):
            head()
        elif head in stream.own:
            head.is_past = True

    def _weight(self) -> float:
        return self._random.choice((0.01, 1.0, 100.0))  # some streams are always late, some always early

    def _can_run(self, stream: Stream, head: Work | Mark) -> bool:
        return not isinstance(head, Mark) or head.is_past or head in stream.own

    def _new_stream(self, *_: Any) -> Stream:
        self._streams.append(Stream())
        self._weights.append(self._weight())
        return self._streams[-1]

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class _Now:
    """An event in a stream that is never late."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def on_the_cpu(patch: pytest.MonkeyPatch) -> list[Recorder]:
    """The CPU as a GPU with one stream, on which a replay computes again. Returns the recorders that are made."""
    made: list[Recorder] = []

    def record(ops: TorchOps, compute: Compute) -> Compute:
        made.append(Recorder(compute, CPU))
        return made[-1]

    def capture(self: Recorder, recording: Any, kinds: Any, state: State) -> None:
        compute, inputs, previous = self._compute, recording.inputs, self._turns[1 - self._turn].tokens
        sampled = Sampled(*self._results(kinds))

        def replay() -> None:
            again, _ = compute(inputs, previous, state)
            for field in fields(sampled):
                if (x := getattr(again, field.name)) is not None:
                    getattr(sampled, field.name).copy_(x)

        recording.sampled, recording.graph = sampled, SimpleNamespace(replay=replay)

    stream: Any = SimpleNamespace(wait_event=lambda event: None)
    patch.setattr(torch.cuda, "Event", _Now)
    patch.setattr(torch.cuda, "set_device", lambda device: None)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    patch.setattr(Tensor, "record_stream", lambda x, stream: None)
    patch.setattr(transfer, "_streams", {CPU: transfer.Streams(stream, stream, stream)})
    patch.setattr(transfer, "pinned", lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    patch.setattr(Recorder, "_record", capture)
    patch.setattr(TorchOps, "record", record)
    patch.setattr(TorchOps, "fetch", lambda ops, arrays: transfer.start_fetch(arrays, CPU))
    return made
