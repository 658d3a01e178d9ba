"""One model called from many threads: everyone gets what they would get alone, and nobody waits for ever."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import pytest

import clsa
from clsa.config import EngineConfig, SamplingParams
from clsa.errors import ClsaError
from clsa.llm import LLM
from clsa.outputs import Piece, RequestOutput
from clsa.shared_engine import SharedEngine
from tests.engine import models
from tests.engine.models import CONFIG, assert_all_returned, mixed_requests, on_backends, open_ops

T = TypeVar("T")
PATIENCE = 60  # seconds until a test that hangs fails
SHORT = SamplingParams(max_tokens=12, ignore_eos=True)


def in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What each of these calls returned, each in a thread of its own, all at once."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, call) for call in calls]]


def in_thread(call: Callable[[], T]) -> T:
    return in_threads([call])[0]


def stepping(llm: LLM, function: str, call: Callable[[], None]) -> None:
    """`call` is made inside of the next step that comes to this function of the ops."""

    class Hooked:
        def __init__(self, ops: Any) -> None:
            self._ops, self._is_new = ops, True

        def __getattr__(self, name: str) -> Any:
            if name == function and self._is_new:
                self._is_new = False
                call()
            return getattr(self._ops, name)

    models.exchange_ops(llm, Hooked(llm._engine._runner._ops))


@on_backends
def test_every_thread_gets_what_it_would_get_alone(backend: str) -> None:
    requests = mixed_requests(30)
    wanted = [models.load(backend).generate(prompt, params)[0].token_ids for prompt, params in requests]
    llm = models.load(backend, max_num_seqs=4, max_waiting=2)

    def generate(own: slice) -> list[list[int]]:
        prompts, params = zip(*requests[own], strict=True)
        return [output.token_ids for output in llm.generate(prompts, params)]

    def run(own: slice) -> list[list[int]]:
        jobs = ((i, prompt, params) for i, (prompt, params) in enumerate(requests[own]))
        return [cast(RequestOutput, output).token_ids for _, output in llm.run(jobs, ordered=True)]

    calls = [partial(way, slice(i, None, 6)) for i, way in enumerate([generate, run] * 3)]
    for i, got in enumerate(in_threads(calls)):
        assert got == wanted[i::6]
    assert_all_returned(llm.stats())
    assert not llm._shared._mail


@on_backends
def test_streams_of_many_threads(backend: str) -> None:
    requests = mixed_requests(12)
    wanted = [models.load(backend).generate(prompt, params)[0].token_ids for prompt, params in requests]
    llm = models.load(backend, max_num_seqs=4)

    def stream(own: slice) -> list[list[int]]:
        return [[p.token for p in llm.stream(prompt, params) if p.token >= 0] for prompt, params in requests[own]]

    got = in_threads([partial(stream, slice(i, None, 4)) for i in range(4)])
    assert all(got[i] == wanted[i::4] for i in range(4))
    assert_all_returned(llm.stats())
    assert not llm._shared._mail


@on_backends
def test_a_model_and_a_stream_pass_from_thread_to_thread(backend: str) -> None:
    """Threads that have ended by then; and weights in another dtype than the file's, that a lazy backend converts."""

    def load() -> LLM:
        device = "cpu" if backend == "cuda" else None
        small = EngineConfig(max_num_seqs=2, prefix_cache_bytes=1 << 24)
        return clsa.load(str(models.folder()), backend=backend, device=device, dtype="bfloat16", engine=small)

    wanted = load().generate(models.TEXT, SHORT)[0].token_ids
    llm = in_thread(load)
    assert in_thread(lambda: llm.generate(models.TEXT, SHORT)[0].token_ids) == wanted
    assert llm.generate(models.TEXT, SHORT)[0].token_ids == wanted
    stream = llm.stream(models.TEXT, SHORT)
    assert [in_thread(lambda: next(stream)).token for _ in wanted] == wanted
    assert list(stream) == []
    assert in_thread(lambda: llm.logits([5, 6, 7])).shape == (3, CONFIG.vocab_size)
    assert_all_returned(in_thread(llm.stats))


@on_backends
def test_looking_inside_and_moving_state_wait_for_steps(backend: str, tmp_path: Any) -> None:
    llm = models.load(backend)
    ids = list(range(2, 150))
    logits, chosen, wanted = llm.logits(ids), llm.selection(ids), llm.generate(ids, SHORT)[0].token_ids
    path = tmp_path / "prompt.safetensors"
    if backend != "numpy":
        llm.save_cache(path, ids)

    def look() -> None:
        for _ in range(3):
            np.testing.assert_array_equal(llm.logits(ids), logits)
            np.testing.assert_array_equal(llm.selection(ids), chosen)
            if backend != "numpy":
                assert llm.load_cache(path) == 128
            assert llm.stats()["pages_total"] > 0

    def generate() -> None:
        for _ in range(3):
            assert [output.token_ids for output in llm.generate([ids] * 3, SHORT)] == [wanted] * 3

    in_threads([look, generate, look, generate])
    assert_all_returned(llm.stats())


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    llm = models.load()
    long, started = replace(SHORT, max_tokens=900), threading.Event()

    def first() -> int:
        stream = llm.stream("x", long)
        next(stream)
        started.set()
        return 1 + len(list(stream))

    def second() -> int:
        assert started.wait(PATIENCE)
        steps = llm.stats()["steps"]
        llm.generate(["y", "z"], SHORT)
        return llm.stats()["steps"] - steps

    tokens, steps = in_threads([first, second])
    assert tokens == 900
    assert steps < 60, "12 tokens, and between the steps of this thread as many of the other's"


