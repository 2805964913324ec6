"""Tests of lissom.cli.bench.report: what the tables say."""

import pytest

from lissom.cli.bench.report import about, comparison_table, cosine_text, failures, markdown_table, shapes_of
from lissom.cli.bench.worker import Failure, Measurement
from lissom.inspect.tables import plain


def record(engine: str, shape: str, milliseconds: float, cosine: float = 1.0, peak_mb: float = 100.0) -> Measurement:
    spread = 0.1 * milliseconds
    return Measurement(
        engine, shape, milliseconds, milliseconds - spread, milliseconds + spread, 9, cosine, 1.5, 500.0, peak_mb
    )


RECORDS = [
    record("eager", "1x32", 10.0),
    record("eager", "8x128", 100.0, peak_mb=300.0),
    record("lissom", "1x32", 2.0, 0.99996),
    Failure("lissom", "8x128", "it broke | there"),
    Failure("openvino", None, "needs openvino: pip install 'lissom[bench]'"),
]


def test_markdown_has_a_row_per_engine_with_bold_best():
    lines = markdown_table(RECORDS, 2).splitlines()
    assert lines[0] == "| engine | 1x32, ms | 8x128, ms | cosine | peak MB | first s |"
    assert lines[2] == "| PyTorch eager fp32 | 10 (9 to 11) | **100** (90 to 110) | 1 | 300 | 2.0 |"
    assert lines[3] == "| Lissom fp32 | **2** (1.8 to 2.2) | — | 0.99996 | 100 | 2.0 |"
    assert lines[4] == ""


def test_what_did_not_run_is_listed_with_the_reason():
    assert failures(RECORDS) == [
        "Lissom fp32 at 8x128 did not run: it broke | there",
        "OpenVINO fp32 did not run: needs openvino: pip install 'lissom[bench]'",
    ]
    assert markdown_table(RECORDS, 2).splitlines()[-1].startswith("- OpenVINO fp32 did not run: needs openvino")


def test_table_has_numbers_machine_and_what_did_not_run():
    shown = " ".join(plain(comparison_table("minilm", RECORDS, 2), 140).split())
    assert "minilm engine 1x32 8x128 cosine peak MB first s" in shown
    assert "PyTorch eager fp32 10 (9 to 11) 100 (90 to 110) 1 300 2.0" in shown
    assert "Lissom fp32 at 8x128 did not run: it broke | there" in shown


def test_the_table_without_any_records_is_a_table():
    assert "engine" in plain(comparison_table("minilm, interrupted; finished so far", [], 2))
    assert markdown_table([], 2).startswith("| engine | cosine |")


def test_threads_and_versions_of_what_ran_are_told():
    told = about([record("onnxruntime", "1x32", 1.0)], 2)
    assert ", 2 threads; Python " in told
    assert "torch " in told
    assert "openvino" not in told


def test_shapes_are_those_measured_in_their_order():
    assert shapes_of(RECORDS) == ["1x32", "8x128"]


@pytest.mark.parametrize(("value", "text"), [(1.0, "1"), (0.9976, "0.9976"), (0.999957, "0.99996"), (float("nan"), "nan")])
def test_a_cosine_has_five_decimals_at_most(value, text):
    assert cosine_text(value) == text
