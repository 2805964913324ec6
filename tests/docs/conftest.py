"""Documentation is run as a user runs it."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch._dynamo


@pytest.fixture(scope="package", autouse=True)
def cached_dispatches() -> Generator[None]:
    """Exports as a user makes them: numbers in names of nodes may depend on the cache that other tests do without."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):
        yield
