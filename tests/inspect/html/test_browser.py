"""Tests of the page in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import lissom
from tests.inspect.html.reading import written

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def report(minilm):
    passes = "prune-heads{keep=0.75},quantize{scheme=int8-dynamic}"
    return lissom.compile(minilm.model, minilm.example_inputs, passes=passes, checks="structural", goal=None).report


def opened(path: Path, address: str = "", script: str = "") -> str:
    """The page's elements after its scripts ran. script: runs at the end."""
    if script:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    return subprocess.run(
        [*command, f"file://{path}#{address}"], capture_output=True, text=True, timeout=300, check=True
    ).stdout


def test_the_page_decodes_every_program(report, tmp_path):
    written(report, tmp_path)
    script = "document.body.append(h('pre', { id: 'out' }, JSON.stringify(steps.map((_, i) => programText(i)))));"
    found = opened(tmp_path / "report.html", script=script)
    (texts,) = re.findall(r'<pre id="out">(.*?)</pre>', found, re.DOTALL)
    assert json.loads(html.unescape(texts)) == report.history.texts


def test_a_link_opens_what_a_pass_removed_in_a_layer(report, tmp_path):
    written(report, tmp_path)
    # The heads that `prune-heads` zeroed are removed by the step after it.
    step = next(step.index for step in report.history.steps if step.spelling.startswith("prune-heads")) + 1
    found = opened(tmp_path / "report.html", f"step={step}&module=encoder.layer.3&heat=flops")
    detail = found.partition('id="detail"')[2]
    assert "encoder.layer.3</h2>" in detail and "<b>384</b>" in detail and "<b>288</b>" in detail
    assert found.count('class="row') <= 200


def test_the_overview_names_the_largest_saving_and_the_costliest_layer(report, tmp_path):
    written(report, tmp_path)
    found = opened(tmp_path / "report.html")
    assert "most by fold-quantized-weights" in found and re.search(r"Costliest part.{1,80}encoder\.layer\.\d", found)
    assert "prune-heads{keep=0.75}" in found and "passes changed nothing" in found


def test_keys_move_through_the_passes(report, tmp_path):
    written(report, tmp_path)
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown', bubbles: true }));"
    found = opened(tmp_path / "report.html", script=press * 2)
    assert re.search(r'aria-current="step".{0,200}eliminate-dead-code', found)
