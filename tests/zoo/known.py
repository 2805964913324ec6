"""Models known not to be captured, and why."""

from __future__ import annotations

from collections.abc import Mapping

CANNOT_BE_CAPTURED: Mapping[str, str] = {}
TAKES_LONG: Mapping[str, str] = {}
