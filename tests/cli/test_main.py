"""Tests of lissom.cli.main: the commands, and what an error looks like."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from lissom.cli.bench.worker import Failure
from lissom.cli.main import app, main
from lissom.errors import ArtifactError, UnsupportedError
from lissom.io.files import write_whole
from lissom.measure.machine import cache_path, save_machine
from lissom.ops.native import describe_kernels
from lissom.passes import PASSES, RECIPES
from lissom.version import __version__
from tests.frontends.models.test_huggingface import directory  # noqa: F401
from tests.measure.test_machine import example

pytestmark = pytest.mark.usefixtures("shared_captures")
runner = CliRunner()


def invoke(*arguments: str) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def lissom(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as a user meets it."""
    command = [sys.executable, "-m", "lissom", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "400"})


@pytest.fixture
def model(directory) -> str:  # noqa: F811
    return str(directory)


def test_passes_are_listed():
    shown = invoke("passes")
    assert all(name in shown for name in [*PASSES, *RECIPES])
    assert all(len(line) <= 80 and line == line.rstrip() for line in shown.splitlines())
    # A narrow terminal or a pipe breaks the long text of a recipe, and cuts nothing off.
    assert "…" not in shown


def test_the_version_is_printed():
    assert invoke("--version") == f"lissom {__version__}\n"


def test_one_pass_is_shown_with_its_options_and_example():
    shown = invoke("passes", "gptq")
    assert shown.startswith("gptq: ")
    assert "block_size" in shown and "128" in shown
    assert "lissom compile minilm --passes 'quantize{scheme=int4-weight},gptq' --data texts.txt" in " ".join(shown.split())
    assert invoke("passes", "exact").startswith("exact: a recipe")
    refused = runner.invoke(app, ["passes", "gtpq"]).exception
    assert str(refused) == "there is no pass 'gtpq'; did you mean 'gptq'? `lissom passes` lists them all"


def test_help_names_every_command():
    shown = invoke("--help")
    assert all(command in shown for command in ("demo", "compile", "generate", "show", "bench", "passes"))


def test_show_prints_the_program(model):
    shown = invoke("show", model)
    assert shown.startswith("program BertModel(*, input_ids: i64[batch, sequence], ")
    assert shown.endswith("}\n")
    assert "aten.scaled_dot_product_attention" in shown


def test_show_names_its_views() -> None:
    shown = " ".join(invoke("show", "--help").split())
    assert "[VIEW] MODEL" in shown and "cost List FLOPs, bytes and parameters of every site." in shown.replace("│ ", "")
    assert runner.invoke(app, ["show"]).output.split() == runner.invoke(app, ["show", "--help"]).output.split()


def test_options_come_before_the_model_too(model):
    assert invoke("show", "--passes", "remove-no-ops", model) == invoke("show", "program", model, "--passes", "remove-no-ops")


def test_show_prints_a_plan_of_tensor_parallelism(model):
    shown = invoke("show", "sharding", model, "2", "--batch", "1", "--sequence", "8", "--latency", "5", "--bandwidth", "100")
    assert "on 2 ranks, batch 1, sequence 8" in shown
    assert "2 all-reduces" in shown
    assert "5 µs a message, 100 GB/s a link" in shown


def test_show_prints_the_difference_between_two_steps(model):
    shown = invoke("show", "diff", model, "1", "2")
    assert shown.startswith("--- 1 eliminate-dead-code\n+++ 2 remove-no-ops\n@@ ")


def test_show_says_when_two_steps_are_the_same_program(model):
    assert invoke("show", "diff", model, "0", "0") == "the two steps are the same program\n"


