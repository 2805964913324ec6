"""Faults that the suites find and that stay, by item, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

OPINFO: Mapping[str, str] = {}
