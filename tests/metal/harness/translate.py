"""From the text of a Metal kernel to C++ that the shim compiles: one rewriting rule and a call of the kernel.

Only definitions of threadgroup variables are rewritten. Everything else of the body and the header is compiled as
it stands, with Metal's keywords as macros. Lines keep their numbers: errors point into `<name>.body` and
`<name>.header`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.metal.harness.errors import CompileError
from tests.metal.harness.signature import ATTRIBUTES, Source

# `threadgroup T name[N], other[2][M];`: a type, then names with constant sizes.
_TYPE = r"[A-Za-z_][\w:]*(?:\s*<[^;<>()]*>)?"
_NAME = r"[A-Za-z_]\w*(?:\s*\[[^\[\];]*\])*"
_DEFINITION = re.compile(rf"\bthreadgroup\s+({_TYPE})\s+({_NAME}(?:\s*,\s*{_NAME})*)\s*;")
_NEITHER_POINTER_NOR_REFERENCE = re.compile(r"\bthreadgroup\b[^*&;,(){}=]*[;,={]")
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>", re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def to_cpp(source: Source) -> str:
    """A translation unit with the kernel and `kernel_entry`, which runs it for one thread."""
    kernel = source.kernel
    parameters = [f"  {parameter.type} {parameter.name}" for parameter in source.parameters]
    parameters += [f"  {ATTRIBUTES[name]} {name}" for name in source.attributes]
    return "".join(
        [
            '#include "shim.h"\n',
            f'#line 1 "{kernel.name}.header"\n',
            translate_header(source),
            "\n" + source.template_line,
            f"static void {source.function}(\n" + ",\n".join(parameters) + ") {\n",
            f'#line 1 "{kernel.name}.body"\n',
            rewrite_variables(source, _reference),
            '\n}\n#line 1 "entry"\n',
            _entry(source),
        ]
    )


def translate_header(source: Source) -> str:
    """The header without Metal's own includes; it must not define threadgroup variables."""
    header = without_comments(source.kernel.header)
    if match := _DEFINITION.search(header) or _NEITHER_POINTER_NOR_REFERENCE.search(header):
        raise CompileError(f"{_where(source, 'header', match)}: threadgroup variables belong into the body")
    return _INCLUDE.sub("", source.kernel.header)


def rewrite_variables(source: Source, define: Callable[[int, str, str, str], str]) -> str:
    """The body with each threadgroup variable defined by `define(id, type, name, sizes)`."""
    body = without_comments(source.kernel.source)
    count = 0

    def rewrite(match: re.Match[str]) -> str:
        nonlocal count
        before = body[: match.start()]
        if before.count("{") != before.count("}"):
            raise CompileError(
                f"{_where(source, 'body', match)}: threadgroup variables must be defined at the top level of the"
                " kernel, outside all braces"
            )
        definitions = []
        for declarator in re.split(r",(?![^\[]*\])", match[2]):
            name, bracket, sizes = declarator.strip().partition("[")
            definitions.append(define(count, match[1], name.strip(), bracket + sizes))
            count += 1
        return " ".join(definitions) + "\n" * match[0].count("\n")

    rewritten = _DEFINITION.sub(rewrite, body)
    if match := _NEITHER_POINTER_NOR_REFERENCE.search(rewritten.replace("extern threadgroup", "")):
        raise CompileError(
            f"{_where(source, 'body', match)}: write threadgroup variables as `threadgroup T name[SIZE];`, without"
            " an initial value"
        )
    return rewritten


def without_comments(text: str) -> str:
    """The text with every comment replaced by the newlines in it."""
    return _COMMENT.sub(lambda match: " " + "\n" * match[0].count("\n"), text)


def _reference(number: int, type_: str, name: str, sizes: str) -> str:
    return f'auto& {name} = threadgroup_variable<{type_}{sizes}>({number}, "{name}");'


def _entry(source: Source) -> str:
    arguments = []
    for i, parameter in enumerate(source.parameters):
        pointer = parameter.type.rstrip("*&") + "*"
        dereference = "*" if parameter.type.endswith("&") else ""
        arguments.append(f"    {dereference}static_cast<{pointer}>(buffers[{i}])")
    arguments += [f"    attribute(at.{name})" for name in source.attributes]
    return (
        'extern "C" void kernel_entry(void* const* buffers, const runtime::Thread& at) {\n'
        f"  {source.instance}(\n" + ",\n".join(arguments) + ");\n}\n"
    )


def _where(source: Source, part: str, match: re.Match[str]) -> str:
    line = match.string.count("\n", 0, match.start()) + 1
    return f"{source.kernel.name}.{part}:{line}"
