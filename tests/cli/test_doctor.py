"""Tests of `lissom doctor`."""

import pytest
from typer.testing import CliRunner

from lissom.cli.doctor import Requirement, faults_by_extra, parse_requirement
from lissom.cli.main import app
from lissom.ops.native import describe_kernels, instruction_sets
from lissom.version import __version__


def test_what_is_there_is_listed_plainly():
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 0, found.output
    shown = " ".join(found.stdout.split())
    assert all(
        part in shown for part in (f"lissom {__version__}", describe_kernels(), "backend eager ready", "extra demo installed")
    )
    assert shown.endswith("everything that Lissom needs is there")
    assert "\x1b" not in found.stdout and all(line == line.rstrip() for line in found.stdout.splitlines())


def test_instruction_set_that_is_not_there_is_error(monkeypatch):
    from lissom.ops import native

    monkeypatch.setenv(instruction_sets.SWITCH, "sparc")
    native.load_kernels.cache_clear()
    found = CliRunner().invoke(app, ["doctor"])
    native.load_kernels.cache_clear()
    assert found.exit_code == 1
    assert "LISSOM_NATIVE_ISA=sparc names no instruction set" in " ".join(found.stdout.split())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("numpy>=1.26", Requirement("numpy", "1.26", "")),
        ('onnx2fx<0.1,>=0.0.1; extra == "from-onnx"', Requirement("onnx2fx", "0.0.1", "from-onnx")),
        ('torchvision; extra == "vision"', Requirement("torchvision", "0", "vision")),
        ('lissom[demo,sign]; extra == "all"', Requirement("lissom", "0", "all", ("demo", "sign"))),
    ],
)
def test_requirements_are_read(text, found):
    assert parse_requirement(text) == found


def test_missing_and_old_packages_are_named_with_their_extras():
    texts = (
        'no-such-package>=1; extra == "sign"',
        'numpy>=99; extra == "demo"',
        'lissom[demo,sign]; extra == "all"',
        "torch>=2.11",
    )
    found = faults_by_extra([parse_requirement(text) for text in texts])
    assert found["sign"] == ["no-such-package"] and found[""] == []
    assert [fault.startswith("numpy ") and fault.endswith("must be 99 or newer") for fault in found["demo"]] == [True]
    assert found["all"] == found["sign"] + found["demo"] or found["all"] == found["demo"] + found["sign"]
