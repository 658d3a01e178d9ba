"""Data races: the same kernel under ThreadSanitizer, each Metal thread a thread of its own in its eyes.

A start of a thread costs half a millisecond here, so shapes must be small: below about 10,000 threads.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess

from tests.metal.harness.call import Call
from tests.metal.harness.compile import build_program
from tests.metal.harness.errors import CompileError, KernelError, RaceError
from tests.metal.harness.launch import Order
from tests.metal.harness.program import run_program
from tests.metal.harness.translate import to_cpp

_REPORT = re.compile(r"WARNING: ThreadSanitizer: (.*?)\n(.*?)={10,}", re.DOTALL)
_ACCESS = re.compile(
    r"(?:Previous )?(atomic )?(read|write) of size (\d+) at (0x[0-9a-f]+) by (?:thread (T\d+)|main thread)[^\n]*"
    r"\n((?:\s+#\d+[^\n]*\n)*)",
    re.IGNORECASE,
)
_THREAD = re.compile(r"Thread (T\d+) '([^']+)'")
_LINE = re.compile(r"[\w.-]+\.(?:body|header):\d+")
_REGION = re.compile(r"^REGION (0x[0-9a-f]+) (\d+) (.*)$", re.MULTILINE)


def find_races(call: Call, *, order: Order = "forward", timeout: float = 60.0) -> None:
    """Run the call once and report accesses that no barrier orders.

    A threadgroup_barrier or simdgroup_barrier orders memory unless its flag is mem_none; simd functions order
    nothing; threadgroups are unordered among each other; atomics do not race with atomics.

    Raises:
        RaceError: the message names both accesses: what, where, thread and line.
        KernelError: the kernel failed before.
    """
    program = build_program(to_cpp(call.source), races=True)
    env = {**os.environ, "TSAN_OPTIONS": "history_size=4 report_thread_leaks=0 atexit_sleep_ms=0"}
    done, _ = run_program([*_fixed_addresses(), str(program)], call, order=order, timeout=timeout, env=env)
    if "WARNING: ThreadSanitizer" in done.stderr:
        raise RaceError(f"{call.source.kernel.name}: " + _explain(done.stderr))
    if done.returncode != 0:
        raise KernelError(f"{call.source.kernel.name}: {done.stdout.strip() or done.stderr[-2000:]}")


@functools.cache
def unavailable() -> str | None:
    """Why races cannot be found here; None if they can."""
    try:
        program = build_program(
            '#include "runtime.h"\nextern "C" void kernel_entry(void* const*, const runtime::Thread&) {}\n', races=True
        )
    except CompileError as error:
        return f"the compiler has no ThreadSanitizer: {error}"
    done = subprocess.run([*_fixed_addresses(), str(program)], capture_output=True, text=True, check=False)
    return None if done.returncode == 2 else f"ThreadSanitizer does not start: {done.stderr.strip()[:200]}"


@functools.cache
def _fixed_addresses() -> list[str]:
    # ThreadSanitizer gives up on some systems' random addresses; a container may not let us fix them.
    command = ["setarch", platform.machine(), "-R"]
    if shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
        return command
    return []


def _explain(stderr: str) -> str:
    found = []
    for match in _REPORT.finditer(stderr):
        kind, report = match.groups()
        # The last region announced before the report: addresses are used again by later threadgroups.
        regions = _REGION.findall(stderr[: match.start()])[::-1]
        threads = dict(_THREAD.findall(report))
        unknown = "a thread of an earlier threadgroup"  # whose stack and name are gone
        accesses = []
        for atomic, what, size, address, thread, stack in _ACCESS.findall(report):
            line = _LINE.search(stack)
            where = _name(int(address, 16), regions)
            accesses.append(
                f"{atomic}{what.lower()} of {size} bytes of {where} by {threads.get(thread, unknown)}"
                + (f" at {line[0]}" if line else "")
            )
        found.append(f"{kind.split(' (pid')[0]}: " + " and ".join(accesses))
    return "\n".join(found[:5]) or stderr[-2000:]


def _name(address: int, regions: list[tuple[str, str, str]]) -> str:
    for start, size, name in regions:
        if 0 <= address - int(start, 16) < int(size):
            return f"{name} at byte {address - int(start, 16)}"
    return f"address {address:#x}"
