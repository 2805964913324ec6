"""Tests of lissom.inspect.tables; reports are in test_report.py."""

from rich.text import Text

from lissom.inspect.tables import coloured_diff, plain


def test_plain_text_keeps_width_without_trailing_spaces():
    assert plain(Text("word " * 30), width=20) == "word word word word\n" * 7 + "word word\n"


def test_a_diff_is_coloured_by_its_signs():
    text = coloured_diff("@@ -1 +1 @@\n-[old]\n+[new]\n same\n")
    assert text.plain == "@@ -1 +1 @@\n-[old]\n+[new]\n same\n"
    assert [str(span.style) for span in text.spans] == ["cyan", "red", "green"]
