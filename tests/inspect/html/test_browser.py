"""Tests of the page in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

import lissom
from tests.inspect.html.test_page import Hostile
from tests.support.models import tiny_llama
from tests.support.page_reading import written

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


def opened(path: Path, address: str = "", script: str = "", *, real_time: bool = False) -> str:
    """The page's elements after its scripts ran. script: runs at the end. real_time: clocks of the page run as usual."""
    if script:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [] if real_time else ["--virtual-time-budget=5000"]
    return subprocess.run(
        [*command, f"file://{path}#{address}"], capture_output=True, text=True, timeout=300, check=True
    ).stdout


CLICKING = """
const seen = [];
function click(where, words) {
  const buttons = [...document.querySelectorAll(`${where} button`)].filter(item => item.offsetParent !== null);
  const found = buttons.filter(item => item.textContent.includes(words));
  if (!found.length) throw new Error(`no button '${words}' in ${where}`);
  found[0].click();
  seen.push(document.getElementById('detail').innerText);
}
"""
SHOW = "document.body.append(h('pre', { id: 'out' }, JSON.stringify(%s)));"


def shown(path: Path, script: str, what: str, *, real_time: bool = False) -> list:
    """A JSON value that the page gives after a script."""
    found = opened(path, script=f"{CLICKING}{script}{SHOW % what}", real_time=real_time)
    (text,) = re.findall(r'<pre id="out">(.*?)</pre>', found, re.DOTALL)
    return json.loads(html.unescape(text))


def test_one_click_says_which_pass_saved_most(report, tmp_path):
    written(report, tmp_path)
    (detail,) = shown(tmp_path / "report.html", "click('#header', 'Weights');", "seen")
    saved = {
        step.index: before.size.parameter_bytes - step.size.parameter_bytes
        for before, step in zip(report.history.steps, report.history.steps[1:], strict=False)
    }
    best = max(saved, key=saved.__getitem__)
    assert detail.startswith(f"{best} · {report.history.steps[best].spelling}")


def test_one_click_says_which_layer_costs_most(report, tmp_path):
    written(report, tmp_path)
    (detail,) = shown(tmp_path / "report.html", "click('#header', 'Costliest part');", "seen")
    last = report.history.facts_of(len(report.history.steps) - 1)
    layers: dict[str, int] = {}
    for fact in last.values():
        path = ".".join(fact.origin.module_path.split(".")[:3])
        if re.fullmatch(r"encoder\.layer\.\d", path):
            layers[path] = layers.get(path, 0) + int(fact.cost.flops)
    assert layers[detail.split("\n")[0]] == max(layers.values())
    assert re.search(r"FLOPs\s+[\d.]+ \w?FLOP, \d+ % of the program", detail)


def test_three_clicks_say_what_was_pruned_in_a_layer(report, tmp_path):
    """The pass says how many heads it keeps there; the step that removes them shows the shapes before and after."""
    written(report, tmp_path)
    step = next(step for step in report.history.steps if step.spelling.startswith("prune-heads"))
    kept = re.search(r"encoder\.layer\.3[^=,]*=(\d+)", step.per_site)[1]
    script = "click('#steps', 'prune-heads'); click('#detail', 'eliminate-dead'); click('#tree .choice', '3');"
    first, second, third = shown(tmp_path / "report.html", script, "seen")
    assert re.search(rf"encoder\.layer\.3\S*\s+{kept}\b", first) and second.startswith(f"{step.index + 1} · eliminate-dead")
    assert third.startswith("encoder.layer.3") and f"{32 * int(kept)}" in third and "384" in third


@pytest.fixture(scope="module")
def sparse():
    """A model of two layers, whose windows hide keys and whose errors were measured."""
    case = tiny_llama()
    passes = "sparsify-attention{pattern=window,window=2}"
    found = lissom.optimize(case.model, case.inputs, passes=passes, checks="structural")
    return found, found.report.errors(case.model)


@pytest.mark.parametrize(("heat", "label"), [("error", "Error"), ("mass", "Attention mass lost")])
def test_measured_heat_is_on_page_and_in_details(sparse, heat, label, tmp_path):
    found, errors = sparse
    found.report.to_html(tmp_path / "report.html", heat=heat)
    values = errors.nodes if heat == "error" else {name: 1 - mass for name, mass in errors.kept_mass.items()}
    hottest = max(values, key=values.__getitem__)
    pressed = "document.querySelector('#tools [aria-pressed=true]').textContent"
    width = f"document.querySelector('#tree [data-node=\"%{hottest}\"] .fill').style.width"
    script = f"go({{ node: '%{hottest}', module: null }}); seen.push(document.getElementById('detail').innerText);"
    (detail,), button, filled = shown(tmp_path / "report.html", script, f"[seen, {pressed}, {width}]")
    assert (button, filled) == (label, "100%") and "100 % of the largest" in detail
    assert heat == "error" or f"{round(100 * errors.kept_mass[hottest])} % of the original's" in detail


