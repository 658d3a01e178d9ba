"""Compiling kernels and the runtime, with a cache by content.

`CLSA_METAL_CACHE` moves the cache from the folder for temporary files.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.metal.harness.errors import CompileError

CPP = Path(__file__).parent / "cpp"
RUNTIME_SOURCES = ("launch.cpp", "schedule.cpp", "fiber.cpp", "faults.cpp", "memory.cpp")

# No contraction and no finite-loops: the same result on every machine, and an endless loop stays one.
_COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-finite-loops",
    "-fno-stack-protector",
    "-U_FORTIFY_SOURCE",
    f"-I{CPP}",
]
_KERNEL = ["-O2", "-g1", "-fstack-clash-protection", "-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-literal-suffix"]
_GCC_ONLY = ["-fsingle-precision-constant"]  # 2.0 is a float in Metal
_RUNTIME = ["-O2", "-g1", "-Wall", "-Wextra"]
_PLAIN = {**os.environ, "LC_ALL": "C"}  # messages in English and ASCII


@functools.cache
def compiler() -> str | None:
    """The C++ compiler, or None: $CXX, g++ or clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def build_kernel(text: str) -> Path:
    """A shared object with `kernel_entry`. It finds the runtime among the libraries already loaded."""
    return _cached("kernel.so", text, [*_COMMON, *_KERNEL, *_dialect(), "-shared", "-x", "c++", "-"])


def build_runtime() -> Path:
    """The shared object with `runtime_launch`."""
    sources = [str(CPP / name) for name in RUNTIME_SOURCES]
    return _cached("runtime.so", "", [*_COMMON, *_RUNTIME, "-shared", *sources])


def build_program(text: str, *, races: bool = False, cross_compiler: str | None = None) -> Path:
    """A program that runs the kernel once, on the call described in a folder; see main.cpp."""
    sources = [str(CPP / name) for name in (*RUNTIME_SOURCES, "main.cpp")]
    # The runtime orders threads by explicit calls; only the kernel is instrumented.
    extra = ["-DNARROW_GUARDS", *(["-DRACE_CHECK"] if races else [])]
    sanitize = ["-fsanitize=thread", "-O1"] if races else []
    runtime = _cached("runtime.o", "", [*_COMMON, *_RUNTIME, *extra, "-r", "-nostdlib", *sources], cross_compiler)
    flags = [*_COMMON, *_KERNEL, *_dialect(), *extra, *sanitize]
    return _cached("program", text, [*flags, "-x", "c++", "-", "-x", "none", str(runtime)], cross_compiler)


def line_of(module: str, offset: int) -> str | None:
    """`<name>.body:<line>` for an instruction of a kernel; None without binutils or line tables."""
    if not module or shutil.which("addr2line") is None:
        return None
    found = subprocess.run(
        ["addr2line", "-i", "-e", module, hex(offset)], capture_output=True, text=True, check=False
    ).stdout
    place = re.search(r"[^/\n]+\.(body|header):\d+", found)
    return place[0] if place else None


def _dialect() -> list[str]:
    return _GCC_ONLY if "clang" not in Path(compiler() or "").name else []


def _cached(kind: str, text: str, arguments: list[str], cross_compiler: str | None = None) -> Path:
    command = [cross_compiler or compiler() or "g++", *arguments]
    path = _folder() / f"{_key(text, command)}-{kind}"
    if not path.exists():
        fresh = path.with_suffix(f".{os.getpid()}")
        _compile(text, [*command, "-o", str(fresh)])
        fresh.replace(path)  # in one step: other processes see all of it or nothing
    return path


def _compile(text: str, command: list[str]) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=_PLAIN)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if re.search("error|undefined|multiple", line)]
        raise CompileError("\n".join(errors[:12]) or done.stderr[-2000:])


def _key(text: str, command: list[str]) -> str:
    parts = [_toolchain(command[0]), *command, text]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _toolchain(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    files = [path.read_text(encoding="utf-8") for path in sorted(CPP.rglob("*.*"))]
    return "\0".join([version, *files])


@functools.cache
def _folder() -> Path:
    default = Path(tempfile.gettempdir()) / f"clsa-metal-{os.getuid()}"
    folder = Path(os.environ.get("CLSA_METAL_CACHE", default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CompileError(f"the cache folder {folder} belongs to another user; set CLSA_METAL_CACHE")
    return folder
