"""How much memory the host has, for backends that compute on it."""

from __future__ import annotations

import os
import resource
import sys


def host_memory_stats() -> dict[str, int]:
    """Bytes: `total`, `free` (available to new allocations), `peak` (largest resident size of this process)."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"total": total, "free": _available(total), "peak": peak}


def _available(total: int) -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux; macOS reclaims file cache on demand, so half of the total is a safe reading
        pass
    return total // 2
