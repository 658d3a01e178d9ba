"""The harness needs a C++ compiler and Linux; without them its tests are skipped with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.metal.harness.compile import compiler


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "races: Metal kernels under ThreadSanitizer; leave out with -m 'not races'")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not Path(item.path).is_relative_to(Path(__file__).parent) or item.path.name == "test_signature.py":
        return
    if sys.platform != "linux":
        pytest.skip("the harness runs on Linux; a Mac runs the kernels themselves")
    if compiler() is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
