"""Tests of lissom.cli.calibration_files: `--data`, `--metric` and `--max-drop`, on the command line and by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lissom.cli.calibration_files import make_metric, read_data, read_texts
from lissom.cli.main import app
from lissom.errors import ArtifactError, BudgetError, LissomError, UnsupportedError
from lissom.frontends.models.sources import Source, load
from tests.frontends.models.test_huggingface import directory  # noqa: F401


class Doubled(nn.Module):
    """Doubles its argument; the keyword is a flag."""

    def forward(self, x: torch.Tensor, flag: bool = True) -> torch.Tensor:
        return 2 * x if flag else x


@pytest.fixture
def source() -> Source:
    return Source(Doubled(), {"x": torch.ones(2, 3), "flag": True})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"sentence number {index}" for index in range(10)) + "\n\n")
    return path


def test_texts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\n\ntwo\n")
    assert read_texts(file) == ["one", "two"]


def test_a_file_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read as text"):
        read_texts(tmp_path)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ArtifactError, match="holds no text; give one text per line"):
        read_texts(tmp_path / "empty")


def test_arrays_are_batches_with_the_flags_of_the_example(tmp_path: Path, source: Source) -> None:
    for index in (1, 0):
        np.savez(tmp_path / f"{index}.npz", x=np.full((2, 3), index, np.float32))
    found = read_data(tmp_path, source)
    assert [float(batch["x"].mean()) for batch in found] == [0.0, 1.0]  # pyright: ignore
    assert [batch["flag"] for batch in found] == [True, True]
    assert len(read_data(tmp_path / "1.npz", source)) == 1


def test_texts_are_batches_by_the_tokenizer(texts: Path, directory) -> None:  # noqa: F811
    found = read_data(texts, load(str(directory)))
    assert [batch["input_ids"].shape[0] for batch in found] == [8, 2]  # pyright: ignore
    lines = texts.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"text": line} if index else line) + "\n" for index, line in enumerate(["one", "two"])))
    (batch,) = read_data(lines, load(str(directory)))
    assert batch["attention_mask"].tolist() == [[1, 1, 1]] * 2  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("data.npz", b"no zip", ArtifactError, "cannot be read as arrays"),
        ("data.csv", b"1,2", ArtifactError, "is not a file of calibration data; give an .npz file"),
        ("data.jsonl", b"{", ArtifactError, "line 1 is not JSON"),
        ("data.jsonl", b"[" * 100_000, ArtifactError, "line 1 is not JSON"),
        ("data.jsonl", b'{"body": 1}', ArtifactError, "line 1 holds no text"),
        ("data.txt", b"\n\n", ArtifactError, "holds no text; give one text per line"),
        ("data.txt", b"one", UnsupportedError, "holds texts, and the model has no tokenizer"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(
    name: str, content: bytes, kind: type[LissomError], message: str, tmp_path: Path, source: Source
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        read_data(tmp_path / name, source)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_without_arrays_is_refused(tmp_path: Path, source: Source) -> None:
    with pytest.raises(ArtifactError, match=r"holds no \.npz file"):
        read_data(tmp_path, source)


def test_cosine_compares_with_the_original_on_the_data(source: Source) -> None:
    data = [{"x": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}]
    cosine = make_metric("cosine", source, data)
    assert cosine(lambda x: 5 * x) == pytest.approx(1.0)  # pyright: ignore
    assert cosine(lambda x: torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5)  # pyright: ignore


def test_padding_counts_for_nothing() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return x

    x, mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[1, 0]])
    source = Source(Masked(), {"x": x, "attention_mask": mask})
    wrong_at_padding = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    for name in ("cosine", "agreement"):
        assert make_metric(name, source, [])(lambda x, attention_mask: wrong_at_padding) == pytest.approx(1.0)  # pyright: ignore


def test_agreement_counts_equal_largest_logits(source: Source) -> None:
    data = [{"x": torch.eye(4)}]
    found = make_metric("agreement", source, data)(lambda x: torch.eye(4)[[0, 1, 2, 2]])  # pyright: ignore
    assert found == pytest.approx(0.75)


def test_a_metric_may_be_a_function_of_a_module(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text("def mine(model):\n    return 3.0\n\nvalue = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [item for item in __import__("sys").path if item])
    assert make_metric("my_scores:mine", source, [])(source.model) == 3.0  # pyright: ignore
    for name, message in (
        ("my_scores:value", "is a int; give a function"),
        ("my_scores:none", "cannot be imported"),
        ("no_such:mine", "cannot be imported"),
        ("cosin", "there is no metric 'cosin'; did you mean 'cosine'\\? choose cosine, agreement, or write module:function"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            make_metric(name, source, [])


@pytest.mark.slow
def test_command_line_calibrates_measures_and_stops_at_budget(texts: Path, directory) -> None:  # noqa: F811
    runner = CliRunner()
    command = ["compile", str(directory), "--data", str(texts), "--metric", "cosine", "--passes"]
    shown = runner.invoke(app, [*command, "quantize{scheme=int8-static}", "--max-drop", "0.5"])
    assert shown.exit_code == 0, shown.output
    assert "metric 1 → " in " ".join(shown.stdout.split())
    refused = runner.invoke(app, [*command, "prune-neurons{keep=0.1}", "--max-drop", "0"]).exception
    assert isinstance(refused, BudgetError)