def test_a_turn_goes_to_those_that_wait() -> None:
    """A thread that comes again and again may not keep the others out."""
    shared = SharedEngine(models.engine(open_ops("numpy")))
    turns: list[int] = []

    def take(me: int) -> None:
        for _ in range(60):
            with shared.turn():
                turns.append(me)
                time.sleep(0.0005)  # others come to wait

    in_threads([partial(take, me) for me in range(3)])
    assert len(turns) == 180
    all_came = next(i for i in range(180) if len(set(turns[:i])) == 3)
    some_left = min(max(i for i, owner in enumerate(turns) if owner == me) for me in range(3))
    assert some_left - all_came > 100
    assert all(len(set(turns[i : i + 3])) == 3 for i in range(all_came, some_left - 2)), "not one after the other"


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is not signal.default_int_handler,
    reason="SIGINT is ignored here, as in background jobs",
)
def test_ctrl_c_while_waiting_leaves_the_queue() -> None:
    shared = SharedEngine(models.engine(open_ops("numpy")))
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    is_held, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with shared.turn():
            is_held.set()
            while not shared._lock._waiting:
                time.sleep(0.001)
            signal.pthread_kill(main, signal.SIGINT)
            assert is_over.wait(PATIENCE)

    other = threading.Thread(target=hold)
    other.start()
    assert is_held.wait(PATIENCE)
    with pytest.raises(KeyboardInterrupt), shared.turn():
        raise AssertionError("it was not waited for")
    assert not shared._lock._waiting
    is_over.set()
    other.join(PATIENCE)
    with shared.turn() as engine:
        assert not engine.has_work


def test_closing_in_another_thread_gives_everything_back() -> None:
    llm = models.load()
    streams = [llm.stream(f"{i}", replace(SHORT, max_tokens=300)) for i in range(6)]
    for stream in streams:
        next(stream)
    close = [cast(Any, stream).close for stream in streams]
    in_threads([*close, lambda: llm.generate(["a", "b"], SHORT)])
    assert_all_returned(llm.stats())
    assert not llm._shared._mail


def test_an_interrupt_in_one_thread_ends_all_and_the_model_goes_on() -> None:
    llm = models.load()
    wanted = llm.generate("x", SHORT)[0].token_ids
    stream = llm.stream("y", SHORT)
    next(stream)
    stepping(llm, "embed", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))

    def interrupted() -> str:
        with pytest.raises(KeyboardInterrupt):
            llm.generate("x", SHORT)
        return "yes"

    assert in_thread(interrupted) == "yes"
    with pytest.raises(ClsaError, match="interrupted"):
        list(stream)
    assert in_thread(lambda: llm.generate("x", SHORT)[0].token_ids) == wanted
    assert_all_returned(llm.stats())


class Cycle:
    """Holds a stream and itself, so that only a garbage collection lets go of the stream."""

    def __init__(self, stream: Iterator[Piece]) -> None:
        self.stream, self.me = stream, self


def test_a_stream_that_is_collected_in_the_middle_of_a_step() -> None:
    llm = models.load()
    wanted = llm.generate("x", SHORT)[0].token_ids
    forgotten = llm.stream("y", replace(SHORT, max_tokens=300))
    next(forgotten)
    cycle = Cycle(forgotten)
    running = []
    stepping(llm, "embed", lambda: running.append((gc.collect(), len(llm._shared._closed))))
    del forgotten, cycle
    assert llm.generate("x", SHORT)[0].token_ids == wanted
    assert [closed for _, closed in running] == [1], "it was collected, and its request waits for the end of the step"
    assert_all_returned(llm.stats())
    assert not llm._shared._mail


def test_a_call_from_within_a_step_is_refused() -> None:
    llm = models.load()
    errors: list[ClsaError] = []

    def call() -> None:
        with pytest.raises(ClsaError, match="within its own step") as caught:
            llm.generate("y", SHORT)
        errors.append(caught.value)

    wanted = llm.generate("x", SHORT)[0].token_ids
    stepping(llm, "embed", call)
    assert llm.generate("x", SHORT)[0].token_ids == wanted
    assert len(errors) == 1
    assert_all_returned(llm.stats())


def test_an_engine_makes_threads_wait() -> None:
    engine = models.engine(open_ops("numpy"))
    requests = [engine.make_request([i + 2], SHORT) for i in range(6)]
    for request in requests:
        engine.add(request)

    def step() -> list[tuple[str, int]]:
        got = []
        while engine.has_work:
            got += [(delta.request.id, delta.token) for delta in engine.step() if delta.token is not None]
        return got

    together = [delta for got in in_threads([step, step, step]) for delta in got]
    assert len(together) == 6 * 12
    alone = models.run(models.engine(open_ops("numpy")), [engine.make_request([i + 2], SHORT) for i in range(6)])
    for request, output in zip(requests, alone.values(), strict=True):
        assert sorted(t for id_, t in together if id_ == request.id) == sorted(output.token_ids)
