"""What a user imports: load a model, generate, stream, chat, look inside."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from clsa.backend import load_backend
from clsa.chat_file import chat_metadata, read_chat
from clsa.checkpoint import Checkpoint, open_checkpoint
from clsa.config import DTYPES, EngineConfig, ModelConfig, SamplingParams, check_float
from clsa.engine import Engine
from clsa.errors import CheckpointError, ClsaError, ConfigError, RequestError
from clsa.hub import resolve
from clsa.inspect_model import evaluate_logits, evaluate_selection
from clsa.ops import Ops
from clsa.outputs import Delta, Piece, PieceClock, RequestOutput, collect
from clsa.plan import make_plan
from clsa.prefix_files import PrefixFiles
from clsa.prompts import Messages, Prompt, Turn, as_batch, check_ids, check_params, encode, params_for, streamed
from clsa.request import Request
from clsa.shared_engine import Progress, SharedEngine
from clsa.sizing import plan_sizes
from clsa.tokenizer import Tokenizer, load_tokenizer
from clsa.weights import check_float8, load_weights

K = TypeVar("K")


def load(
    model: str = "demo",
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    *,
    engine: EngineConfig | None = None,
    offline: bool = False,
) -> LLM:
    """Load a model: a bundled name, a folder, or a hub id ("org/name").

    Args:
        backend: "auto" (NVIDIA, then Metal, then CPU), "mlx", "cuda", "numpy", or any installed backend.
        device: as `clsa.backends()` lists it; None takes the backend's best.
        dtype: "float32", "bfloat16" or "float16" for weights and state; None takes the checkpoint's own on a
            GPU and float32 on a CPU, which computes nothing shorter faster.
        engine: sizes of the engine, and what it keeps in 8 bits; see EngineConfig.
        offline: take hub models from the local cache only.

    Raises: CheckpointError, ConfigError or BackendError, before anything large is allocated.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    checkpoint = open_checkpoint(resolve(model, offline=offline))
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    ops, why = load_backend(backend, device)
    dtype = dtype or default_dtype(ops, checkpoint.config)
    if checkpoint.config.quantization is not None and not ops.keeps_quantized:
        why += f"; quantised weights are expanded to {dtype} at load"
    engine = engine or EngineConfig()
    check_float8(ops, checkpoint.config, engine)
    return LLM(ops, checkpoint, tokenizer, dtype, engine, why)


def default_dtype(ops: Ops, config: ModelConfig) -> str:
    """The dtype that `load` takes if none is asked for."""
    return "float32" if ops.device.startswith("cpu") else config.torch_dtype