def test_compile_prints_the_report_and_writes_history_and_text(model, tmp_path):
    history, text, page = tmp_path / "history.json", tmp_path / "program.txt", tmp_path / "report.html"
    shown = invoke("compile", model, "--history", history, "--text", text, "--html", page)
    assert "BertModel on eager" in shown
    assert "remove-no-ops" in shown
    whole = json.loads(history.read_text())
    steps = [step["spelling"] for step in whole["steps"]]
    exact = RECIPES["exact"].split(",")
    assert steps[: len(exact) + 1] == ["capture", *exact]
    assert text.read_text().startswith("program BertModel(*, input_ids: i64[batch, sequence], ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "program.txt", "report.html"]
    assert "merge-common-subexpressions" in page.read_text()


def test_a_full_report_lists_every_step(model):
    assert "nothing to do" not in invoke("compile", model, "--checks", "off")
    full = invoke("compile", model, "--checks", "off", "--full")
    assert "rewrite-einsum" in full and "hot layers of " in full


def test_compile_takes_passes_checks_and_device(model):
    shown = invoke("compile", model, "--passes", "remove-no-ops", "--checks", "structural", "--device", "cpu")
    assert "form and types were checked after every step, numbers were not" in " ".join(shown.split())


def test_scheme_without_kernel_compiles_with_simulate(model):
    arguments = ("compile", model, "--passes", "quantize{scheme=fp8}", "--checks", "structural")
    refused = runner.invoke(app, arguments)
    assert isinstance(refused.exception, UnsupportedError)
    assert "products of fp8 need a CUDA device; choose another scheme or backend, or simulate=True" in str(refused.exception)
    assert "quantized layers run in integers" in " ".join(invoke(*arguments, "--simulate").split())


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    write_whole(path, "new ü\n")
    assert path.read_text(encoding="utf-8") == "new ü\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_renamed_leaves_nothing_behind(tmp_path):
    path = tmp_path / "taken"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="taken' cannot be written: it is a directory; name a file in it"):
        write_whole(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    path, plain = tmp_path / "out.txt", tmp_path / "plain.txt"
    write_whole(path, "new")
    plain.write_text("new")
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.slow
def test_bench_prints_the_table_and_writes_it_as_markdown(model, tmp_path):
    file = tmp_path / "table.md"
    arguments = ("--engines", "eager", "--shapes", "1x4,2xragged", "--seconds", "0", "--threads", "1", "--markdown", file)
    shown = " ".join(invoke("bench", model, *arguments).split())
    assert "engine 1x4 2xragged cosine peak MB first s" in shown
    assert ", 1 threads; Python" in shown
    assert file.read_text().startswith("| engine | 1x4, ms | 2xragged, ms | cosine |")


def test_bench_interrupted_shows_what_was_finished(model, monkeypatch):
    def interrupted(*_, **__):
        yield Failure("openvino", None, "it was not there")
        raise KeyboardInterrupt

    monkeypatch.setattr("lissom.cli.bench.commands.compare", interrupted)
    monkeypatch.setenv("COLUMNS", "200")
    result = runner.invoke(app, ["bench", model])
    assert result.exit_code == 130
    shown = " ".join(result.output.split())
    assert "interrupted; finished so far" in shown
    assert "OpenVINO fp32 did not run: it was not there" in shown


def test_bench_profiles_by_site_and_operator(model, tmp_path, monkeypatch):
    monkeypatch.setattr("lissom.cli.bench.commands.load_machine", example)
    monkeypatch.setenv("COLUMNS", "200")
    shown = invoke("bench", model, "--profile", "--shapes", "3x7", "--seconds", "0", "--passes", "remove-no-ops")
    assert "BertModel on eager, batch 3, sequence 7" in shown
    # Where a call was held up, its wide numbers fold the names beside them.
    assert "between operators" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "--engines", "eager"], "--engines and --markdown do not go with --profile"),
        (["--passes", "exact"], "--passes goes with --profile"),
        (["--threads", "0"], "be greater than or equal to 1"),
        (["--seconds", "-1"], "be greater than or equal to 0"),
    ],
)
def test_bench_options_that_do_not_fit_exit_with_2(arguments, message):
    result = runner.invoke(app, ["bench", "minlm", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "minlm", "--engines", "egaer"], "there is no engine 'egaer'; did you mean 'eager'? choose eager, "),
        (["bench", "minlm", "--shapes", "8x"], "'8x' is not a shape; write rows x tokens, for example 1x32,8x128,32xragged"),
        (["bench", "minlm", "--texts", "no.txt"], "'no.txt' cannot be read as text: "),
        (["bench", "minlm", "--engines", "eager"], "'minlm' is neither a directory nor a packaged model"),
        (["show", "minlm"], "neither a directory nor a packaged model (minilm, gemma3-270m); did you mean 'minilm'?"),
        (["compile", "."], "no config.json; give a directory written by save_pretrained"),
        # What is wrong with the options is said before the model is looked for.
        (["compile", "minlm", "--passes", "remove-noops"], "did you mean 'remove-no-ops'?"),
        (["compile", "minlm", "--backend", "eagr"], "there is no backend 'eagr'; did you mean 'eager'? choose eager"),
        (["compile", "minlm", "--device", "tpu"], "device 'tpu' is not known to PyTorch; write 'cpu' or 'cuda:0'"),
        (["compile", "minlm", "--checks", "all"], "checks='all' is not known; choose numeric, each, structural, off"),
        (["compile", "minlm", "--text", "no/out.txt"], "'no/out.txt' cannot be written: there is no directory 'no'; make it"),
        (["compile", "minlm", "--history", "."], "'.' cannot be written: it is a directory; name a file in it"),
    ],
    ids=[
        "engine",
        "shape",
        "texts",
        "bench model",
        "model",
        "no checkpoint",
        "pass",
        "backend",
        "device",
        "checks",
        "no directory",
        "directory",
    ],
)
def test_an_error_is_a_sentence_and_exit_status_1(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lissom", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    # `bench` says that it reads the model before it finds none.
    assert shown.err.removeprefix("bench: reading minlm\n").startswith("error: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_mistyped_pass_is_pointed_at(model):
    result = lissom("compile", model, "--passes", "remove-no-ops{x=[1]},zebra")
    assert result.returncode == 1
    assert result.stderr == (
        "error: pipeline text, character 15: remove-no-ops has no option 'x'; its options: none\n"
        "  remove-no-ops{x=[1]},zebra\n"
        "                ^\n"
    )
    assert "Traceback" not in result.stderr


def test_unknown_option_of_command_line_is_exit_status_2():
    result = runner.invoke(app, ["compile", "--zebra"])
    assert result.exit_code == 2


def test_an_output_that_cannot_be_written_is_a_sentence(model, tmp_path, monkeypatch, capsys):
    path = tmp_path / "missing" / "out.txt"
    monkeypatch.setattr(sys, "argv", ["lissom", "compile", model, "--checks", "off", "--text", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: '{tmp_path}")


def test_an_interrupt_shows_what_was_finished(model, tmp_path, monkeypatch, capsys):
    info = tmp_path / "interrupting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: interrupting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lissom.passes]\ninterrupts = tests.support.passes:Interrupts\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lissom", "show", "page", model, f"{tmp_path}/a.html", "--passes", "interrupts"])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert stopped.value.code == 130
    assert "interrupted; finished so far" in shown.out
    assert "remove-no-ops" in shown.out
    assert "Traceback" not in shown.err
    assert "it was interrupted" in (tmp_path / "a.html").read_text()


def test_show_writes_a_page(model, tmp_path):
    assert invoke("show", "page", model, tmp_path / "a.html") == ""
    assert "remove-no-ops" in (tmp_path / "a.html").read_text()


def test_show_prints_site_costs_with_the_measured_roof(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shown = invoke("show", "cost", model, "--batch", "3", "--sequence", "6")
    assert shown.startswith("BertModel, batch 3, sequence 6")
    assert "Run `lissom machine` once" in shown
    save_machine(example(torch=torch.__version__))
    assert "roof" in invoke("show", "cost", model).partition("whole program")[0]


def test_show_lists_the_sites_and_their_amounts(model: str) -> None:
    shown = invoke("show", "sites", model)
    assert "prune-heads: 1, 2\n" in shown and "quantize: none, int8-dynamic" in shown


def test_the_machine_is_measured_once_and_again_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    days = iter(["2026-01-01", "2026-01-02"])
    monkeypatch.setattr("lissom.cli.bench.commands.measure_machine", lambda progress: example(measured=next(days)))
    for arguments, day, source in (
        (["machine"], "2026-01-01", "kept in"),
        (["machine"], "2026-01-01", "read from"),
        (["machine", "--again"], "2026-01-02", "kept in"),
        (["machine"], "2026-01-02", "read from"),
    ):
        shown = invoke(*arguments)
        assert f"measured on {day}" in shown
        assert shown.splitlines()[-2:] == [f"{source} {cache_path()}", f"kernels: {describe_kernels()}"]


# torch 2.13 uses a function it deprecates when torch.compile, which the demonstration times beside us, is first called.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_the_demonstration_runs():
    shown = invoke("demo", "--seconds", "0.1")
    assert "BertModel on eager" in shown
    assert "embeddings differ from the original model's by" in shown
    assert "latency, ms" in shown


@pytest.mark.slow
def test_show_draws_pictures(model, tmp_path):
    picture = tmp_path / "picture.svg"
    sparse = ["--passes", "sparsify-attention{pattern=strided}", "--sequence", "512"]
    for arguments, words in (
        (["diff", model, "0", "1", "--svg", picture, "--only", "encoder.layer.0"], "compared with 0"),
        (["attention", model, picture, *sparse], "of the blocks are seen"),
        (["sharding", model, "2", "--svg", picture], "all-reduce of the output of"),
    ):
        assert invoke("show", *arguments) == ""
        assert words in picture.read_text(encoding="utf-8")


@pytest.mark.slow
def test_errors_of_nodes_are_measured_and_drawn(model, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "picture.svg"
    passes = "sparsify-attention{pattern=window,window=2}"
    shown = invoke("show", "errors", model, "--passes", passes)
    assert "largest error" in shown and "softmax mass of the original" in shown
    for view, file in (("page", page), ("graph", picture)):
        assert invoke("show", view, model, file, "--passes", passes, "--heat", "mass") == ""
    assert '"heat":"mass"' in page.read_text(encoding="utf-8")
    assert "color: attention mass lost" in picture.read_text(encoding="utf-8")
    assert "largest error" in invoke("compile", model, "--passes", passes, "--checks", "off", "--errors")
