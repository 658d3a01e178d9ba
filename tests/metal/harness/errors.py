"""What the harness finds. Each message names the place: buffer, byte, threadgroup, thread, line."""

from __future__ import annotations


class KernelError(Exception):
    """A kernel did something that Metal does not define or does not allow."""


class CompileError(KernelError):
    """The text of a kernel does not compile as Metal would require."""


class RaceError(KernelError):
    """Two threads use the same memory without a barrier between them, and one of them writes."""