class LLM:
    """A loaded model with its engine. Any thread may call it at any time: steps serve all callers together.

    Attributes: `config`, `tokenizer`, `backend` (name), `device` (words), `dtype`, `why` (how it was chosen),
    `memory_dtypes` and `weight_dtype` (what is kept in 8 bits).
    """

    def __init__(
        self,
        ops: Ops,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        dtype: str,
        engine: EngineConfig,
        why: str,
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self.tokenizer = tokenizer
        self.backend, self.device, self.dtype, self.why = ops.name, ops.device, dtype, why
        self.memory_dtypes, self.weight_dtype = engine.memory_dtypes, engine.weight_dtype
        self._ops, self._plan = ops, make_plan(checkpoint.config)
        sizes = plan_sizes(ops, self._plan, dtype, engine)
        self._params = load_weights(ops, checkpoint, dtype, engine.weight_dtype)
        self._engine = Engine(ops, self._params, self._plan, tokenizer, dtype, engine, sizes)
        self._shared = SharedEngine(self._engine)
        self._files = PrefixFiles(self._shared, ops, self._plan, checkpoint, dtype, engine)
        self._window = 2 * sizes.num_slots  # requests of one call inside the engine: those that run, and as many
        self._turn = Turn("", [])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched; outputs are in the order of the prompts.

        Args: a prompt is text or token ids; `params` is one for all or one each (default: greedy, 256 tokens);
        requests of a lower `priority` number go first; only prompts of the same `salt` share prefixes; after `timeout`
        seconds a request ends with what it has and the `finish_reason` "deadline".
        Raises RequestError, before anything runs, if one of the prompts can never be answered. A request that fails
        later has `finish_reason` "error" and the reason in `error`.
        """
        batch = as_batch(prompts)
        each = params_for(batch, params)
        requests = [self._request(p, how, priority, salt, timeout) for p, how in zip(batch, each, strict=True)]
        found = dict(self._shared.serve(enumerate(requests), self._window, ordered=False))
        return [cast(RequestOutput, found[i]) for i in range(len(requests))]

    def run(
        self,
        requests: Iterable[tuple[K, Prompt | RequestError, SamplingParams]],
        *,
        ordered: bool = False,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
    ) -> Generator[tuple[K, RequestOutput | RequestError]]:
        """Answer any number of requests, as many at a time as there is room for.

        `requests` (key, prompt, params) is read ahead only as far as the engine needs it, so it may be endless; results
        (key, output) come as they finish, or in the order of the requests. A request that can never be answered
        gives its RequestError in place of an output; so does one that comes with a RequestError as its prompt, because
        the caller has refused it already. `timeout` counts from when a request is read. See `generate`.
        Closing the iterator cancels what is open.
        """
        source = self._or_refusal(requests, priority, salt, timeout)
        return self._shared.serve(source, 2 * self._window if ordered else self._window, ordered=ordered)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """Answer one prompt piece by piece. Closing the iterator cancels the request and frees its state.

        `progress` is called with the tokens of the prompt that are done and all of them, whenever the next step of
        the prompt is under way; what it raises ends the request, and the prefix cache keeps the most of what was done.
        Raises RequestError if the prompt can never be answered; a request that fails later raises ClsaError from
        the iterator. Several streams and calls of `generate` may take turns. See `generate` for the arguments.
        """
        return self._pieces(self._request(prompt, streamed(params), priority, salt, timeout), None, progress)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> RequestOutput | Iterator[Piece]:
        """Answer the last message of a conversation ({"role", "content"} each), by the model's chat template.

        The state of earlier turns is found again in the prefix cache; only what is new is computed. For that the
        answer of the turn before is kept as it was generated, and not tokenised anew. See `generate` and `stream` for
        the arguments.
        """
        text = self.tokenizer.apply_chat_template(messages)
        turn = Turn(text, self._turn.encode_next(text, self.tokenizer))
        if stream:
            return self._pieces(self._request(turn.prompt, streamed(params), priority, salt, timeout), turn, progress)
        request = self._request(turn.prompt, check_params(params), priority, salt, timeout)
        return collect(request, list(self._deltas(request, turn, progress)))

    def save_cache(self, path: str | Path, prompt: Prompt, *, salt: str = "") -> int:
        """Write the state of a prompt's full pages to a safetensors file, computing it where it is not cached.

        Returns the number of tokens. The file is bound to the model by a hash over its weights, which is computed once
        (about a second per 2 GB and core). Raises RequestError if the prompt has no full page, the prefix cache cannot
        hold it or the backend is "numpy", CheckpointError if the file cannot be written.
        """
        return self._save(path, encode(prompt, self.tokenizer, self.config.vocab_size), salt, {})

    def load_cache(self, path: str | Path, *, salt: str = "") -> int:
        """Put the state that `save_cache` wrote into the prefix cache; the next prompt that begins alike takes it up.

        Returns the number of tokens. Raises CheckpointError if the file is damaged or of another model, backend, dtype
        or salt, RequestError if the prefix cache has no room for it.
        """
        return self._files.restore(self._files.read(Path(path), salt), salt)

    def cache_key(self, prompt: Prompt, *, salt: str = "") -> str:
        """64 hex digits for what `save_cache` would write: a hash over model, backend, dtype, salt and whole pages."""
        return self._files.key(encode(prompt, self.tokenizer, self.config.vocab_size), salt)

    def save_chat(self, path: str | Path, messages: Messages, *, salt: str = "") -> int:
        """`save_cache` of a conversation that ends with an answer, with its messages. `load_chat` takes it up again."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        tokens = self._turn.encode_next(text, self.tokenizer)
        return self._save(path, tokens, salt, chat_metadata(messages, tokens))

    def load_chat(self, path: str | Path, *, salt: str = "") -> tuple[list[dict[str, str]], int]:
        """`load_cache` of a conversation: its messages, and the number of tokens whose state was read.

        Raises CheckpointError also if the file holds no conversation.
        """
        path = Path(path)
        prefix = self._files.read(path, salt)
        messages, tail = read_chat(path, self.config.vocab_size)
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            anew = self.tokenizer.encode(text, add_special_tokens=False)
        except RequestError as error:
            raise CheckpointError(f"the conversation in {path} is damaged: {error}") from None
        num_tokens = self._files.restore(prefix, salt)
        tokens = [*prefix.tokens, *tail]
        # Where they make another text, as with a template that has changed since, the text counts.
        self._turn = Turn(text, tokens if self.tokenizer.decode(tokens) == self.tokenizer.decode(anew) else anew)
        return messages, num_tokens

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits of every position, float32 [T, vocab], with the selection applied per position."""
        ids = check_ids(token_ids, self.config.vocab_size)
        with self._shared.turn():
            return evaluate_logits(self._ops, self._params, self._plan, self.dtype, ids, self.memory_dtypes)

    def selection(self, token_ids: Sequence[int] | np.ndarray, layer: int | None = None) -> np.ndarray:
        """What the shared index chose: int32 [T, index_topk], ascending positions, -1 padded.

        `layer` picks one of the layers that compute an index (default: the first). Raises RequestError if it
        computes none.
        """
        ids = check_ids(token_ids, self.config.vocab_size)
        with self._shared.turn():
            return evaluate_selection(self._ops, self._params, self._plan, self.dtype, ids, layer, self.memory_dtypes)

    def stats(self) -> dict[str, int]:
        """Counters (running, waiting, pages_free, prefix_tokens_hit, preemptions, ...) and the memory plan in bytes."""
        with self._shared.turn() as engine:
            return engine.stats() | engine.sizes.stats()

    def close(self) -> None:
        """Let go of weights and state; the object must not be used again."""
        del self._shared, self._engine, self._params, self._files

    def _save(self, path: str | Path, tokens: list[int], salt: str, extra: dict[str, str]) -> int:
        metadata = self._files.metadata(salt)  # it refuses what cannot be saved before anything is computed
        output = self.generate(tokens, SamplingParams(max_tokens=1), salt=salt)[0]
        if output.error is not None:
            raise ClsaError(output.error)
        return self._files.write(Path(path), tokens, salt, metadata | extra)

    def _request(
        self, prompt: Prompt, params: SamplingParams, priority: int, salt: str, timeout: float | None
    ) -> Request:
        tokens = encode(prompt, self.tokenizer, self.config.vocab_size)
        deadline = None
        if timeout is not None:
            deadline = time.monotonic() + check_float("timeout", timeout, 0, 1e9, RequestError)
        return self._engine.make_request(tokens, params, priority=priority, salt=salt, deadline=deadline)

    def _or_refusal(
        self,
        requests: Iterable[tuple[K, Prompt | RequestError, SamplingParams]],
        priority: int,
        salt: str,
        timeout: float | None,
    ) -> Iterator[tuple[K, Request | RequestError]]:
        for key, prompt, params in requests:
            try:
                if isinstance(prompt, RequestError):
                    raise prompt
                yield key, self._request(prompt, check_params(params), priority, salt, timeout)
            except RequestError as error:
                yield key, error

    def _deltas(self, request: Request, turn: Turn | None, progress: Progress | None) -> Generator[Delta]:
        self._turn = turn or self._turn
        with closing(self._shared.deltas(request, progress)) as deltas:
            for delta in deltas:
                if turn is not None:
                    turn.add(delta)
                yield delta

    def _pieces(self, request: Request, turn: Turn | None, progress: Progress | None) -> Iterator[Piece]:
        with closing(self._deltas(request, turn, progress)) as deltas:
            clock = PieceClock(request)
            for delta in deltas:
                yield clock.piece(delta, self._ops.memory_stats()["peak"])
