"""A conversation in a cache file: its messages, and the tokens that the saved state does not reach.

They are one text of the file's metadata, under `chat`: a JSON object with `messages` and `tail`, the fewer than
PAGE_SIZE ids behind the whole pages. So the conversation goes on from the very ids it was generated with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from clsa.config import PAGE_SIZE, show
from clsa.errors import CheckpointError, RequestError
from clsa.files import parse_json
from clsa.tensor_file import read_metadata

KEY = "chat"
MAX_CHAT_BYTES = 7 << 20  # JSON as a string of JSON at most doubles, and a header may have 16 MiB


def chat_metadata(messages: Sequence[Mapping[str, str]], tokens: Sequence[int]) -> dict[str, str]:
    """What to add to the metadata of a file with the state of `tokens`. Raises RequestError if it is too much."""
    tail = list(tokens[len(tokens) // PAGE_SIZE * PAGE_SIZE :])
    text = json.dumps({"messages": [dict(message) for message in messages], "tail": tail}, ensure_ascii=False)
    if (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_CHAT_BYTES:
        raise RequestError(f"the conversation has {size} bytes of text, at most {MAX_CHAT_BYTES} are saved")
    return {KEY: text}


def read_chat(path: Path, vocab_size: int) -> tuple[list[dict[str, str]], list[int]]:
    """Messages and tail of a conversation's file. That the messages are such is for the chat template to check.

    Raises CheckpointError if the file holds no conversation, or a tail that cannot be.
    """
    text = read_metadata(path, path).get(KEY)
    if text is None:
        raise CheckpointError(f"{path} holds the state of a prompt and no conversation; load it as a cache file")
    data = parse_json(text.encode("utf-8", "surrogatepass"), f"the conversation in {path}")
    if set(data) != {"messages", "tail"}:
        raise CheckpointError(f"the conversation in {path} must have messages and tail, got {show(sorted(data))}")
    messages, tail = data["messages"], data["tail"]
    are_ids = isinstance(tail, list) and all(type(token) is int and 0 <= token < vocab_size for token in tail)
    if not are_ids or len(tail) >= PAGE_SIZE:
        raise CheckpointError(
            f"the conversation in {path} has the tail {show(tail)}, "
            f"must be fewer than {PAGE_SIZE} ids from 0 to {vocab_size - 1}"
        )
    return messages, tail
