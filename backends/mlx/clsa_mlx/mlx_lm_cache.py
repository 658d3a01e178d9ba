"""mlx-lm's prompt cache over the state of a CLSA model: one paged memory and the windows, for all layers together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from clsa.config import MAX_TOKENS, PAGE_SIZE
from clsa.errors import CheckpointError, RequestError
from clsa.ops import Memory, State, Window
from clsa_mlx.mlx_lm_state import CachedSequence, Part, arrays, check, is_empty, num_pages, pack

_SPARE_PAGES = 4  # how many are added at least when the memory grows; beyond 32 pages it is an eighth


class ClsaCache:
    """The state of one sequence, or of the sequences of a batch, as mlx-lm passes it around.

    The memory grows by pages as the sequences do; pages are handed out in order, so those in use come first. Every
    part of mlx-lm's protocol that the state cannot honour exactly is refused, never approximated.
    """

    def __init__(self, window: int) -> None:
        """`window` is the model's sliding window, 0 if no layer has one."""
        self._window = window
        self._sequences = [CachedSequence()]
        self._state: State | None = State((), ())  # None while a step has it
        self._capacity = 0  # pages of the state
        self._pending: list[int] | None = None  # of a right padded prompt: tokens still to come, per sequence

    # -- for the model -------------------------------------------------------------------------------------

    def begin(
        self, num_rows: int, width: int, new_state: Callable[[int, int], State]
    ) -> tuple[list[int], list[CachedSequence], State]:
        """Take the state for a step of [num_rows, width] tokens; `commit` must follow.

        Args: `new_state(rows, slots)` makes an empty one. Returns: how many tokens of each row are no padding, the
        sequences with pages for them, and the state. Raises RequestError if the cache does not fit the step.
        """
        state = self._usable()
        if num_rows != len(self._sequences):
            if len(self._sequences) > 1 or not self.empty():
                held = len(self._sequences)
                raise RequestError(f"the prompt cache holds {held} sequences, got {num_rows} rows of tokens")
            self._sequences, state = [CachedSequence() for _ in range(num_rows)], State((), ())
        pending = [width] * num_rows if self._pending is None else self._pending
        counts = [min(width, left) for left in pending]
        lengths = [s.length + count for s, count in zip(self._sequences, counts, strict=True)]
        if max(lengths) > MAX_TOKENS:
            raise RequestError(f"a sequence may have {MAX_TOKENS} tokens at most; shorten the prompt")
        state = self._reserve([num_pages(length) for length in lengths], state, new_state)
        self._state = None
        return counts, self._sequences, state

    def _reserve(self, needed: Sequence[int], state: State, new_state: Callable[[int, int], State]) -> State:
        """Give each sequence as many pages; the state that has them all."""
        total = sum(max(count, len(s.pages)) for s, count in zip(self._sequences, needed, strict=True))
        if is_empty(state) or total > self._capacity:
            capacity = total + max(_SPARE_PAGES, total // 8)
            if is_empty(state):
                state = new_state(capacity * PAGE_SIZE, len(needed))
            else:
                self._sequences, state = pack(self._parts(), capacity)
            self._capacity = capacity
        used = sum(len(s.pages) for s in self._sequences)
        for sequence, count in zip(self._sequences, needed, strict=True):
            new = max(0, count - len(sequence.pages))
            sequence.pages += range(used, used + new)
            used += new
        return state

    def commit(self, counts: Iterable[int], state: State) -> None:
        """Give back the state after a step that wrote `counts` tokens of each sequence."""
        for i, (sequence, count) in enumerate(zip(self._sequences, counts, strict=True)):
            sequence.length += count
            if self._pending is not None:
                self._pending[i] -= count
        self._state = state

    def _usable(self) -> State:
        if self._state is None:
            raise RequestError("a step on this prompt cache broke off and left it half written; make a new cache")
        return self._state

    @property
    def window(self) -> int:
        return self._window

    # -- one sequence or all -------------------------------------------------------------------------------

    @property
    def offset(self) -> int:
        """Tokens of the longest sequence."""
        return max((s.length for s in self._sequences), default=0)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in arrays(self._usable()))

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be taken back exactly: while no window has lost a token.

        An empty cache says no if there are windows: mlx-lm's speculative decoding asks only then, and goes on
        trimming beyond the window.
        """
        return self._window == 0 or 0 < self.offset <= self._window

    def trim(self, n: int) -> int:
        """Take the last `n` tokens back; returns how many there were. Raises RequestError if a window lost some."""
        n = min(n, min((s.length for s in self._sequences), default=0))
        if n > 0 and not self.is_trimmable():
            raise RequestError(
                f"the windows keep the last {self._window} tokens and cannot be taken back from {self.offset}; "
                "process the prompt anew"
            )
        for sequence in self._sequences:
            sequence.length -= n
        return n

    def to_quantized(self, **_: Any) -> ClsaCache:
        raise RequestError("a CLSA prompt cache cannot be quantised by mlx-lm; leave kv_bits out")

    # -- saving and copying --------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Any]:
        """A tree of arrays and integers that `from_state` makes the same cache of."""
        state = self._usable()
        return {
            "window": self._window,
            "lengths": [s.length for s in self._sequences],
            "pages": [mx.array(s.pages, mx.int32) for s in self._sequences],
            "memories": [
                {"k": m.k, "v": m.v} | ({} if m.k_idx is None else {"k_idx": m.k_idx}) for m in state.memories
            ],
            "windows": [{"k": w.k, "v": w.v} for w in state.windows],
        }

    @state.setter
    def state(self, tree: dict[str, Any]) -> None:
        try:
            self._restore(tree)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(f"the saved prompt cache is damaged ({reason}); process the prompt anew") from None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ClsaCache:
        """The cache of a `state`. Raises CheckpointError if it does not hold together."""
        cache = cls(0)
        cache.state = state
        return cache

    def __copy__(self) -> ClsaCache:
        return copy.deepcopy(self)  # writes go to the arrays in place, so no two caches may share them

    def _restore(self, tree: dict[str, Any]) -> None:
        self._window = _int(tree["window"], 1 << 20)
        pages = [[_int(page, 1 << 31) for page in table.tolist()] for table in tree["pages"]]
        lengths = [_int(length, MAX_TOKENS) for length in tree["lengths"]]
        self._sequences = [CachedSequence(n, table) for n, table in zip(lengths, pages, strict=True)]
        self._pending = None
        # Handles of our own: whoever saved the state may still write to its arrays.
        memories = tuple(
            Memory(mx.array(m["k"]), mx.array(m["v"]), mx.array(m["k_idx"]) if "k_idx" in m else None)
            for m in tree.get("memories", [])
        )
        windows = tuple(Window(mx.array(w["k"]), mx.array(w["v"]), self._window) for w in tree.get("windows", []))
        self._state = State(memories, windows)
        self._capacity = min((m.k.shape[0] // PAGE_SIZE - 1 for m in memories), default=sum(map(len, pages)))
        check(self._state, self._sequences, self._capacity)

    # -- batches -------------------------------------------------------------------------------------------

    def prepare(self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None) -> None:
        """Expect right padded prompts of these lengths; `finalize` ends it."""
        if left_padding is not None and any(left_padding):
            raise RequestError("a CLSA prompt cache takes prompts padded on the right, not on the left")
        if lengths is not None:
            self._pending = [int(length) for length in lengths]

    def finalize(self) -> None:
        self._pending = None

    @classmethod
    def merge(cls, caches: Sequence[ClsaCache]) -> ClsaCache:
        """One cache with the sequences of all."""
        if any(cache.window != caches[0].window for cache in caches):
            raise RequestError("prompt caches of models with different sliding windows cannot share a batch")
        merged = cls(caches[0].window)
        merged._take([part for cache in caches for part in cache._parts()])
        return merged

    def extend(self, other: ClsaCache) -> None:
        """Add the sequences of another cache behind our own."""
        self._take(self._parts() + other._parts())

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep these sequences, in this order."""
        keep = [int(i) for i in batch_indices]
        if keep != list(range(len(self._sequences))):
            parts = self._parts()
            self._take([parts[i] for i in keep])

    def extract(self, idx: int) -> ClsaCache:
        """A cache of its own for one sequence."""
        one = ClsaCache(self._window)
        one._take([self._parts()[idx]])
        return one

    def _parts(self) -> list[Part]:
        state = self._usable()
        return [(state, sequence, slot) for slot, sequence in enumerate(self._sequences)]

    def _take(self, parts: Sequence[Part]) -> None:
        """Hold these sequences and no others."""
        self._capacity = sum(num_pages(sequence.length) for _, sequence, _ in parts)
        self._sequences, self._state = pack(parts, self._capacity)
        mx.eval(arrays(self._state))  # now: the sources are written in place soon, or would be copied for our sake


def _int(value: Any, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise ValueError(f"{value!r} is no integer from 0 to {high}")
    return value
