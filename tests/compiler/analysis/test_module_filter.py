"""Tests of lissom.compiler.analysis.module_filter."""

from __future__ import annotations

import pytest

from lissom.compiler.analysis.module_filter import is_path_protected

PATH = "encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ("encoder.layer.1", True),
        ("encoder.layer.*", True),
        ("*.dense", True),
        ("pooler, encoder.layer.1", True),
        ("pooler encoder.layer.1.output.dense", True),
        ("encoder.layer.11", False),
        ("layer.1", False),
        ("dense", False),
        ("", False),
    ],
)
def test_a_module_is_protected_with_what_it_holds(patterns, found):
    assert is_path_protected(PATH, patterns) == found
