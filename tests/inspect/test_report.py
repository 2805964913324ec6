"""Tests of lissom.inspect.report."""

import pytest
from rich.console import Console

from lissom.compiler.ir.editor import Skip
from lissom.compiler.pipeline.history import History, Size, Step
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.inspect.report import Report
from lissom.inspect.tables import show
from tests.support.models import capture_of, normal
from tests.support.passes import DropDropout, ScaleWeights

BEFORE, AFTER = Size(10, 1_000_000, 4_000_000, 2_000_000_000), Size(8, 1_000_000, 4_000_000, 1_500_000_000)


@pytest.fixture(scope="module")
def history():
    found = capture_of("feed_forward")
    score = lambda program: float(program.run([normal(2, 5, 8)])[0].square().mean())  # noqa: E731
    return Pipeline([DropDropout(), ScaleWeights(factor=0.5)], samples=[found.example], metric=score).run(found.program)[1]


def fixed(checks: str = "numeric", metric: float | None = None) -> History:
    """A history with numbers of its own."""
    history = History("some-pass", checks)
    history.record(Step(0, "capture", "capture", 1.0, 0.0, BEFORE, metric=metric, notes=("dynamic: batch",)), "a\n")
    history.record(Step(1, "idle-pass", "rewrite", 0.5, 0.0, BEFORE, relative_error=0.0, metric=metric), "a\n")
    skips = (Skip("n", "'n'", "it is odd"),)
    step = Step(2, "some-pass", "rewrite", 0.25, 0.25, AFTER, 1, 3, 2, skips, 1.25e-7, 1.0, metric)
    history.record(step, "b\n")
    return history


def lossy(*steps: Step) -> History:
    """The history above with lossy passes behind it, and an exact one that ends it."""
    history = fixed()
    for step in (*steps, Step(len(steps) + 3, "pack", "rewrite", 0.0, 0.0, steps[-1].size, rewritten=1, cosine=0.99951)):
        history.record(step, "c\n")
    return history


REPORT = """\
Model on eager: 10 → 8 nodes, 4 MB, equal outputs
 # pass      what it did                            nodes MB GFLOP error
────────────────────────────────────────────────────────────────────────
 0 capture                                             10  4     2
 2 some-pass rewrote 2 of 3; skipped 1: it is odd       8      1.5 1e-07
"""


CAPTION = (
    "dynamic: batch 1 more step changed nothing; report.full() or --full shows them "
    "checks: numeric (outputs are equal before and after exact steps); 2.0 s in all"
)


def lines(text: str) -> list[list[str]]:
    """The words of each line; the widths of columns are rich's business."""
    return [line.split() for line in text.splitlines() if set(line) - set("─ ")]


def test_a_report_lists_the_steps_that_changed_something():
    found = lines(str(Report("Model on eager", fixed())))
    assert found[:4] == lines(REPORT)
    assert " ".join(word for line in found[4:] for word in line) == CAPTION


def test_a_full_report_lists_every_step_with_its_seconds():
    found = lines(str(Report("Model on eager", fixed()).full()))
    assert found[1] == ["#", "pass", "what", "it", "did", "s", "nodes", "MB", "GFLOP", "error"]
    assert found[3] == ["1", "idle-pass", "nothing", "to", "do", "0.50", "0e+00"]
    assert "more step" not in str(Report("Model on eager", fixed()).full())


def test_first_line_gives_known_gains_and_losses():
    small = Size(9, 250_000, 1_000_000, 1_500_000_000)
    history = lossy(Step(3, "quantize", "approximation", 0.0, 0.0, small, 1, 1, 1, (), 0.0123, 0.9995, None))
    title = str(Report("Model", history, times_faster=(2.04, 2.81))).partition("\n\n")[0]
    assert " ".join(title.split()) == "Model: 2.0 to 2.8 × faster, 10 → 9 nodes, 4 → 1 MB, smallest cosine 0.9995"
    assert "Model: 3.0 × faster, 10 → 8 nodes" in str(Report("Model", fixed(), times_faster=(3.0,)))
    assert "metric 0.5 → 0.5" in str(Report("Model", fixed(metric=0.5)))
    assert "equal outputs" not in str(Report("Model", fixed("structural"))).partition("#")[0]


def test_reverted_pass_is_listed_with_reason_and_figures():
    reason = "neither faster nor smaller on eager: 2 ms and 4 MB with it, 1 ms and 4 MB without"
    history = lossy(Step(3, "low-rank{rank=8}", "approximation", 0.0, 0.0, AFTER, reverted=reason))
    shown = " ".join(str(Report("Model", history)).split())
    assert "nothing to do" not in shown
    assert "3 low-rank{rank=8} reverted: neither faster nor smaller on eager" in shown
    assert f"low-rank{{rank=8}} was reverted: {reason}" in shown
    assert "equal outputs" in shown.partition("#")[0]


