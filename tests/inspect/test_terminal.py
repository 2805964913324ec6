"""Tests of lissom.inspect.terminal: text of files cannot control the terminal."""

from __future__ import annotations

import io
import sys

import pytest
from rich.panel import Panel
from rich.text import Text
from typer.testing import CliRunner

from lissom.cli import main as cli
from lissom.cli.main import app
from lissom.inspect.tables import plain
from lissom.inspect.terminal import Terminal
from lissom.io.fields import visible
from tests.support.hostile import change
from tests.support.saving import compiled

TITLE = "\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (TITLE, r"\x1b]0;title\x07"),
        ("a\rb\x9bc", r"a\rb\x9bc"),
        ("a\u202eb", r"a\u202eb"),
        ("a\u061cb", r"a\u061cb"),
        ("a\ud800", r"a\ud800"),
        ("line\n\tü 漢 👍", "line\n\tü 漢 👍"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert visible(text) == shown


def test_colours_are_kept():
    file = io.StringIO()
    Terminal(file=file, force_terminal=True, color_system="standard", width=60).print(Panel(Text(f"a{TITLE}b", "red")))
    assert "\x1b[31m" in file.getvalue()
    # rich itself takes the bell out.
    assert TITLE not in file.getvalue() and r"a\x1b]0;titleb" in file.getvalue()
    assert plain(f"a{TITLE}b") == "a\\x1b]0;titleb\n"


@pytest.mark.parametrize("view", ["program", "structure", "sites"])
def test_commands_escape_what_an_artifact_says(tmp_path, view):
    compiled("feed_forward").save(tmp_path / "artifact")

    def rename(program):
        for node in program["nodes"]:
            if node["op"] == "call_function":
                node["origin"] = dict.fromkeys(("module_path", "source", "code", "replaces"), f"a{TITLE}\ud800") | {
                    "passes": []
                }

    change(tmp_path / "artifact", rename)
    result = CliRunner().invoke(app, ["show", view, str(tmp_path / "artifact")])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output


def test_an_unexpected_error_is_escaped(monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RuntimeError(f"a{TITLE}b")

    monkeypatch.setattr(cli, "passes_table", fail)
    monkeypatch.setattr(sys, "argv", ["lissom", "passes"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert r"RuntimeError: a\x1b]0;titleb" in said and "\x1b" not in said
