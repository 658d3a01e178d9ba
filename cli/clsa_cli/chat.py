"""`clsa chat`: a conversation. Each turn pays only for what is new: the prefix cache keeps the rest."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, cast

import typer

from clsa import ClsaError, RequestError
from clsa.config import EngineConfig, SamplingParams
from clsa_cli import options, output
from clsa_cli.generate import MAX_PROMPT_BYTES, check_text

if TYPE_CHECKING:
    from clsa.llm import LLM
    from clsa.outputs import Piece

HELP = """\
/reset  forget the conversation
/help   show this
/quit   leave; so do Ctrl-D and Ctrl-C at the prompt
Ctrl-C stops an answer and keeps what is there; a second Ctrl-C leaves. Anything else is a message, also q, r and h."""
_COMMAND = re.compile(r"/[a-z]*")

Message = dict[str, str]


def chat(
    model: options.Model = "demo",
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    max_memory: options.MaxTokensInMemory = None,
) -> None:
    """Talk with a model; /help lists the commands. A pipe works too: one message per line, answers on stdout."""
    params = options.sampling(
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    start = [] if system is None else [{"role": "system", "content": check_text(system)}]
    engine = EngineConfig(max_num_seqs=1, max_tokens_in_memory=max_memory)
    with options.opened(model, backend, device, dtype, engine) as llm:
        if not llm.tokenizer.has_chat_template:
            raise ClsaError(f"{model} has no chat template, so it cannot chat; use `clsa generate` instead")
        _Conversation(llm, params, start).run(interactive=sys.stdin.isatty())


class _Conversation:
    def __init__(self, llm: LLM, params: SamplingParams, start: list[Message]) -> None:
        self.llm, self.params, self.start = llm, params, start
        self.messages = list(start)

    def run(self, *, interactive: bool) -> None:
        if interactive:
            output.note(f"{self.llm.device}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while (line := _read_line(interactive)) is not None:
            if _COMMAND.fullmatch(line.strip()):
                if line.strip() == "/quit":
                    return
                self._obey(line.strip())
            elif line.strip():
                try:
                    self._turn(check_text(line))
                except RequestError as error:
                    if not interactive:
                        raise
                    output.error(f"{error} (/reset forgets the conversation)")
        if interactive:
            output.note("left; the conversation is not kept")

    def _obey(self, command: str) -> None:
        if command == "/reset":
            self.messages = list(self.start)
            output.note("the conversation is forgotten")
        elif command == "/help":
            typer.echo(HELP, err=True)
        else:
            output.error(f"there is no command {command}; /help lists them")

    def _turn(self, message: str) -> None:
        """Ask, print, and remember both sides. A turn that gave no text leaves the conversation as it was."""
        asked = [*self.messages, {"role": "user", "content": message}]
        parts: list[str] = []
        last: Piece | None = None
        stream = cast("Generator[Piece, None, None]", self.llm.chat(asked, self.params, stream=True))
        try:
            with _stoppable() as stopped, contextlib.closing(stream) as pieces:
                for last in pieces:
                    parts.append(last.text)
                    output.write(last.text)
                    if stopped():
                        break
        finally:
            answer = "".join(parts)
            if last is not None and not answer.endswith("\n"):
                output.write("\n")
        if answer:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        if last is not None:
            output.note(
                f"[{last.generation_tps:,.1f} tokens/s, {last.cached_tokens:,} of "
                f"{output.count(last.prompt_tokens, 'prompt token')} from the cache"
                f"{', stopped' if last.finish_reason is None else ''}]"
            )


class _Stopped:
    """Whether Ctrl-C was pressed; a second one raises KeyboardInterrupt, wherever the program is."""

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self) -> bool:
        return self.pressed

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


@contextlib.contextmanager
def _stoppable() -> Iterator[_Stopped]:
    """Ctrl-C sets a flag that is read between tokens: an exception inside a step would leave it half done."""
    stopped = _Stopped()
    before = signal.signal(signal.SIGINT, stopped.handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _read_line(interactive: bool) -> str | None:
    """The next message without its line end; None at the end of input, or after Ctrl-C at the prompt."""
    if not interactive:
        return _read_piped()
    with contextlib.suppress(ImportError):  # editing and recall of earlier lines, where the system has them
        import readline  # noqa: F401
    try:
        if sys.stdout.isatty():
            return input("> ")
        typer.echo("> ", nl=False, err=True)
        return input()
    except (EOFError, KeyboardInterrupt):
        typer.echo(err=True)
        return None


def _read_piped() -> str | None:
    data = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
    if not data:
        return None
    if len(data) > MAX_PROMPT_BYTES:
        raise RequestError(f"a line of stdin is larger than {MAX_PROMPT_BYTES} bytes, the longest message; shorten it")
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text: {error.reason} at byte {error.start} of a line") from None
