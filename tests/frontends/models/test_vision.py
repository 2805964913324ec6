"""Tests of lissom.frontends.models.vision: transformers of timm and torchvision, by name."""

import sys

import pytest
import torch

import lissom
from lissom.errors import ArtifactError, CaptureError, UnsupportedError
from lissom.frontends.models import sources, vision
from lissom.ops import fused_attention, merged_attention
from tests.support.models import seeded

ATTENTION = (torch.ops.aten.scaled_dot_product_attention.default, fused_attention, merged_attention)


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision", reason="torchvision is not installed")


@pytest.fixture
def shallow(timm, monkeypatch):
    """timm makes its models two blocks deep, for time."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **options, depth=2))


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 224), ("vit_base_patch16_384", 384)])
def test_pictures_have_the_size_of_timm_s_configuration(shallow, name, size):
    model, pictures = vision.load_timm(name)
    assert pictures.shape == (2, 3, size, size)
    assert not model.training


def test_a_transformer_of_timm_compiles(shallow):
    found = sources.load("timm:vit_tiny_patch16_224")
    fast = lissom.compile(found.model, found.example_inputs, checks="structural")
    assert len(fast.program.nodes(*ATTENTION)) == 2
    assert fast.program.signature.describe() == "(x: f32[batch, 3, 224, 224])"
    assert found.notes == ("random weights; example inputs: random pictures, 2 x 3 x 224 x 224",)
    one = found.example_inputs[:1]
    with torch.no_grad():
        # The same operators in float32 on other strides: sums of at most 768 terms, unit roundoff 6e-8.
        torch.testing.assert_close(fast(one), found.model(one), rtol=1e-4, atol=1e-5)


def test_random_weights_are_the_same_each_time(shallow):
    before = torch.get_rng_state()
    first, again = (sources.load("timm:vit_tiny_patch16_224").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_transformer_of_torchvision_compiles(torchvision, monkeypatch):
    models = torchvision.models
    small = seeded(lambda: models.VisionTransformer(224, 16, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64))
    monkeypatch.setattr(models, "get_model", lambda name, weights: small)
    found = sources.load("torchvision:vit_b_16")
    fast = lissom.compile(found.model, found.example_inputs, checks="structural")
    assert fast.program.nodes(*ATTENTION)
    one = found.example_inputs[:1]
    with torch.no_grad():
        # The same operators in float32 on other strides: sums of at most 768 terms, unit roundoff 6e-8.
        torch.testing.assert_close(fast(one), small(one), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_whole_model_of_torchvision_compiles(torchvision):
    found = sources.load("torchvision:vit_b_16")
    fast = lissom.compile(found.model, found.example_inputs)
    assert len(fast.program.nodes(*ATTENTION)) == 12


def test_pictures_have_the_size_of_torchvision_s_weights(torchvision):
    models = torchvision.models
    assert vision._crop_size(models.get_model_weights("vit_b_16")) == (224, 224)
    assert vision._crop_size(models.get_model_weights("swin_v2_t")) == (256, 256)
    assert vision._crop_size([]) == (224, 224)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch16_225", "timm has no model 'vit_tiny_patch16_225'; did you mean 'vit_tiny_patch16_224'?"),
        ("timm:zzzzz", "timm has no model 'zzzzz'; timm.list_models() lists what it has"),
    ],
)
def test_a_name_timm_does_not_know_is_refused(timm, name, message):
    with pytest.raises(ArtifactError) as caught:
        sources.load(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:vit_b_17", "torchvision has no model 'vit_b_17'; did you mean 'vit_b_16'?"),
        ("torchvision:zzzzz", "torchvision has no model 'zzzzz'; torchvision.models.list_models() lists what it has"),
    ],
)
def test_a_name_torchvision_does_not_know_is_refused(torchvision, name, message):
    with pytest.raises(ArtifactError) as caught:
        sources.load(name)
    assert str(caught.value) == message


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnsupportedError) as caught:
        sources.load(f"{library}:vit")
    assert str(caught.value) == f"models of {library} need {library}: pip install 'lissom[vision]'"


def test_a_tag_timm_does_not_know_is_refused(timm):
    with pytest.raises(ArtifactError) as caught:
        sources.load("timm:vit_tiny_patch16_224.nonsense")
    assert str(caught.value) == (
        "timm has no weights 'nonsense' for the model 'vit_tiny_patch16_224'; leave the tag out, weights are random here: "
        "timm:vit_tiny_patch16_224"
    )


def test_detectors_and_segmentation_models_are_made_without_the_network(torchvision, monkeypatch):
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("weights were fetched"))
    for name in ("ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        assert sources.load(f"torchvision:{name}").example_inputs.shape == (2, 3, 224, 224)


@pytest.mark.slow
def test_a_detector_is_refused_in_a_sentence(torchvision):
    found = sources.load("torchvision:ssdlite320_mobilenet_v3_large")
    with pytest.raises(CaptureError, match=r"SSD cannot be captured: .* decides on the values of a tensor"):
        lissom.optimize(found.model, found.example_inputs, dynamic=False)
