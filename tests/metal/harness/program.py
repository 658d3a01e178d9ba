"""Running a call as a program of its own: for the race detector and for foreign processors."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tests.metal.harness.call import Call
from tests.metal.harness.launch import ORDERS, PLACES, POISONS, Order, Place


def run_program(
    command: list[str],
    call: Call,
    *,
    order: Order = "forward",
    place: Place = "end",
    seed: int = 0,
    timeout: float = 60.0,
    env: dict[str, str] | None = None,
) -> tuple[subprocess.CompletedProcess[str], list[np.ndarray]]:
    """Run `command <folder>` on the call; see main.cpp. Returns the finished process and the outputs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [
            "grid {} {} {}".format(*call.grid),
            "threadgroup {} {} {}".format(*call.threadgroup),
            f"order {ORDERS.index(order)}",
            f"place {PLACES.index(place)}",
            f"poison {POISONS[0]}",
            f"seed {seed}",
            f"buffers {len(call.buffers)}",
        ]
        for i, buffer in enumerate(call.buffers):
            array = buffer.array
            data = array.tobytes() if call.initialised or not buffer.writable else bytes([POISONS[0]]) * array.nbytes
            (folder / f"{i}.bin").write_bytes(data)
            lines.append(f"{buffer.name} {array.nbytes} {array.itemsize} {int(buffer.writable)}")
        (folder / "call.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        done = subprocess.run([*command, name], capture_output=True, text=True, check=False, timeout=timeout, env=env)
        outputs = [
            np.frombuffer((folder / f"{i}.bin").read_bytes(), buffer.array.dtype).reshape(buffer.array.shape)
            for i, buffer in enumerate(call.buffers)
            if buffer.writable
        ]
    return done, outputs
