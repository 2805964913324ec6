"""Tests of lissom.inspect.catalogue."""

from __future__ import annotations

import pytest

from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.inspect.catalogue import GROUPS, OTHER, example_of, first_line, grouped, option_rows, pass_page, passes_table
from lissom.inspect.tables import plain
from lissom.passes import PASSES, RECIPES
from lissom.passes.parallel.shard import Shard
from lissom.passes.prune.prune_heads import PruneHeads
from tests.compiler.pipeline.test_spelling import ManyOptions


def test_every_pass_and_recipe_is_listed():
    text = plain(passes_table(PASSES, RECIPES))
    assert all(name in text for name in [*PASSES, *RECIPES])
    assert all(first_line(item).split()[0] in text for item in PASSES.values())
    assert all(len(line) <= 80 for line in text.splitlines())


def test_every_pass_is_in_a_group_others_apart():
    found = grouped(PASSES | {"many-options": ManyOptions})
    assert found.pop(OTHER) == {"many-options": ManyOptions}
    assert list(found) == [title for title in GROUPS if title in found]
    assert sorted(name for members in found.values() for name in members) == sorted(PASSES)


def test_lossy_passes_come_first_and_are_marked():
    assert next(iter(grouped(PASSES)["Quantization"])) == "quantize"
    text = plain(passes_table(PASSES, RECIPES))
    assert "prune-heads *" in text and "merge-equal-heads *" not in text


def test_page_has_summary_options_and_example():
    shown = " ".join(plain(pass_page(PruneHeads)).split())
    assert shown.startswith(f"prune-heads: {first_line(PruneHeads)} lossy: outputs change")
    assert "requires that weights of linear layers are floating point" in shown
    assert "keep a number or none none" in shown
    assert shown.endswith("Example: lissom compile minilm --passes 'prune-heads{keep=0.75}'")


def test_page_of_pass_without_options_has_no_table():
    shown = plain(pass_page(PASSES["remove-no-ops"]))
    assert "exact: outputs stay equal" in shown and "default" not in shown


def test_defaults_are_pipeline_text_and_meanings_span_lines():
    rows = {name: (takes, default, meaning) for name, takes, default, meaning in option_rows(Shard)}
    assert rows["plan"][:2] == ("a list [a,b] of which each is a word", "[]")
    assert rows["sequence"][1] == "false"
    assert rows["plan"][2].startswith("exceptions, ") and len(rows["plan"][2].split()) > 30
    assert ("criterion", "one of l1, l2, taylor") in [row[:2] for row in option_rows(ManyOptions)]


@pytest.mark.parametrize("name", PASSES)
def test_an_example_is_a_pipeline_that_holds_the_pass(name):
    assert name in [item.name() for item in parse_pipeline(example_of(name), PASSES)]


def test_a_first_line_is_that_of_the_docstring():
    assert first_line(ManyOptions) == "Takes an option of every type."
    assert first_line(object.__init_subclass__).startswith("This method is called when a class is subclassed")