def test_a_heat_without_figures_says_what_measures_it(report, tmp_path):
    written(report, tmp_path)
    button = "[...document.querySelectorAll('#tools button')].find(item => item.textContent === 'Error')"
    disabled, title = shown(tmp_path / "report.html", "", f"[{button}.disabled, {button}.title]")
    assert disabled and "report.errors()" in title and "--errors" in title


def test_the_search_finds_passes_modules_and_nodes(report, tmp_path):
    written(report, tmp_path)
    script = (
        "const box = document.getElementById('search'); box.value = 'layer.3.output';"
        "box.dispatchEvent(new Event('input')); click('#found', 'encoder.layer.3.output');"
        "box.value = 'quantize'; box.dispatchEvent(new Event('input'));"
    )
    steps = "[...document.querySelectorAll('#steps .name')].map(item => item.textContent)"
    (detail,), names = shown(tmp_path / "report.html", script, f"[seen, {steps}]")
    assert detail.startswith("encoder.layer.3.output")
    assert names[0].startswith("quantize") and "rewrite-einsum" not in names


def test_names_that_are_markup_stay_text(tmp_path):
    compiled = lissom.optimize(Hostile(), torch.randn(2, 4), checks="structural")
    written(compiled.report, tmp_path)
    counts = "[document.scripts.length, document.querySelectorAll('#tree b').length, document.getElementById('tree').innerText]"
    scripts, bold, tree = shown(tmp_path / "report.html", "", counts)
    assert (scripts, bold) == (3, 0) and "alert(1)" in tree and "<!-- <b>" in tree


def test_the_steps_of_a_deep_model_change_at_once(tmp_path):
    """Each step is drawn and laid out for the first time; the best of five pages, because the machine may be busy."""
    config = transformers.BertConfig(
        num_hidden_layers=96, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    inputs = {"input_ids": torch.randint(0, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    model = transformers.BertModel(config).eval()
    options = {"passes": "quantize", "checks": "structural", "goal": None, "dynamic": False}
    compiled = lissom.compile(model, inputs, **options)
    script = (
        "const ready = performance.now(), times = [];"
        "for (let i = 0; i < steps.length; i++) {"
        "  const started = performance.now(); go({ step: i, from: 'prev', node: null, module: null });"
        "  document.body.getBoundingClientRect(); times.push(performance.now() - started); }"
    )
    found = []
    for _ in range(5):
        written(compiled.report, tmp_path)
        found.append(shown(tmp_path / "report.html", script, "[ready, ...times]", real_time=True))
    ready, *steps = map(min, zip(*found, strict=True))
    assert ready < 1000 and max(steps) < 200


def test_the_page_decodes_every_program(report, tmp_path):
    written(report, tmp_path)
    script = "document.body.append(h('pre', { id: 'out' }, JSON.stringify(steps.map((_, i) => programText(i)))));"
    found = opened(tmp_path / "report.html", script=script)
    (texts,) = re.findall(r'<pre id="out">(.*?)</pre>', found, re.DOTALL)
    assert json.loads(html.unescape(texts)) == report.history.texts


def test_link_opens_what_pass_removed_in_layer(report, tmp_path):
    written(report, tmp_path)
    # The heads that `prune-heads` zeroed are removed by the step after it.
    step = next(step.index for step in report.history.steps if step.spelling.startswith("prune-heads")) + 1
    found = opened(tmp_path / "report.html", f"step={step}&module=encoder.layer.3&heat=flops")
    detail = found.partition('id="detail"')[2]
    assert "encoder.layer.3</h2>" in detail and "<b>384</b>" in detail and "<b>288</b>" in detail
    assert found.count('class="row') <= 200


def test_overview_names_largest_saving_and_costliest_layer(report, tmp_path):
    written(report, tmp_path)
    found = opened(tmp_path / "report.html")
    assert "most by fold-quantized-weights" in found and re.search(r"Costliest part.{1,80}encoder\.layer\.\d", found)
    assert "prune-heads{keep=0.75}" in found and "passes changed nothing" in found


def test_keys_move_through_the_passes(report, tmp_path):
    written(report, tmp_path)
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown', bubbles: true }));"
    found = opened(tmp_path / "report.html", script=press * 2)
    assert re.search(r'aria-current="step".{0,200}eliminate-dead-code', found)


def test_page_of_sharded_model_has_share_of_sharded_parameters(tmp_path):
    case = tiny_llama()
    found = lissom.optimize(case.model, case.inputs, passes="shard{world_size=2}", checks="structural")
    written(found.report, tmp_path)
    script = "const whole = elements(' f32[64, 256] Shard(0)'); click('#tools', 'Sharded parameters');"
    what = (
        "[whole, document.querySelector('#tree [data-path] .figure').textContent, modules(page.step, null).root.nodes.length]"
    )
    whole, share, count = shown(tmp_path / "report.html", f"go({{ step: steps.length - 1 }}); {script}", what)
    assert whole == 64 * 256 and share.endswith("%") and count == len(found.program.nodes())
