"""Prefixes between the prefix cache of a running engine and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clsa.cache_file import cache_key, cache_metadata, read_cache, write_cache
from clsa.checkpoint import Checkpoint
from clsa.config import PAGE_SIZE, EngineConfig
from clsa.errors import RequestError
from clsa.model_hash import ModelHash
from clsa.ops import Ops
from clsa.plan import Plan
from clsa.prefix_state import PrefixState
from clsa.shared_engine import SharedEngine


class PrefixFiles:
    """The files of one model on one backend; each is also bound to a salt. See `clsa.cache_file`."""

    def __init__(
        self, shared: SharedEngine, ops: Ops, plan: Plan, checkpoint: Checkpoint, dtype: str, engine: EngineConfig
    ) -> None:
        self._shared, self._ops, self._plan, self._dtype, self._engine = shared, ops, plan, dtype, engine
        self._hash = ModelHash(checkpoint)

    def metadata(self, salt: str) -> dict[str, str]:
        """See `cache_metadata`."""
        engine = self._engine
        return cache_metadata(self._hash, self._ops, self._dtype, engine.memory_dtypes, engine.weight_dtype, salt)

    def key(self, tokens: Sequence[int], salt: str) -> str:
        """See `cache_key`."""
        return cache_key(tokens, self.metadata(salt))

    def read(self, path: Path, salt: str) -> PrefixState:
        """What a file holds. Raises CheckpointError if it is damaged, or is not of this model, backend or salt."""
        return read_cache(path, self._plan, self.metadata(salt), self._shared.max_model_len)

    def restore(self, prefix: PrefixState, salt: str) -> int:
        """Put a prefix into the prefix cache; returns its tokens. Raises RequestError if there is no room."""
        with self._shared.turn() as engine:
            engine.write_prefix(prefix, salt)
        return len(prefix.tokens)

    def write(self, path: Path, tokens: Sequence[int], salt: str, metadata: dict[str, str]) -> int:
        """Write what the prefix cache holds of a prompt that was computed just now; returns its tokens.

        Raises RequestError if that is not all of its full pages, or there are none.
        """
        with self._shared.turn() as engine:
            prefix = engine.read_prefix(tokens, salt)
        if not prefix.tokens or len(prefix.tokens) < len(tokens) // PAGE_SIZE * PAGE_SIZE:
            raise RequestError(
                f"the prefix cache holds {len(prefix.tokens)} tokens of this prompt of {len(tokens)}, and whole pages "
                f"of {PAGE_SIZE} are saved; give a longer prompt, or enlarge prefix_cache_bytes or max_tokens_in_memory"
            )
        write_cache(path, prefix, metadata)
        return len(prefix.tokens)