def test_a_lossy_pass_that_found_nothing_is_listed():
    history = lossy(Step(3, "cast", "approximation", 0.0, 0.0, AFTER, relative_error=0.0))
    assert "cast nothing to do" in " ".join(str(Report("Model", history)).split())


def test_requested_pass_without_effect_is_listed_with_reason():
    history = fixed()
    history.pipeline = "some-pass,pack-tokens"
    for index, spelling in enumerate(("pack-tokens", "fuse-attention"), 3):
        skips = (Skip("n", "'n'", "it reads positions that may be padding"),)
        history.record(Step(index, spelling, "rewrite", 0.0, 0.0, AFTER, skipped=skips), "b\n")
    shown = " ".join(str(Report("Model", history)).split())
    assert "pack-tokens rewrote 0 of 1; skipped 1: it reads positions that may be padding" in shown
    assert "fuse-attention" not in shown


def test_sizes_are_in_the_unit_of_the_captured_model():
    history = History("", "off")
    for index, size in enumerate((Size(3, 250, 1_000, 5_500_000), Size(3, 100, 400, 99_960))):
        history.record(Step(index, "capture", "capture", 0.0, 0.0, size), "a\n")
    found = lines(str(Report("Model", history)))
    assert found[0] == ["Model:", "3", "nodes,", "1", "→", "0.4", "KB"]
    assert found[1][-4:] == ["nodes", "KB", "MFLOP", "error"]
    assert found[3][-2:] == ["0.4", "0.1"]


def test_a_note_names_its_pass():
    history = lossy(Step(3, "cast{dtype=fp16}", "approximation", 0.0, 0.0, AFTER, notes=("kept 2 values in float32",)))
    assert "\ncast: kept 2 values in float32\n" in str(Report("Model", history))


def test_options_too_long_for_a_row_are_omitted():
    spelling = "quantize{scheme=int8,skip=[one,two],observer=percentile,share=0.999}"
    shown = str(Report("Model", lossy(Step(3, spelling, "approximation", 0.0, 0.0, AFTER))))
    assert " quantize{scheme=int8,…} " in shown
    assert "merge-projections{…} " in str(
        Report("Model", lossy(Step(3, "merge-projections{always=true}", "approximation", 0.0, 0.0, AFTER)))
    )


def test_a_report_fits_80_columns_and_is_not_padded():
    reason = "neither faster nor smaller on eager: 2 ms and 4 MB with it, 1 ms and 4 MB without"
    step = Step(3, "quantize{scheme=int8,observer=percentile}", "approximation", 0.0, 0.0, AFTER, metric=0.5, reverted=reason)
    for report in (Report("Model", lossy(step)), Report("Model", lossy(step)).full()):
        written = str(report).splitlines()
        assert all(len(line) <= 80 for line in written)
        assert all(line == line.rstrip() for line in written)


def test_pipe_gets_plain_text_and_terminal_gets_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = Report("Model on eager", fixed())
    show(report, report)
    assert capsys.readouterr().out == str(report) * 2
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    show(report)
    assert "\x1b[" in capsys.readouterr().out


def test_metric_has_column_only_where_there_is_one():
    assert repr(Report("Model", fixed())) == f"<Report of Model: {len(fixed().steps)} steps; print it to read them>"
    assert "metric" not in str(Report("Model", fixed()))
    assert lines(str(Report("Model", fixed(metric=0.5))))[1][-1] == "metric"
    assert lines(str(Report("Model", fixed(metric=0.5))))[3][-1] == "0.5"


@pytest.mark.parametrize(
    ("checks", "words"),
    [
        ("structural", "form and types were checked after every step, numbers were not"),
        ("off", "nothing was checked"),
    ],
)
def test_a_report_says_what_was_checked(checks, words):
    assert words in " ".join(str(Report("Model", fixed(checks))).split())


def test_report_of_pipeline_shows_what_its_passes_did(history):
    text = str(Report("FeedForward on eager", history))
    assert "drop-dropout" in text and "rewrote 1 of" in text and "skipped 1:" in text
    assert "scale-weights{factor=0.5}" in text


def test_a_report_prints_on_a_console_as_it_reads(history):
    report = Report("FeedForward on eager", history)
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(report)
    assert [line.rstrip() for line in captured.get().splitlines()] == str(report).splitlines()


def test_brackets_in_options_and_reasons_are_no_markup():
    history = fixed()
    spelling = "low-rank{red=[red],x=[/b]}"
    skips = (Skip("n", "'n'", "the sizes [bold] differ"),)
    history.record(Step(3, spelling, "rewrite", 0.0, 0.0, AFTER, rewritten=1, skipped=skips), "c\n")
    text = " ".join(str(Report("Model[int]", history)).split())
    assert spelling in text
    assert "the sizes [bold] differ" in text
    assert "Model[int]" in text


def test_brackets_in_notes_are_no_markup():
    history = fixed()
    history.steps[0] = Step(0, "capture", "capture", 1.0, 0.0, history.steps[0].size, notes=("tried [batch]: x[/y]",))
    assert "tried [batch]: x[/y]" in str(Report("Model", history))
