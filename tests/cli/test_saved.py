"""Tests of the commands that save, run, show and time artifacts."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lissom
from lissom.cli.main import app
from lissom.errors import ArtifactError, InputError
from tests.frontends.models.test_huggingface import directory  # noqa: F401
from tests.support.saving import compiled

runner = CliRunner()


def invoke(*arguments: object) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def failure(*arguments: object) -> BaseException | None:
    return runner.invoke(app, [str(argument) for argument in arguments]).exception


@pytest.fixture
def saved(tmp_path):
    compiled("bert").save(tmp_path / "artifact")
    return tmp_path / "artifact"


def test_compile_saves(directory, tmp_path):  # noqa: F811
    shown = invoke("compile", directory, "--checks", "off", "--save", tmp_path / "artifact")
    assert "BertModel on eager" in shown
    assert lissom.load(tmp_path / "artifact").program.name == "BertModel"


def test_unwritable_place_is_refused_before_the_model_is_read(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    error = failure("compile", "no-such-model", "--save", tmp_path / "mine")
    assert isinstance(error, ArtifactError)
    assert "exists and is not an artifact" in str(error)


def test_run_answers_from_a_file_to_a_file(saved, tmp_path):
    ids = np.arange(8).reshape(2, 4)
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    shown = invoke("run", saved, "--input", tmp_path / "data.npz", "--output", tmp_path / "out.npz")
    assert shown == "last_hidden_state: f32[2, 4, 16]\npooler_output: f32[2, 16]\n"
    wanted = lissom.load(saved)(input_ids=torch.from_numpy(ids), attention_mask=torch.ones(2, 4, dtype=torch.long))
    with np.load(tmp_path / "out.npz") as arrays:
        assert np.array_equal(arrays["last_hidden_state"], wanted.last_hidden_state.numpy())


def test_run_refuses_what_does_not_fit(saved, tmp_path):
    np.savez(tmp_path / "data.npz", input_ids=np.ones((1, 3), np.float32), attention_mask=np.ones((1, 3), np.int64))
    error = failure("run", saved, "--input", tmp_path / "data.npz")
    assert isinstance(error, InputError)
    assert str(error).startswith("argument 'input_ids' is f32[1, 3]; the program takes i64[batch, sequence]")
    assert isinstance(failure("run", tmp_path, "--input", tmp_path / "data.npz"), ArtifactError)


def test_show_prints_what_is_saved(saved):
    assert invoke("show", saved) == lissom.load(saved).program.text()
    assert "attention" in invoke("show", "structure", saved)
    assert invoke("show", "diff", saved, "0", "0") == "the two steps are the same program\n"


def test_bench_times_what_is_saved(saved):
    shown = " ".join(invoke("bench", saved, "--shapes", "1x4,2x8", "--seconds", "0").split())
    assert "BertModel on eager, loaded in" in shown
    assert "batch 1, sequence 4" in shown and "batch 2, sequence 8" in shown
    assert "0.0e+00" in shown


@pytest.mark.parametrize(
    "arguments", [("show", "--passes", "remove-no-ops"), ("bench", "--engines", "eager"), ("bench", "--profile")]
)
def test_options_that_need_model_do_not_go_with_artifact(saved, arguments):
    result = runner.invoke(app, [arguments[0], str(saved), *arguments[1:]], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "saved" in result.output
