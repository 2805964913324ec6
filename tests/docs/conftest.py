"""The documentation's own code, docs/*.py, can be imported, and what it prints is what a user gets."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch._dynamo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))


@pytest.fixture(scope="package", autouse=True)
def cached_dispatches() -> Generator[None]:
    """Exports as a user makes them: numbers in names of nodes may depend on the cache that other tests do without."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):
        yield
