"""The poison of tests/conftest.py works; without it the tests of torch code would prove less."""

from __future__ import annotations

import pytest


def test_uninitialised_torch_memory_is_poisoned() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        like = torch.zeros(7, dtype=dtype)
        for out in (torch.empty(7, dtype=dtype), torch.empty_like(like), like.new_empty(7)):
            assert out.isnan().all()
    assert (torch.empty(7, dtype=torch.int32) == torch.iinfo(torch.int32).min).all()
