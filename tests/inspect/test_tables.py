"""Tests of lissom.inspect.tables."""

import pytest
from rich.console import Console

from lissom.compiler.ir.editor import Skip
from lissom.compiler.pipeline.history import History, Size, Step
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.inspect.tables import Report, coloured_diff, first_line, passes_table, plain
from lissom.passes import PASSES, RECIPES
from tests.compiler.passes import DropDropout, ScaleWeights
from tests.compiler.pipeline.test_spelling import ManyOptions
from tests.models import capture_of, normal


@pytest.fixture(scope="module")
def history():
    found = capture_of("feed_forward")
    score = lambda program: float(program.run([normal(2, 5, 8)])[0].square().mean())  # noqa: E731
    return Pipeline([DropDropout(), ScaleWeights(factor=0.5)], samples=[found.example], metric=score).run(found.program)[1]


def fixed(checks: str = "numeric", metric: float | None = None) -> History:
    """A history with numbers of its own."""
    history = History("some-pass", checks)
    before, after = Size(10, 1_000_000, 4_000_000, 2_000_000_000), Size(8, 1_000_000, 4_000_000, 1_500_000_000)
    history.record(Step(0, "capture", "capture", 1.0, 0.0, before, metric=metric, notes=("dynamic: batch",)), "a\n")
    skips = (Skip("n", "'n'", "it is odd"),)
    step = Step(1, "some-pass", "rewrite", 0.25, 0.25, after, 1, 3, 2, skips, 1.25e-7, 1.0, metric)
    history.record(step, "b\n")
    return history


REPORT = """\
Model on eager
 # pass      what it did                                s nodes MB GFLOP error
─────────────────────────────────────────────────────────────────────────────────
 0 capture                                           1.00    10  4     2
 1 some-pass rewrote 2 of 3; skipped 1: it is odd    0.50     8      1.5 1e-07
"""


CAPTION = "dynamic: batch checks: numeric (every exact step ran beside the one before and gave equal outputs); 1.5 s in all"


def lines(text: str) -> list[list[str]]:
    """The words of each line; the widths of columns are rich's business."""
    return [line.split() for line in text.splitlines() if set(line) - set("─ ")]


def test_a_report_reads_as_a_table():
    found = lines(str(Report("Model on eager", fixed())))
    assert found[:4] == lines(REPORT)
    assert " ".join(word for line in found[4:] for word in line) == CAPTION


def test_a_metric_has_a_column_only_where_there_is_one():
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
    assert words in str(Report("Model", fixed(checks)))


def test_a_report_of_a_pipeline_shows_every_step(history):
    text = str(Report("FeedForward on eager", history))
    assert "rewrote 1 of 2; skipped 1: a norm is no dropout" in text
    assert "scale-weights{factor=0.5}" in text


def test_a_report_prints_on_a_console_as_it_reads(history):
    report = Report("FeedForward on eager", history)
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        console.print(report)
    assert captured.get() == str(report)


def test_brackets_in_options_and_reasons_are_no_markup():
    history = fixed()
    spelling = "low-rank{layers=[red],names=[/b]}"
    skips = (Skip("n", "'n'", "the sizes [bold] differ"),)
    history.record(Step(2, spelling, "rewrite", 0.0, 0.0, history.steps[0].size, skipped=skips), "c\n")
    text = str(Report("Model[int]", history))
    assert "low-rank{layers=[red],names=[/b]}" in text
    assert "the sizes [bold] differ" in text
    assert "Model[int]" in text


def test_brackets_in_notes_are_no_markup():
    history = fixed()
    history.steps[0] = Step(0, "capture", "capture", 1.0, 0.0, history.steps[0].size, notes=("tried [batch]: x[/y]",))
    assert "tried [batch]: x[/y]" in str(Report("Model", history))


def test_passes_are_listed_with_kind_options_and_first_line():
    text = plain(passes_table({"many-options": ManyOptions}, {}))
    assert "many-options" in text
    assert "rewrite" in text
    assert "criterion=one of l1, l2, taylor" in text
    assert "Takes an option of every type." in text


def test_every_pass_and_recipe_is_listed():
    text = plain(passes_table(PASSES, RECIPES))
    assert all(name in text for name in [*PASSES, *RECIPES])
    assert all(first_line(item).split()[0] in text for item in PASSES.values())


def test_a_list_option_is_listed_with_its_brackets():
    assert "layers=a list [a,b]" in plain(passes_table({"many-options": ManyOptions}, {}))


def test_a_first_line_is_that_of_the_docstring():
    assert first_line(ManyOptions) == "Takes an option of every type."
    assert first_line(object.__init_subclass__).startswith("This method is called when a class is subclassed")


def test_a_diff_is_coloured_by_its_signs():
    text = coloured_diff("@@ -1 +1 @@\n-[old]\n+[new]\n same\n")
    assert text.plain == "@@ -1 +1 @@\n-[old]\n+[new]\n same\n"
    assert [str(span.style) for span in text.spans] == ["cyan", "red", "green"]
