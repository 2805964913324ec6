"""Captures that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.support import captures


@pytest.fixture(scope="package", autouse=True)
def captured_once() -> Generator[None]:
    """Equal models are captured once a session: what the tests here are about comes after it."""
    with captures.shared():
        yield
