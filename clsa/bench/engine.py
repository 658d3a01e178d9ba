"""The real engine, with long contexts in its state that nobody had to compute."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from clsa.bench.peers import release_cache
from clsa.bench.random_arrays import random_state
from clsa.config import MAX_TOKENS, MODEL_DTYPE, PAGE_SIZE, EngineConfig, MemoryDtypes, ModelConfig, SamplingParams
from clsa.engine import Engine
from clsa.errors import ClsaError
from clsa.ops import Memory, Ops, State, Window
from clsa.outputs import Delta
from clsa.plan import make_plan
from clsa.request import Request
from clsa.residency import num_pages
from clsa.scheduler import Scheduler
from clsa.sizing import Sizes, state_bytes
from clsa.step_plan import StepPlan
from clsa.tokenizer import Tokenizer

MEMORY_SHARE = 0.8  # of what is free beside the weights that state may take; the rest is for a step's temporaries
_PROMPT_TOKENS = 250  # different ones: small integers cost no memory, however long the prompts


def free_bytes(ops: Ops) -> int:
    """What is free once everything is let go that nobody uses, whatever refers to itself included."""
    gc.collect()
    release_cache(ops)
    return ops.memory_stats()["free"]


def fitting_pages(
    ops: Ops, config: ModelConfig, dtype: str, wanted: int, slots: int, stored: MemoryDtypes = MODEL_DTYPE
) -> int:
    """How many of the wanted pages fit beside the rings of `slots` sequences, with the weights already there."""
    plan = make_plan(config)
    page, rings = (state_bytes(ops, plan, dtype, *size, stored) for size in ((1, 0), (0, slots)))
    budget = int(MEMORY_SHARE * free_bytes(ops)) - rings
    return max(1, min(wanted, budget // page if page else wanted))


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts without a common beginning."""
    rng = np.random.default_rng([seed, count, length])
    return [rng.integers(0, _PROMPT_TOKENS, length).tolist() for _ in range(count)]


def make_engine(
    ops: Ops,
    params: Mapping[str, Any],
    config: ModelConfig,
    dtype: str,
    *,
    pages: int,
    slots: int,
    tokens_per_step: int,
    stored: MemoryDtypes = MODEL_DTYPE,
) -> Engine:
    """An engine of exactly this size, without a prefix cache: prompts are random, and hits would be luck."""
    settings = EngineConfig(prefix_cache_bytes=0, kv_dtype=stored.kv, index_dtype=stored.index)
    plan = make_plan(config)
    num_bytes = state_bytes(ops, plan, dtype, pages, slots, stored)
    size = replace(ops.step_size, max_num_seqs=slots, max_tokens_per_step=tokens_per_step)
    sizes = Sizes(config.max_position_embeddings, pages, 0, 0, size, num_bytes)
    return Engine(ops, params, plan, word_tokenizer(config), dtype, settings, sizes)


def word_tokenizer(config: ModelConfig) -> Tokenizer:
    """One word per id of the model, so that answers have text."""
    from tokenizers import Tokenizer as Impl
    from tokenizers.models import WordLevel

    return Tokenizer(Impl(WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0")), config)


def decoding_engine(
    ops: Ops,
    params: Mapping[str, Any],
    config: ModelConfig,
    dtype: str,
    state: State,
    pages: int,
    contexts: Sequence[int],
) -> Engine:
    """An engine in the middle of decoding sequences that have `contexts` tokens each.

    The scheduler is led through the prompts, but no step is run: what they would have left behind is `state`, filled
    before. It has `pages` pages, perhaps fewer than the sequences; then they share some. The state must not be used
    again.
    """
    step = max(2048, 4 * len(contexts))
    slots = len(contexts)
    engine = make_engine(
        _handing_out(ops, state), params, config, dtype, pages=pages, slots=slots, tokens_per_step=step
    )
    scheduler = _PlacedScheduler(config, pages, slots, step)
    engine.scheduler = scheduler
    for i, context in enumerate(contexts):
        params_ = SamplingParams(max_tokens=config.max_position_embeddings - context, ignore_eos=True)
        engine.add(engine.make_request(random_prompts(1, context, seed=i)[0], params_))
    scheduler.skip_prompts()
    return engine


class _PlacedScheduler(Scheduler):
    """The scheduler, with its pages at random places of a memory that may have fewer of them."""

    def __init__(self, config: ModelConfig, pages: int, slots: int, tokens_per_step: int) -> None:
        super().__init__(
            num_pages=max(pages, slots * num_pages(config.max_position_embeddings)),
            num_slots=slots,
            num_snapshots=0,
            max_tokens_per_step=tokens_per_step,
            max_model_len=config.max_position_embeddings,
            window=config.sliding_window if make_plan(config).num_windows else 0,
            max_waiting=slots,
            max_cached_pages=0,
        )
        self._places = np.random.default_rng(5).permutation(pages).tolist()
        self._placed: dict[str, int] = {}

    def skip_prompts(self) -> None:
        """Go through all prompts in one plan, as if its step had been run."""
        budget, self._max_tokens = self._max_tokens, MAX_TOKENS * self._state.num_slots
        plan = super().schedule()
        self._max_tokens = budget
        if plan is None or not all(chunk.wants_logits for chunk in plan.chunks) or self.num_waiting:
            raise AssertionError("every prompt fits the memory and the step, so all of them are done at once")
        self.complete(plan, [0] * len(plan.chunks))

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        for chunk in () if plan is None else plan.chunks:
            self._place(chunk.request)
        return plan

    def _place(self, request: Request) -> None:
        first, places = self._placed.get(request.id, 0), self._places
        if first < len(request.pages):
            request.pages[first:] = [places[page % len(places)] for page in request.pages[first:]]
            self._placed[request.id] = len(request.pages)


def _handing_out(ops: Ops, state: State) -> Ops:
    """The same ops, whose new state is the given one, once."""
    memories, windows = list(state.memories), list(state.windows)

    def next_of(made: list[Any]) -> Any:
        if not made:
            raise ClsaError("a step of the benchmark failed; CLSA_DEBUG=1 shows where")
        return made.pop(0)

    def new_memory(*_: Any) -> Memory:
        return cast(Memory, next_of(memories))

    def new_window(*_: Any) -> Window:
        return cast(Window, next_of(windows))

    functions = {name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")}
    return cast(Ops, SimpleNamespace(**(functions | {"new_memory": new_memory, "new_window": new_window})))


def filled_state(
    ops: Ops, config: ModelConfig, dtype: str, pages: int, slots: int, stored: MemoryDtypes = MODEL_DTYPE
) -> State:
    """State with random data in every row."""
    return random_state(ops, make_plan(config), pages * PAGE_SIZE, slots, dtype, stored)


def checked_step(engine: Engine) -> list[Delta]:
    """One step of the engine. Raises ClsaError if a request failed in it."""
    deltas = engine.step()
    for delta in deltas:
        if delta.finish_reason == "error":
            raise ClsaError(f"a request of the benchmark failed: {delta.request.error}")
    return deltas
