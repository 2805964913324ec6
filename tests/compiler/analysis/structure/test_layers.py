"""Layers told from module paths."""

from lissom.compiler.analysis.structure.layers import in_order, layer_paths


def test_a_layer_is_the_deepest_numbered_path_with_both_kinds_of_site():
    attention, feed_forward = layer_paths(
        ["encoder.block.0.layer.0.SelfAttention"], ["encoder.block.0.layer.1.DenseReluDense.wo"]
    )
    assert attention == feed_forward == ["encoder.block.0"]


def test_a_site_alone_has_its_deepest_numbered_path():
    assert layer_paths(["decoder.layers.3.encoder_attn"], []) == (["decoder.layers.3"], [])


def test_a_site_without_numbers_has_its_path():
    assert layer_paths([], ["mlp.down"]) == ([], ["mlp.down"])


def test_layers_sort_as_numbers():
    assert sorted(["h.10", "h.2", "h.1"], key=in_order) == ["h.1", "h.2", "h.10"]
