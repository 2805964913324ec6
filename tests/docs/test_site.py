"""The site builds without a warning, needs no network, and has the pages from outside docs/."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'lissom[docs]'"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # it advertises another tool
    ended = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr, ended.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(site):
    loads = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?(https?:[^\" >]+)")
    found = {path.name: loads.findall(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert {name: links for name, links in found.items() if links} == {}


def test_a_page_links_to_a_script_of_the_repository(site):
    page = (site / "huggingface.html").read_text(encoding="utf-8")
    assert 'href="examples/distill.py.html"' in page
    assert "prune-layers" in (site / "examples" / "distill.py.html").read_text(encoding="utf-8")


def test_lists_are_lists(site):
    page = (site / "architecture.html").read_text(encoding="utf-8")
    assert re.search(r"<li>\s*records the pass on every node", page) or "<li>records the pass on every node" in page
    assert re.search(r"<ul>\s*<li>its requirements are checked;</li>", page)


def test_the_reference_has_arguments_and_examples(site):
    page = (site / "reference" / "compile.html").read_text(encoding="utf-8")
    assert re.search(r"<code>dynamic</code>.*?True finds out by trying", page, re.DOTALL)
    assert "simulate: bool = False" in re.sub(r"<[^>]+>", "", page)
    assert 'id="lissom.CompiledModel.save"' in page


def test_minilms_report_is_embedded(site):
    assert '<iframe class="report-frame" src="minilm-report.html"' in (site / "minilm_report.html").read_text(encoding="utf-8")
    assert "prune-heads" in (site / "minilm-report.html").read_text(encoding="utf-8")


def test_the_search_works_from_disk(site):
    assert "iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "search" / "search_index.js").is_file()
