"""Chat templates: a conversation becomes a prompt. The only place that renders a template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from clsa.checkpoint import refuse_code_hooks
from clsa.config import show
from clsa.errors import CheckpointError, RequestError
from clsa.files import locate, read_bounded, read_json

MAX_TEMPLATE_BYTES = 1 << 20
MAX_MESSAGES = 4096
MAX_CHARACTERS = 1 << 24  # of all messages, and of what a template may add to them
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint: chat_template.jinja, else what tokenizer_config.json holds, else None."""
    where = folder / "tokenizer_config.json"
    data = read_json(folder, where.name) or {}
    refuse_code_hooks(data, where)
    source = data.get("chat_template")
    if isinstance(source, list):  # several by name
        named = [item for item in source if isinstance(item, dict) and item.get("name") == "default"]
        source = named[0].get("template") if named else None
    path = locate(folder, "chat_template.jinja")
    if path is not None:
        where = folder / path.name
        try:
            source = read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{where} is not UTF-8 text") from None
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{where}: chat_template must be a string of at most {MAX_TEMPLATE_BYTES} bytes")
    tokens = {name: _content(data[name]) for name in _SPECIAL_TOKENS if data.get(name) is not None}
    return ChatTemplate(source, tokens, where)


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise CheckpointError(f"tokenizer_config.json: a special token must be a string, got {show(token)}")
    return content


class ChatTemplate:
    """A jinja template of a checkpoint. Templates are not trusted: they run in a sandbox, with bounded output."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: Path) -> None:
        """`special_tokens` are variables of the template; `where` names its file in error sentences."""
        self._source, self._tokens, self._where = source, dict(special_tokens), where

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError

        try:
            return _environment().from_string(self._source)
        except (TemplateError, RecursionError) as error:
            raise CheckpointError(f"{self._where}: the chat template is damaged: {show(str(error))}") from None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt. Raises RequestError on messages that are malformed or that the template refuses."""
        conversation, size = _check_messages(messages)
        template = self._compiled
        pieces: list[str] = []
        left = size + MAX_CHARACTERS
        try:
            for piece in template.generate(
                messages=conversation, add_generation_prompt=add_generation_prompt, **self._tokens
            ):
                left -= len(piece)
                if left < 0:
                    raise CheckpointError(f"{self._where}: the chat template writes without end")
                pieces.append(piece)
        except (CheckpointError, RequestError):
            raise
        except Exception as error:  # whatever the template's own code does wrong
            raise CheckpointError(f"{self._where}: the chat template fails: {show(str(error))}") from None
        return "".join(pieces)


def _environment() -> Any:
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses the operators that make a huge value out of a small one in a single step."""

        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
            if not numbers or operator == "**" or max(abs(left), abs(right)) > MAX_CHARACTERS:
                raise SecurityError(f"{operator} is not allowed on these values")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def _refuse(message: object) -> None:
    raise RequestError(f"the chat template refuses these messages: {show(message)}")


def _check_messages(messages: Any) -> tuple[list[dict[str, str]], int]:
    """The messages as plain dicts, and how many characters they have."""
    if not isinstance(messages, (list, tuple)) or not 1 <= len(messages) <= MAX_MESSAGES:
        got = f"{len(messages)} messages" if isinstance(messages, (list, tuple)) else show(messages)
        raise RequestError(f"messages must be a list of 1 to {MAX_MESSAGES} messages, got {got}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError(f"messages[{i}] must be an object with role and content, got {show(message)}")
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise RequestError(f"messages[{i}].{key} must be a string, got {show(message[key])}")
    size = sum(len(message["role"]) + len(message["content"]) for message in messages)
    if size > MAX_CHARACTERS:
        raise RequestError(f"the messages have {size} characters, at most {MAX_CHARACTERS} are accepted")
    return [dict(message) for message in messages], size
