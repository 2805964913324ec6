"""Tests of `lissom tune`."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

import lissom
from lissom.cli.main import app
from lissom.errors import ArtifactError, LissomError, UnsupportedError
from tests.frontends.models.test_huggingface import directory  # noqa: F401


def run(*arguments):
    found = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    if isinstance(found.exception, LissomError):
        raise found.exception
    return found


@pytest.fixture
def arrays(tmp_path):
    path = tmp_path / "data.npz"
    ones = np.ones((2, 5), dtype=np.int64)
    np.savez(path, input_ids=ones, attention_mask=ones, token_type_ids=0 * ones)
    return path


@pytest.mark.slow
def test_a_search_is_printed_kept_saved_and_shown(directory, arrays, tmp_path):  # noqa: F811
    store, saved, plot = tmp_path / "store", tmp_path / "saved", tmp_path / "frontier.svg"
    options = ["--goal", "memory", "--max-drop", "20%", "--minutes", 0.2, "--no-distill"]
    found = run(directory, "--data", arrays, *options, "--store", store, "--save", saved, "--plot", plot)
    assert found.exit_code == 0, found.output
    assert "smaller" in found.stdout
    assert "chosen" in found.stdout
    assert plot.read_text().lstrip().startswith("<?xml")
    assert lissom.load(saved).program.parameter_count > 0
    shown = run("--show", store)
    assert shown.exit_code == 0
    assert "chosen" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["minilm"], "tune needs --data"),
        ([], "give a model, or --show with a store"),
        (["minilm", "--show", "."], "--show takes a store, and no model"),
    ],
)
def test_missing_arguments_are_named(arguments, sentence):
    found = run(*arguments)
    assert found.exit_code == 2
    assert sentence in " ".join(found.output.split())


def test_bad_values_are_refused(arrays, tmp_path):
    with pytest.raises(UnsupportedError, match="--max-drop is 'much'"):
        run("minilm", "--data", arrays, "--max-drop", "much")
    with pytest.raises(UnsupportedError, match="--max-drop is '-1%'"):
        run("minilm", "--data", arrays, "--max-drop=-1%")
    with pytest.raises(ArtifactError, match="does not exist"):
        run("minilm", "--data", tmp_path / "none.txt")
    with pytest.raises(ArtifactError, match=r"holds no records\.jsonl"):
        run("--show", tmp_path)


def test_picture_that_cannot_be_drawn_is_refused_before_search(arrays, tmp_path):
    with pytest.raises(UnsupportedError, match="'frontier' ends in no format of a picture; give one of"):
        run("minilm", "--data", arrays, "--plot", tmp_path / "frontier")
