"""Tests of lissom.frontends.onnx.operators: what we convert gives what the node tests of the ONNX standard ask for."""

import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch

from lissom.errors import UnsupportedError
from lissom.frontends.onnx.model import from_onnx
from lissom.frontends.onnx.operators import TABLE, WRONG

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'lissom[from-onnx]'")
pytest.importorskip("onnx2fx", reason="onnx2fx is not installed: pip install 'lissom[from-onnx]'")

DTYPES = {"float16", "float32", "float64", "int32", "int64", "bool", "uint8", "int8"}
"""What NumPy and PyTorch both have."""


@pytest.fixture(scope="module")
def cases():
    """The node tests of each operator that have a single node."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        # Some references divide by zero on purpose.
        warnings.simplefilter("ignore", RuntimeWarning)
        tests = load_model_tests(kind="node")
    found = defaultdict(list)
    for test in tests:
        if test.model is not None and test.data_sets and len(test.model.graph.node) == 1:
            found[test.model.graph.node[0].op_type].append(test)
    return found


def usable(test) -> bool:
    arrays = [*test.data_sets[0][0], *test.data_sets[0][1]]
    return all(getattr(array, "dtype", None) is not None and array.dtype.name in DTYPES for array in arrays)


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"Linear"}))
def test_an_operator_gives_what_the_standard_asks_for(cases, name, tmp_path):
    ran = 0
    for test in filter(usable, cases[name]):
        path = tmp_path / f"{test.name}.onnx"
        onnx.save(test.model, path)
        try:
            module = from_onnx(path)
        except UnsupportedError:
            continue  # an output or an attribute we do not have is refused, which is no wrong number
        given, wanted = ([torch.from_numpy(np.array(array)) for array in arrays] for arrays in test.data_sets[0])
        found = module(*given)
        # The tests' own tolerance; float16 rounds sums of up to 64 terms, in an order the standard does not fix.
        atol = 2e-3 if any(item.dtype is torch.float16 for item in wanted) else 1e-6
        outputs = [found] if isinstance(found, torch.Tensor) else list(found)
        torch.testing.assert_close(outputs, wanted, rtol=test.rtol, atol=atol, equal_nan=True, msg=test.name)
        ran += 1
    assert ran


@pytest.mark.parametrize("name", sorted(set(WRONG) - set(TABLE) - {"Bernoulli", "Upsample"}))
def test_an_operator_known_to_be_wrong_is_refused(cases, name, tmp_path):
    newest = max(cases[name], key=lambda test: test.model.opset_import[0].version)
    path = tmp_path / f"{newest.name}.onnx"
    onnx.save(newest.model, path)
    with pytest.raises(UnsupportedError, match=f"there is no correct conversion of {name} "):
        from_onnx(path)


@pytest.mark.parametrize(
    ("name", "test"),
    [("BatchNormalization", "test_batchnorm_example_training_mode"), ("Dropout", "test_training_dropout")],
)
def test_an_operator_in_training_mode_is_refused(cases, name, test, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(next(item.model for item in cases[name] if item.name == test), path)
    with pytest.raises(UnsupportedError, match=f"is a {name} in training mode; export the model again in evaluation mode"):
        from_onnx(path)


def test_swish_takes_its_factor(tmp_path):
    path, x = tmp_path / "model.onnx", torch.linspace(-2, 2, 5)
    onnx.save(
        onnx.parser.parse_model("""
            <ir_version: 11, opset_import: ["" : 24]>
            graph (float[5] x) => (float[5] y) { y = Swish <alpha: float = 0.5> (x) }"""),
        path,
    )
    torch.testing.assert_close(from_onnx(path)(x), x * torch.sigmoid(0.5 * x))
