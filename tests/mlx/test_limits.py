"""How much memory MLX may keep on Metal: set when the GPU is opened, from what the device says, and never on CPU."""

from __future__ import annotations

from typing import Any

import pytest

from clsa_mlx import device

pytestmark = pytest.mark.mlx


@pytest.mark.parametrize(
    ("info", "wired"),
    [({"max_recommended_working_set_size": 24 << 30, "memory_size": 32 << 30}, 24 << 30), ({"memory_size": 16}, 8)],
)
def test_limits_come_from_the_device(info: dict[str, int], wired: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    limits: dict[str, int] = {}
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    for name in ("set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit, name=name: limits.update({name: limit}))
    device._set_limits()
    assert limits == {"set_wired_limit": wired, "set_cache_limit": wired // 8}


def test_the_cpu_has_no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Any:
        raise AssertionError("limits were set for a CPU")

    monkeypatch.setattr(device, "_set_limits", never)
    device.backend.open("cpu")
