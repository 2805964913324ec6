"""Structure and axes as tables."""

from lissom.inspect.sites import axes_table, structure_tables
from lissom.inspect.tables import plain
from tests.compiler.analysis.axes.test_axes import canonical


def test_structure_names_layers_heads_masks_and_widths():
    shown = plain(structure_tables(canonical("llama")[0]))
    assert "model.layers.0-1 ×2  4/2 heads of 4  mask causal +" in shown
    assert "rotary" in shown and "gated silu, width" in shown
    assert "2 attention and 2 feed-forward sites" in shown


def test_axes_say_what_may_shrink_and_why_not():
    shown = " ".join(plain(axes_table(canonical("bert")[0])).split())
    assert "yes" in shown
    assert "no: an operator reads all of it at once" in shown or "no: an output of the program" in shown
