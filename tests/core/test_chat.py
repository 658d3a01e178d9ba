"""Chat templates: what they are given, and what they cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clsa.chat import ChatTemplate, load_template
from clsa.errors import CheckpointError, RequestError
from clsa.tokenizer import Tokenizer
from tests.core.test_tokenizer import CONFIG, TOKENIZER, byte_level

SOURCE = (
    "{{ bos_token }}{% for m in messages %}\n[{{ m['role'] }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [{"role": "user", "content": " hi <b> "}, {"role": "assistant", "content": "é"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<bos>", "eos_token": "<eos>"}, Path("chat_template.jinja"))


def test_render() -> None:
    assert template(SOURCE).render(TALK) == "<bos>[user] hi <b><eos>\n[assistant] é<eos>\n[assistant] "
    assert template(SOURCE).render(TALK, add_generation_prompt=False).endswith("é<eos>\n")


def test_what_templates_of_other_models_use() -> None:
    source = (
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index0 % 2 == 1 %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 2 * loop.index %}{{ m | tojson }}{% endfor %}{{ ns.n }}"
    )
    assert template(source).render(TALK) == json.dumps(TALK[0]) + "2"
    with pytest.raises(RequestError, match="the chat template refuses these messages: 'roles must alternate'"):
        template("{{ raise_exception('roles must alternate') }}").render(TALK)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append({}) }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 'a' * 100000000000 }}",
        "{{ [0] * 100000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages }}{% endfor %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
        "{{ undefined_name.attribute }}",
    ],
)
def test_what_templates_cannot_do(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.chat.MAX_CHARACTERS", 100_000)
    with pytest.raises(CheckpointError, match=r"^chat_template.jinja: the chat template (fails|writes)") as caught:
        template(source).render(TALK)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% nothing %}", "(" * 10 + "{{ " + "(" * 5000])
def test_damaged_templates(source: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template is damaged"):
        template(source).render(TALK)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hi",
        [],
        {},
        [None],
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["hi"]}],
        [{"role": 1, "content": "hi"}],
        [{"role": "user", "content": "hi", "tool_calls": []}],
        TALK * 3000,
    ],
    ids=lambda messages: repr(messages)[:40],
)
def test_malformed_messages(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages") as caught:
        template(SOURCE).render(messages)
    assert len(str(caught.value)) < 300


def test_long_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa.chat.MAX_CHARACTERS", 10)
    with pytest.raises(RequestError, match="at most 10 are accepted"):
        template(SOURCE).render(TALK)


def test_where_templates_come_from(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    config: dict[str, Any] = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}1"}]
    for chat_template, wanted in (("{{ bos_token }}0", "<s>0"), (named, "<s>1")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": chat_template}))
        found = load_template(tmp_path)
        assert found is not None
        assert found.render(TALK) == wanted
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}2{{ eos_token }}")
    found = load_template(tmp_path)
    assert found is not None
    assert found.render(TALK) == "<s>2"


@pytest.mark.parametrize("config", [{"chat_template": 3}, {"chat_template": "x", "bos_token": 3}], ids=str)
def test_malformed_tokenizer_configs(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="must be a string"):
        load_template(tmp_path)


def test_templates_that_are_not_text_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        load_template(tmp_path)
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(CheckpointError, match="at most 1048576 are read"):
        load_template(tmp_path)


def test_a_conversation_becomes_tokens_without_a_second_bos() -> None:
    tokenizer = Tokenizer(byte_level(), CONFIG, template(SOURCE))
    assert tokenizer.has_chat_template
    ids = tokenizer.encode_chat(TALK)
    assert ids == tokenizer.encode(tokenizer.apply_chat_template(TALK), add_special_tokens=False)
    assert ids.count(0) == 1
    with pytest.raises(RequestError, match="has no chat template"):
        TOKENIZER.apply_chat_template(TALK)
