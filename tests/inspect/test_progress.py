"""Tests of lissom.inspect.progress."""

import pytest

from lissom.inspect.progress import progress_bar


def test_nothing_is_shown_where_output_is_piped(capsys):
    with progress_bar("compile") as report:
        report("capture", 0, 3)
        report("drop-dropout", 1, 3)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_what_is_being_done(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("compile") as report:
        report("drop-dropout{names=[a]}", 1, 3)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "compile: drop-dropout{names=[a]}" in shown.err


def test_an_error_inside_is_passed_on():
    with pytest.raises(ZeroDivisionError), progress_bar("compile"):
        raise ZeroDivisionError
