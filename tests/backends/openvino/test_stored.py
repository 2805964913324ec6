"""Tests of lissom.backends.openvino.stored: the IR of an artifact is that of its program, or is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lissom.backends.openvino.backend import BIN, XML, OpenVino
from lissom.errors import ArtifactError, InputError
from tests.support.models import capture_of, normal

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lissom[openvino]'")

BACKEND = OpenVino()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A feed-forward, and the folder its network was saved to."""
    found, folder = capture_of("feed_forward"), tmp_path_factory.mktemp("plain")
    BACKEND.save_files(BACKEND.build(found.program, found.example), folder)
    return found, folder


def refusal(saved, target: Path, change: Callable[[str], str]) -> str:
    """What is said of the saved model with a change made to its XML."""
    found, folder = saved
    shutil.copytree(folder, target)
    text = (target / XML).read_text()
    changed = change(text)
    assert changed != text
    (target / XML).write_text(changed)
    with pytest.raises(ArtifactError) as caught:
        BACKEND.load_executable(found.program, target)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CHANGES: dict[str, tuple[Callable[[str], str], str]] = {
    "entities": (
        lambda text: text.replace("<net ", '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa">]><net ', 1),
        "declares a document type",
    ),
    "no XML": (lambda text: text[: len(text) // 2], "is not XML: "),
    "another root": (lambda text: text.replace("<net ", "<nets ").replace("</net>", "</nets>"), "is not OpenVINO's IR"),
    "another section": (lambda text: text.replace("</net>", "<scripts/></net>"), "is not OpenVINO's IR"),
    "extension": (
        lambda text: text.replace('type="MatMul" version="opset1"', 'type="Exec" version="acme"', 1),
        "holds the operator acme.Exec in '",
    ),
    "unknown operator": (lambda text: text.replace('type="MatMul"', 'type="MatMull"', 1), "does not open: RuntimeError: "),
    "weights beyond their file": (
        lambda text: re.sub(r'offset="\d+"', 'offset="1000000000"', text, count=1),
        " bytes from 1000000000 of model.bin for '",
    ),
    "negative offset": (lambda text: re.sub(r'offset="\d+"', 'offset="-64"', text, count=1), " bytes from -64 of model.bin"),
    "no offset": (lambda text: re.sub(r'offset="\d+"', 'offset="all"', text, count=1), " bytes from -1 of model.bin"),
    "more than the shape": (lambda text: re.sub(r'size="\d+"', 'size="4"', text, count=1), "does not open: RuntimeError: "),
    "another input": (lambda text: text.replace('names="x"', 'names="z"'), "has the input z: f32[?,?,8], and the program x: "),
    "another output": (
        lambda text: text.replace('output_names="output"', 'output_names="other"').replace('names="output"', 'names="other"'),
        "has the output other: f32[?,?,8], and the program output: torch.float32 of 3 dimensions",
    ),
    "groups": (
        lambda text: re.sub(r'(<DYNAMIC_QUANTIZATION_GROUP_SIZE value=)"0"', r'\1"64"', text),
        "quantizes activations in groups of 64, not 32",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_files_are_refused(saved, tmp_path, name):
    change, said = CHANGES[name]
    found = refusal(saved, tmp_path / "m", change)
    assert said in found and found.endswith("; compile the model again")


def test_a_state_of_another_size_is_refused(tmp_path_factory, tmp_path):
    """The memory of a state has the size the program says, so a model that reads more of it must not run."""
    found, folder = capture_of("counter"), tmp_path_factory.mktemp("counter")
    BACKEND.save_files(BACKEND.build(found.program, found.example), folder)
    seen = re.compile(r'(name="past_seen" type="Parameter" version="opset1">\s*<data shape=)"[^"]*"')
    said = refusal((found, folder), tmp_path / "m", lambda text: seen.sub(r'\1"1000"', text))
    assert "compile the model again" in said


def test_weights_that_are_cut_or_missing_are_refused(saved, tmp_path):
    found, folder = saved
    shutil.copytree(folder, tmp_path / "m")
    data = (tmp_path / "m" / BIN).read_bytes()
    (tmp_path / "m" / BIN).write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"bytes from \d+ of model.bin for '"):
        BACKEND.load_executable(found.program, tmp_path / "m")
    (tmp_path / "m" / BIN).unlink()
    with pytest.raises(ArtifactError, match=r"cannot be read"):
        BACKEND.load_executable(found.program, tmp_path / "m")


@pytest.mark.parametrize("threads", [0, 10**9, "2", True, 1.5])
def test_saved_threads_out_of_range_are_refused(threads):
    with pytest.raises(ValueError, match="threads is "):
        OpenVino(threads=threads).native_code(saved_options=True)
    assert OpenVino(threads=2).native_code(saved_options=True) is None


def test_it_runs_when_nothing_is_changed(saved):
    found, folder = saved
    network = BACKEND.load_executable(found.program, folder)
    with torch.no_grad():
        wanted = found.program.run(found.example)[0]
    # Two products of float32 with sums of at most 12 terms, unit roundoff 6e-8.
    torch.testing.assert_close(network(found.example)[0], wanted, rtol=1e-5, atol=1e-6)


def test_inputs_whose_memory_would_be_misread_are_refused(saved):
    found, folder = saved
    network = BACKEND.load_executable(found.program, folder)
    (x,) = found.example
    for wrong in (x.int(), x.double(), x.half(), torch.empty_like(x, device="meta")):
        with pytest.raises(InputError) as caught:
            network([wrong])
        assert str(caught.value) == (
            f"input 'x' is {wrong.dtype} on {wrong.device}, and the model takes torch.float32 on cpu; convert it first"
        )
    for wrong in (x[0], x[..., :3]):
        with pytest.raises(RuntimeError):
            network([wrong])
    # A call that failed leaves the network as it was.
    assert network([x])[0].shape == found.program.run([x])[0].shape


def test_a_negated_view_is_read_as_its_numbers(saved):
    found, folder = saved
    network = BACKEND.load_executable(found.program, folder)
    x = torch.complex(normal(2, 5, 8), normal(2, 5, 8, seed=1)).conj().imag
    assert x.is_neg()
    assert torch.equal(network([x])[0], network([x.resolve_neg().clone()])[0])
