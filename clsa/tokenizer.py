"""Text to tokens and back: whole texts, answers that grow token by token, and the strings that end them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clsa.chat import ChatTemplate, load_template
from clsa.checkpoint import MAX_TOKENIZER_BYTES
from clsa.config import ModelConfig, show
from clsa.errors import CheckpointError, RequestError
from clsa.files import locate, read_bounded

MAX_TEXT = 1 << 26  # characters of one text
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_KEEP = 16  # tokens of context an incremental decoder goes on from
_LONGEST_CHAR = 4  # bytes, and so tokens, of one character in UTF-8


class Tokenizer:
    """The tokenizer of a checkpoint: tokenizer.json, the ids that its config names, and its chat template.

    `eos_token_ids` end a text, `bos_token_id` may be None, `vocab_size` counts the tokenizer's own ids (the model
    may have more).
    """

    def __init__(self, impl: Any, config: ModelConfig, template: ChatTemplate | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`. Raises CheckpointError if it has ids that the model has not."""
        self._impl = impl
        # What a file says about cutting and padding is for training batches; a prompt is never changed.
        impl.no_truncation()
        impl.no_padding()
        self.vocab_size: int = 1 + max(impl.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has ids up to {self.vocab_size - 1} but the model's vocab_size is "
                f"{config.vocab_size}; tokenizer.json and config.json are not of one model"
            )
        self._special = {i for i, token in impl.get_added_tokens_decoder().items() if token.special}
        self._template = template
        self.bos_token_id = config.bos_token_id
        self.eos_token_ids = config.eos_token_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens in it are recognised. Raises RequestError on what is not text."""
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            got = f"{len(text)} characters" if isinstance(text, str) else show(text)
            raise RequestError(f"a text must be a string of at most {MAX_TEXT} characters, got {got}")
        try:
            return list(self._impl.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            raise RequestError("the text holds half of a surrogate pair, which is no character") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, without special tokens; ids the tokenizer does not know are left out."""
        try:
            return str(self._impl.decode(list(ids), skip_special_tokens=True))
        except (TypeError, OverflowError):
            raise RequestError(f"token ids must be integers from 0, got {show(ids)}") from None

    def is_silent(self, token_id: int) -> bool:
        """Whether `decode` leaves this id out."""
        return token_id in self._special or self._impl.id_to_token(token_id) is None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation of {"role": ..., "content": ...}; raises RequestError on other messages.

        It holds the special tokens already: encode it with `add_special_tokens=False`, or use `encode_chat`.
        """
        if self._template is None:
            raise RequestError("this model has no chat template; use generate with a plain prompt instead")
        return self._template.render(messages, add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of `apply_chat_template`."""
        return self.encode(self.apply_chat_template(messages, add_generation_prompt), add_special_tokens=False)


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises CheckpointError if it is missing, damaged or another model's."""
    from tokenizers import Tokenizer as Impl

    path = locate(folder, "tokenizer.json")
    if path is None:
        raise CheckpointError(f"{folder} has no tokenizer.json; copy the one the model was trained with")
    try:
        impl = Impl.from_buffer(read_bounded(path, MAX_TOKENIZER_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'} is damaged: {show(str(error))}") from None
    return Tokenizer(impl, config, load_template(folder))


class IncrementalDecoder:
    """Decodes an answer while it grows; the pieces joined are `tokenizer.decode` of all ids.

    Only the last few tokens are decoded again for each new one. Characters whose bytes are not all there are held
    back. (With a byte-fallback tokenizer one invalid byte changes how `decode` shows valid bytes long before it;
    what was given out already stays.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were given out

    def push(self, token_id: int) -> str:
        """Take one more token and give out the text that is certain now, which may be empty."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        certain = len(text.rstrip(_REPLACEMENT))
        dropped = 0
        # Cutting waits for whole characters, but not for ever: some tokens never make any.
        if len(self._window) > (2 if certain == len(text) else 4) * _KEEP:
            dropped = self._shorten(text)
            certain = max(certain, dropped)
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain) - dropped
        return piece

    def flush(self) -> str:
        """The end: what was held back, incomplete characters as the replacement character."""
        piece = self._tokenizer.decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return piece

    def _shorten(self, text: str) -> int:
        """Drop the first tokens of the window; return how many characters of its `text` went with them."""
        last = len(self._window) - _KEEP
        tails = {cut: self._tokenizer.decode(self._window[cut:]) for cut in range(last - _LONGEST_CHAR, last)}
        # A cut inside a character shows; one of so many neighbouring places is between two.
        cut = next((cut for cut, tail in tails.items() if text.endswith(tail)), last - 1)
        del self._window[:cut]
        return max(0, len(text) - len(tails[cut]))


class WholeDecoder:
    """An `IncrementalDecoder` for an answer that nobody reads while it grows: all text comes at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        """Take one more token."""
        self._ids.append(token_id)
        return ""

    def flush(self) -> str:
        """The text of all tokens."""
        ids, self._ids = self._ids, []
        return self._tokenizer.decode(ids)


class StopMatcher:
    """Finds the first of several stop strings in a text that comes in pieces, however it is cut into pieces.

    The match that ends first wins, of those the longest; the text before it is given out, and nothing after it.
    Knuth-Morris-Pratt per string: the work is linear in the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty strings; none at all lets everything through."""
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text ends with
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take a piece; return (text that belongs to no stop string, whether one was found)."""
        if not self._stops:
            return text, False
        for i, char in enumerate(text):
            found = max((self._advance(which, char) for which in range(len(self._stops))), default=0)
            if found:
                seen = self._held + text[: i + 1]
                self._held = ""
                return seen[: len(seen) - found], True
        seen = self._held + text
        keep = len(seen) - max(self._matched, default=0)
        self._held = seen[keep:]
        return seen[:keep], False

    def flush(self) -> str:
        """The end without a stop string: what was held back as the possible beginning of one."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, which: int, char: str) -> int:
        """Match one more character against one stop string; its length if that completes it, else 0."""
        stop, borders, n = self._stops[which], self._borders[which], self._matched[which]
        while n and stop[n] != char:
            n = borders[n - 1]
        n += stop[n] == char
        self._matched[which] = n if n < len(stop) else 0
        return n if n == len(stop) else 0


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`: the length of the longest proper prefix of it that is also its suffix."""
    borders = [0] * len(stop)
    n = 0
    for i in range(1, len(stop)):
        while n and stop[i] != stop[n]:
            n = borders[n - 1]
        n += stop[i] == stop[n]
        borders[i] = n
    return borders
