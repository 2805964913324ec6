"""Tests of lissom.inspect.progress."""

import itertools
import time

import pytest

from lissom.inspect.progress import progress_bar


def test_pipe_gets_one_line_per_stage_on_standard_error(capsys, monkeypatch):
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress_bar("compile") as report:
        report("capture", 0, 3)
        report("quantize{scheme=[red]}", 1, 3)
        report("quantize{scheme=[red]}: observe, 1 of 2", 1, 3)
        report("build eager", 2, 3)
    assert capsys.readouterr() == ("", "compile: capture\ncompile: quantize{scheme=[red]}\ncompile: build eager\n")


def test_pipe_gets_no_line_for_instant_stages(capsys, monkeypatch):
    moments = iter([0.0, 0.0, 0.5, 1.0, 3.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    with progress_bar("compile") as report:
        report("capture", 0, 3)
        report("drop-dropout", 1, 3)
        report("gptq", 2, 3)
        report("gptq: layers, 1 of 9", 2, 3)
    assert capsys.readouterr().err == "compile: gptq\n"


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
