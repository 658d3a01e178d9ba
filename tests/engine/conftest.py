"""What tests of the whole library share."""

from __future__ import annotations

import pytest

from clsa.llm import LLM
from tests.engine import models


@pytest.fixture
def llm() -> LLM:
    return models.load()
