"""The option that writes golden files anew: `pytest tests/passes --update-goldens`."""

from __future__ import annotations

import pytest

from tests.support import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write tests/golden anew instead of comparing with it")


def pytest_configure(config: pytest.Config) -> None:
    harness.update_goldens = bool(config.getoption("--update-goldens", default=False))
