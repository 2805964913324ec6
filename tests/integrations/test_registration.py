"""Tests of lissom.integrations.registration."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from lissom.integrations.registration import after_import


@pytest.fixture
def module(monkeypatch):
    """A module of the standard library that is not imported yet."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    return "colorsys"


def test_action_runs_once_after_import_and_not_after_lookup(module):
    ran: list[bool] = []
    after_import({module: lambda: ran.append(hasattr(sys.modules[module], "rgb_to_hsv"))})
    for _ in range(2):
        assert importlib.util.find_spec(module) is not None
    assert ran == []
    importlib.import_module(module)
    assert ran == [True]
    del sys.modules[module]
    importlib.import_module(module)
    assert ran == [True]


def test_an_action_of_an_imported_module_runs_now():
    ran: list[bool] = []
    after_import({"sys": lambda: ran.append(True)})
    assert ran == [True]
