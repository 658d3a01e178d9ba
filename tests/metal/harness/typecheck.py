"""A type check of a kernel by clang, with address spaces as in Metal. It compiles nothing and takes 0.1 s.

Use real sizes of inputs: MLX passes those with fewer than 8 elements in another address space.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

from tests.metal.harness.call import Call
from tests.metal.harness.compile import CPP
from tests.metal.harness.errors import CompileError
from tests.metal.harness.signature import ATTRIBUTES
from tests.metal.harness.translate import rewrite_variables, translate_header, without_comments

_FLAGS = [
    "-fsyntax-only",
    "-std=c++17",
    "-Wno-everything",
    "-Werror=double-promotion",
    "-Xclang", "-fnative-half-type",
    "-Xclang", "-fnative-half-arguments-and-returns",
    "-ferror-limit=8",
    "-nostdinc",
    f"-I{CPP}",
    "-x", "c++", "-",
]  # fmt: skip
_VECTORS = r"(?:float|half|bfloat|u?char|u?short|u?int|u?long)[234]"
# `float4(` and `vec<T, 4>(` where they construct a value, not where they declare a variable.
_CONSTRUCTION = re.compile(rf"(?<![\w:])((?:metal::)?(?:{_VECTORS}|vec\s*<[^<>;]*>))\s*\(")
_DOUBLE = re.compile(r"\bdouble\b")


@functools.cache
def clang() -> str | None:
    """The newest clang++ on the path, or None."""
    names = ["clang++", *(f"clang++-{version}" for version in range(25, 13, -1))]
    return next((path for name in names if (path := shutil.which(name))), None)


def check_types(call: Call) -> None:
    """Check the header and the body as instantiated by this call.

    Raises:
        CompileError: with clang's messages, which name the line.
    """
    source = call.source
    parameters = [f"  {parameter.type} {parameter.name}" for parameter in source.parameters]
    parameters += [f"  {ATTRIBUTES[name]} {name}" for name in source.attributes]
    header = _CONSTRUCTION.sub(r"make<\1>(", without_comments(translate_header(source)))
    body = _CONSTRUCTION.sub(r"make<\1>(", rewrite_variables(source, _declaration))
    for part, text in (("header", header), ("body", body)):
        if match := _DOUBLE.search(text):
            line = text.count("\n", 0, match.start()) + 1
            raise CompileError(f"{source.kernel.name}.{part}:{line}: Metal has no double")
    text = "\n".join(
        [
            '#include "typecheck.h"',
            f'#line 1 "{source.kernel.name}.header"',
            header,
            source.template_line,
            f"void {source.function}(",
            ",\n".join(parameters) + ") {",
            f'#line 1 "{source.kernel.name}.body"',
            body + "\n}",
            f"template decltype({source.instance}) {source.instance};\n" if source.template else "",
        ]
    )
    done = subprocess.run([clang() or "clang++", *_FLAGS], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        raise CompileError("\n".join(errors) or done.stderr[-2000:])


def _declaration(number: int, type_: str, name: str, sizes: str) -> str:
    return f"extern threadgroup {type_} {name}{sizes};"  # a local in this address space is not C++
