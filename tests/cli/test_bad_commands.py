"""What is wrong on the command line is a sentence and an exit status, and never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lissom
from lissom.cli.bench.workload import parse_shapes
from lissom.cli.main import app
from lissom.errors import LissomError, UnsupportedError
from tests.support.refusals import Refusal, check, table

runner = CliRunner(env={"COLUMNS": "400", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model, a file that is none, and arrays that fit nothing."""
    folder = tmp_path_factory.mktemp("commands")
    lissom.compile(nn.Linear(4, 3), torch.zeros(2, 4)).save(folder / "model")
    (folder / "text.txt").write_text("no array")
    (folder / "empty").mkdir()
    return str(folder / "model")


# The exit status is 2 for what the command line itself refuses, and 1 for an error of ours.
COMMANDS: dict[str, tuple[str, int, str]] = {
    "no such command": ("optimise x", 2, "No such command 'optimise'"),
    "no such option": ("compile x --pases exact", 2, "No such option: --pases"),
    "no model": ("compile", 2, "Missing argument"),
    "compile nothing": ("compile nowhere", 1, "'nowhere' is neither a directory nor a packaged model"),
    "compile an empty folder": ("compile {folder}/empty", 1, "is empty; give a directory written by save_pretrained"),
    "compile a text": ("compile {folder}/text.txt", 1, "its name does not end in .onnx"),
    "compile an artifact": ("compile {model}", 1, "has no config.json"),
    "compile a zero byte name": ("compile timm:", 1, "timm"),
    "compile with unknown passes": ("compile nowhere --passes quantise", 1, "did you mean 'quantize'?"),
    "compile with no passes": ("compile nowhere --passes exact,,exact", 1, ""),
    "compile with an unknown backend": ("compile nowhere --backend egaer", 1, "did you mean 'eager'?"),
    "compile with unknown checks": ("compile nowhere --checks all", 1, "checks='all' is not known"),
    "compile for an unknown device": ("compile nowhere --device gpu", 1, "device 'gpu' is not known to PyTorch"),
    "compile for an absent device": ("compile nowhere --device cuda:99", 1, "is not on this machine"),
    "compile for ranks of text": ("compile nowhere --world-size two", 2, "Invalid value for '--world-size'"),
    "compile for one rank": (
        "compile nowhere --world-size 1 --backend distributed",
        1,
        "world_size= is 1; give the number of ranks",
    ),
    "compile for ranks of eager": ("compile nowhere --world-size 2", 1, "world_size=2 goes with backend='distributed'"),
    "compile into nothing": ("compile nowhere --text {folder}/no/file", 1, "there is no directory"),
    "compile into a folder": ("compile nowhere --text {folder}", 1, "it is a directory; name a file in it"),
    "compile history into nothing": ("compile nowhere --history {folder}/no/file", 1, "there is no directory"),
    "save into nothing": ("compile nowhere --save {folder}/no/model", 1, "there is no directory"),
    "save over a text": ("compile nowhere --save {folder}/text.txt", 1, "text.txt"),
    "torchvision unknown": ("compile torchvision:vit_b_61", 1, "torchvision"),
    "timm unknown": ("compile timm:vit_tinny", 1, "timm"),
    "run nothing": ("run nowhere --input x.npz", 1, "nowhere"),
    "run a folder": ("run {folder}/empty --input x.npz", 1, "empty"),
    "run without input": ("run {model}", 2, "Missing option '--input'"),
    "run no file": ("run {model} --input {folder}/none.npz", 1, "none.npz"),
    "run a text": ("run {model} --input {folder}/text.txt", 1, "text.txt"),
    "run on an unknown device": ("run {model} --input x.npz --device 1.5", 1, "device '1.5' is not known"),
    "run into nothing": ("run {model} --input x.npz --output {folder}/no/file", 1, "there is no directory"),
    "export nothing": ("export nowhere model.gguf", 1, "'nowhere' is neither a directory"),
    "export another format": ("export nowhere model.onnx", 2, "writes GGUF files, named something.gguf"),
    "export a plan into another file": ("export nowhere plan.txt --format tp-plan", 2, "parallelism, named something.json"),
    "export another file of AOTInductor": ("export nowhere model.pt --format pt2", 2, "AOTInductor, named something.pt2"),
    "export a package in a dtype": ("export nowhere model.pt2 --format pt2 --dtype f16", 2, "--dtype is for GGUF files"),
    "export a package into nothing": ("export nowhere {folder}/no/model.pt2 --format pt2", 1, "there is no directory"),
    "export into nothing": ("export nowhere {folder}/no/model.gguf", 1, "there is no directory"),
    "export in an unknown dtype": ("export nowhere model.gguf --dtype q4_0", 1, "dtype= is 'q4_0'; choose f32, f16, bf16"),
    "export in an unknown format": ("export nowhere model --format onnx", 2, "Invalid value for '--format'"),
    "export a checkpoint in a dtype": (
        "export nowhere {folder}/new --format compressed-tensors --dtype f16",
        2,
        "--dtype is for GGUF files",
    ),
    "export a checkpoint into a folder": ("export nowhere {folder} --format compressed-tensors", 1, "is not an artifact"),
    "export for GenAI in a dtype": ("export nowhere {folder}/new --format genai --dtype f16", 2, "--dtype is for GGUF files"),
    "export for GenAI into a folder": ("export nowhere {folder} --format genai", 1, "is not an artifact"),
    "generate nothing": ("generate nowhere hello", 1, "'nowhere' is neither a directory"),
    "generate without prompt": ("generate nowhere", 2, "Missing argument"),
    "generate no tokens": ("generate nowhere hello --max-new-tokens 0", 2, "Invalid value for '--max-new-tokens'"),
    "generate some tokens": ("generate nowhere hello --max-new-tokens some", 2, "Invalid value for '--max-new-tokens'"),
    "temperature below zero": ("generate nowhere hello --temperature -1", 2, "Invalid value for '--temperature'"),
    "temperature nan": ("generate nowhere hello --temperature nan", 2, "Invalid value for '--temperature'"),
    "temperature infinite": ("generate nowhere hello --temperature inf", 2, "inf is not a finite number"),
    "temperature text": ("generate nowhere hello --temperature warm", 2, "Invalid value for '--temperature'"),
    "seed huge": ("generate nowhere hello --seed 99999999999999999999", 2, "Invalid value for '--seed'"),
    "seed text": ("generate nowhere hello --seed one", 2, "Invalid value for '--seed'"),
    "show nothing": ("show nowhere", 1, "'nowhere' is neither a directory"),
    "show an artifact with passes": ("show {model} --passes funnel", 2, "do not go with a saved model"),
    "show a view that there is not": ("show costs {model}", 2, "No such command 'costs'"),
    "show a view of nothing": ("show cost", 2, "Missing argument"),
    "show an option of another view": ("show cost {model} --only encoder", 2, "No such option: --only"),
    "show errors of an artifact": ("show errors {model}", 1, "has no config.json"),
    "show times": (
        "show page {model} {folder}/a.html --heat time",
        2,
        "'time' is not one of flops, bytes, parameters, error, mass",
    ),
    "show into nothing": ("show graph nowhere {folder}/no/a.svg", 1, "there is no directory"),
    "show a part without a picture": ("show diff {model} 0 1 --only encoder", 2, "--only goes with --svg"),
    "compile with another heat": (
        "compile x --heat warmth --html a.html",
        2,
        "'warmth' is not one of flops, bytes, parameters, time",
    ),
    "compile with a heat of no page": ("compile x --heat bytes", 2, "--heat goes with --html"),
    "compile with times that are not measured": ("compile nowhere --html {folder}/a.html --heat time", 2, "needs --full"),
    "passes that are markup": (r"passes \[/x]", 1, "[/x]"),
    "show one rank": ("show sharding {model} 1", 2, "Invalid value for 'ranks'"),
    "show latency nan": ("show sharding {model} 2 --latency nan", 2, "Invalid value for '--latency'"),
    "show bandwidth zero": ("show sharding {model} 2 --bandwidth 0", 2, "Invalid value for '--bandwidth'"),
    "show bandwidth infinite": ("show sharding {model} 2 --bandwidth inf", 2, "inf is not a finite number"),
    "show no step": ("show diff {model} 0 99", 1, "there is no step 99"),
    "show half a diff": ("show diff {model} 0", 2, "Missing argument"),
    "show a diff of words": ("show diff {model} a b", 2, "Invalid value for 'before'"),
    "show an artifact with data": ("show {model} --data {folder}/text.txt", 2, "do not go with a saved model"),
    "compile with absent data": (
        "compile nowhere --data {folder}/none.npz",
        1,
        "none.npz' does not exist; --data takes",
    ),
    "compile with a drop alone": ("compile nowhere --max-drop 0.1", 1, "--max-drop needs --metric: cosine, agreement, or"),
    "compile with a drop below zero": ("compile nowhere --max-drop -1", 2, "Invalid value for '--max-drop'"),
    "compile with a drop of nan": ("compile nowhere --max-drop nan --metric cosine", 2, "Invalid value for '--max-drop'"),
    "passes nothing": ("passes quantise", 1, "there is no pass 'quantise'; did you mean 'quantize'?"),
    "bench nothing": ("bench nowhere --engines eager", 1, "'nowhere' is neither a directory"),
    "bench unknown engines": ("bench nowhere --engines egaer", 1, "did you mean 'eager'?"),
    "bench seconds infinite": ("bench {model} --seconds inf", 2, "Invalid value for '--seconds'"),
    "bench seconds nan": ("bench {model} --seconds nan", 2, "Invalid value for '--seconds'"),
    "bench seconds below zero": ("bench {model} --seconds -1", 2, "Invalid value for '--seconds'"),
    "bench seconds text": ("bench {model} --seconds long", 2, "Invalid value for '--seconds'"),
    "bench no threads": ("bench {model} --threads 0", 2, "Invalid value for '--threads'"),
    "bench too many threads": ("bench {model} --threads 100000", 2, "Invalid value for '--threads'"),
    "bench shape of text": ("bench nowhere --shapes large", 1, "'large' is not a shape; write rows x tokens"),
    "bench no shape": ("bench nowhere --shapes 0x8", 1, "'0x8' is not a shape"),
    "bench huge shape": ("bench nowhere --shapes 1x99999999999", 1, "is 99,999,999,999 tokens; give"),
    "bench no texts": ("bench nowhere --texts {folder}/none.txt", 1, "cannot be read as text"),
    "bench a folder of texts": ("bench nowhere --texts {folder}", 1, "cannot be read as text"),
    "bench an artifact's engines": ("bench {model} --engines eager", 2, "do not go with a saved one"),
    "bench ragged artifact": ("bench {model} --shapes 8xragged --seconds 0", 1, "has no tokenizer to fill the shape"),
    "bench passes alone": ("bench nowhere --passes exact", 2, "--passes goes with --profile"),
    "bench profile of engines": ("bench nowhere --profile --engines eager", 2, "do not go with --profile"),
    "bench into nothing": ("bench nowhere --markdown {folder}/no/file", 1, "there is no directory"),
    "demo seconds infinite": ("demo --seconds inf", 2, "Invalid value for '--seconds'"),
    "demo seconds text": ("demo --seconds long", 2, "Invalid value for '--seconds'"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, artifact: str) -> None:
    text, status, said = COMMANDS[name]
    folder = str(Path(artifact).parent)
    found = runner.invoke(app, text.format(model=artifact, folder=folder).split())
    if status == 2:
        assert found.exit_code == 2, found.output
        assert said in " ".join(found.output.replace("│", " ").split())
    else:
        assert isinstance(found.exception, LissomError), repr(found.exception)
        assert said in str(found.exception)


def test_a_name_that_is_too_long_is_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lissom.cli.main import main

    for command in ("compile", "show", "generate", "bench", "run"):
        rest = {"generate": ["hello"], "run": ["--input", "x.npz"]}.get(command, [])
        monkeypatch.setattr("sys.argv", ["lissom", command, "a" * 5000, *rest])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 1
        assert "File name too long" in said
        assert len(said) < 600


SHAPES: dict[str, Refusal] = {
    text: (UnsupportedError, "is not a shape; write rows x tokens", lambda text=text: parse_shapes(text))
    for text in ("", "0", "8x", "x8", "-1x8", "8x0", "8.0x8", "8x8,", "ragged", "8xragged8", "8 x 8 x 8", "1e3x8")
}


@table(SHAPES)
def test_a_shape(refusal: Refusal) -> None:
    check(refusal)
