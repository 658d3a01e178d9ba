"""A model that needs no weights: it says what it is told to, and remembers what it was asked."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from clsa import ModelConfig, RequestError, SamplingParams
from clsa.config import MODEL_DTYPE
from clsa.llm import Progress
from clsa.outputs import Piece, RequestOutput, TokenLogprob

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layer_types=("sliding_attention", "sliding_attention", "cross_attention", "cross_attention"),
    index_topk_pattern="FS",
    index_topk=8,
    index_head_dim=8,
    sliding_window=16,
    max_position_embeddings=512,
    torch_dtype="float32",
)


class FakeTokenizer:
    has_chat_template = True

    def __init__(self, ends_prompt: str) -> None:
        self.ends_prompt = ends_prompt

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + self.ends_prompt

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Any) -> list[int]:
        if not isinstance(messages, list) or not messages:
            raise RequestError(f"messages must be a list, got {messages!r}")
        return [len(message["content"]) for message in messages]


class FakeLLM:
    """`say` are the pieces of every answer. A prompt that holds "refuse" is refused, "fail" fails.

    It takes `prefill` steps of 2,000 tokens before an answer, each of them `delay` seconds, as is each piece. Its chat
    template writes `ends_prompt` behind the messages.
    """

    backend, device, dtype = "fake", "cpu (pretended)", "float32"
    memory_dtypes, weight_dtype = MODEL_DTYPE, None
    why = "fake on cpu (pretended) (it is the only one)"
    config = CONFIG

    def __init__(
        self,
        say: Sequence[str] = ("Hello", " world"),
        delay: float = 0.0,
        prefill: int = 0,
        ends_prompt: str = "<assistant>",
    ) -> None:
        self.say, self.delay, self.prefill = list(say), delay, prefill
        self.tokenizer = FakeTokenizer(ends_prompt)
        self.asked: list[Any] = []
        self.params: list[SamplingParams] = []
        self.loaded_with: tuple[Any, ...] = ()
        self.cancelled = self.closed = False

    def load(self, *args: Any, **kwargs: Any) -> FakeLLM:
        self.loaded_with = (*args, kwargs)
        return self

    def close(self) -> None:
        self.closed = True

    def stream(
        self, prompt: Any, params: SamplingParams, *, salt: str = "", progress: Progress | None = None
    ) -> Iterator[Piece]:
        self._note(prompt, params)
        return self._pieces(9 + len(self.asked), params, progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams,
        *,
        stream: bool,
        progress: Progress | None = None,
    ) -> Iterator[Piece]:
        assert stream
        self._note([dict(message) for message in messages], params)
        return self._pieces(10 * len(messages), params, progress)

    def stats(self) -> dict[str, int]:
        return {"max_model_len": self.config.max_position_embeddings, "max_tokens_in_memory": 1 << 20}

    def run(
        self, requests: Iterable[tuple[Any, Any, SamplingParams]], *, ordered: bool = False, salt: str = ""
    ) -> Generator[tuple[Any, RequestOutput | RequestError]]:
        """Reads one request ahead. Out of order unless told otherwise: each answer after the one that came later."""
        held: list[tuple[Any, RequestOutput | RequestError]] = []
        for key, prompt, params in requests:
            time.sleep(self.delay)
            try:
                if isinstance(prompt, RequestError):
                    raise prompt
                self._note(prompt, params)
                held.append((key, self._output(prompt, params)))
            except RequestError as error:
                held.append((key, error))
            if ordered or len(held) == 2:
                yield held.pop()
        yield from held

    def _note(self, prompt: Any, params: SamplingParams) -> None:
        if "refuse" in str(prompt):
            raise RequestError(f"the prompt {prompt!r} is refused")
        self.asked.append(prompt)
        self.params.append(params)

    def _output(self, prompt: Any, params: SamplingParams) -> RequestOutput:
        failed = "fail" in str(prompt)
        logprobs = [TokenLogprob(7, -0.5, ((7, -0.5), (8, float("-inf"))))] * len(self.say)
        return RequestOutput(
            text="" if failed else "".join(self.say),
            token_ids=list(range(len(self.say))),
            finish_reason="error" if failed else "stop",
            prompt_tokens=5,
            cached_tokens=2,
            logprobs=None if params.logprobs is None else logprobs,
            error="the step failed" if failed else None,
        )

    def _pieces(self, prompt_tokens: int, params: SamplingParams, progress: Progress | None) -> Iterator[Piece]:
        try:
            for step in range(self.prefill):
                time.sleep(self.delay)
                if progress is not None:
                    progress(2000 * step, 2000 * self.prefill)
            for i, text in enumerate(self.say):
                time.sleep(self.delay)
                last = i == len(self.say) - 1
                top = ((7, -0.5), (8, float("-inf")))[: params.logprobs or 0]
                yield Piece(
                    text, i, -0.5, top, prompt_tokens, 4, 100.0, i + 1, 50.0, 12_000_000, "stop" if last else None
                )
        finally:
            self.cancelled = True
