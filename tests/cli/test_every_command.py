"""Every command with every option that its help names, on tiny models: it runs, and writes what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from lissom.cli.main import app
from lissom.cli.show import views
from tests.cli.test_generate import decoder  # noqa: F401
from tests.frontends.models.test_huggingface import directory  # noqa: F401
from tests.support.gguf_models import save_checkpoint

# Words in braces are made by the fixture `places`; {new} is a folder for what the command writes.
COMPILE = [
    "compile {model}",
    "compile {model} --passes quantize{{scheme=int8-static}} --data {texts} --metric cosine --max-drop 0.5 --goal none --full",
    "compile {model} --passes quantize --metric agreement --goal memory --history {new}/history.json --text {new}/program.txt",
    "compile {model} --passes cast --goal latency --html {new}/page.html --heat time --full",
    "compile {model} --passes quantize --goal none --html {new}/page.html --heat error --errors",
    "compile {model} --html {new}/page.html --heat bytes --checks structural",
    "compile {model} --html {new}/page.html --heat flops --checks off",
    "compile {model} --passes sparsify-attention{{window=4}} --goal none --html {new}/page.html --heat mass",
    "compile {model} --html {new}/page.html --heat parameters --device cpu",
    "compile {model} --backend onnxruntime --save {new}/saved",
    "compile {model} --backend openvino --save {new}/saved",
    "compile {model} --backend distributed --world-size 2 -o {new}/saved",
    "compile {model} --backend eager --passes quantize{{activations=tensor,attention=true}} --simulate --goal none",
]
SHOW = [
    "show {model}",
    "show program {saved} --allow-native --trusted-key {public}",
    "show structure {model} --passes low-rank{{budget=0.5}} --data {texts}",
    "show axes {model}",
    "show sites {saved}",
    "show cost {model} --batch 3 --sequence 7",
    "show errors {model} --passes quantize",
    "show diff {model} 12 13 --passes low-rank{{budget=0.5}} --data {texts}",
    "show diff {model} 1 2 --svg {new}/picture.svg --only encoder.layer.0",
    "show graph {model} {new}/picture.svg --only encoder.layer.0 --heat bytes",
    "show page {model} {new}/page.html --backend eager --heat error",
    "show attention {model} {new}/picture.svg --passes sparsify-attention{{window=4}} --sequence 16 --only encoder.layer.0",
    "show sharding {model} 2 --sequence-parallel --latency 5 --bandwidth 50 --batch 2 --sequence 8",
    "show sharding {saved} 2 --svg {new}/picture.svg",
]
SAVED = [
    "run {saved} --input {arrays} --output {new}/answer.npz --device cpu --allow-native --trusted-key {public}",
    "verify {saved} --key {public}",
    "sign {saved} --key {private}",
]
GENERATE = [
    "generate {decoder} one --max-new-tokens 3 --temperature 0.5 --seed 7 --fresh",
    "generate {decoder} one --max-new-tokens 3 --passes gptq --data {texts} --checks structural --goal none",
    "generate {decoder} one --max-new-tokens 3 --passes quantize,gptq --data {texts} --checks off --goal memory --device cpu",
    "generate {decoder} one --max-new-tokens 3 --backend eager --save {new}/decoder --draft prompt-lookup",
    "generate {saved_decoder} one --max-new-tokens 3 --allow-native --trusted-key {public}",
]
EXPORT = [
    "export {bpe} {new}/out.gguf --dtype f16 --checks structural",
    "export {bpe} {new}/out.gguf --types q4_k_m --checks structural",
    "export {bpe} {new}/out.gguf --passes prune-neurons{{keep=0.5}} --data {texts} --metric agreement --max-drop 1.0",
    "export {bpe} {new}/out --format compressed-tensors --passes quantize{{scheme=int8-weight}} --kv-cache fp8 --data {texts}",
    "export {model} {new}/out --format openvino --passes quantize{{scheme=int8-weight}}",
    "export {bpe} {new}/out --format genai --passes quantize{{scheme=int4-weight}}",
]
OPT = [
    "opt {program} --passes remove-no-ops,quantize --size batch=2 --size sequence=8 --checks structural --diff",
    "opt {program} --output {new}/program.txt",
]
OTHERS = ["passes", "passes quantize", "doctor"]
SLOW = [
    "demo --seconds 0.1",
    "machine",
    "export {model} {new}/out.pt2 --format pt2",
    "export {model} {new}/out.json --format tp-plan --passes shard{{world_size=2}}",
    "machine --again",
    "machine --build-kernels",
    "bench {model} --engines eager,lissom --shapes 1x4,2xragged --seconds 0.1 --threads 1 --markdown {new}/t.md",
    "bench {model} --profile --passes quantize --shapes 1x4 --texts {texts} --seconds 0.1",
    "bench {saved} --shapes 1x4 --seconds 0.1 --allow-native --trusted-key {public}",
    "tune {model} --data {texts} --metric cosine --max-drop 1% --minutes 0.1 --no-distill --store {new}/store -o {new}/saved",
    "tune {model} --data {texts} --goal memory --target 1.2 --minutes 0.1 --distill --backends eager --plot {new}/frontier.svg",
    "tune {model} --data {texts} --goal throughput --minutes 0.1 --no-distill",
    "tune {decoder} --data {texts} --goal decode --max-length 64 --minutes 0.1 --no-distill --for-server vllm",
    "tune {decoder} --data {texts} --goal prefill --max-length 64 --minutes 0.1 --no-distill",
    "tune --show {store}",
]
QUICK = [*COMPILE, *SHOW, *SAVED, *GENERATE, *EXPORT, *OPT, *OTHERS]
LINES = [*QUICK, *(pytest.param(line, marks=pytest.mark.slow) for line in SLOW)]


@pytest.fixture(scope="module")
def places(directory, decoder, tmp_path_factory) -> dict[str, object]:  # noqa: F811
    """What the words in braces stand for."""
    folder = tmp_path_factory.mktemp("places")
    private, public = folder / "private.pem", folder / "public.pem"
    key = Ed25519PrivateKey.generate()
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    texts, arrays = folder / "texts.txt", folder / "data.npz"
    texts.write_text("a first text\nand a second, which is longer\n" * 20)
    ones = np.ones((2, 5), dtype=np.int64)
    np.savez(arrays, input_ids=ones, attention_mask=ones, token_type_ids=0 * ones)
    saved, saved_decoder = folder / "saved", folder / "saved_decoder"
    bpe = folder / "bpe"
    save_checkpoint(bpe)
    _run("compile", str(directory), "--save", str(saved))
    program = folder / "program.txt"
    program.write_text(_run("show", str(directory)))
    _run("generate", decoder, "one", "--max-new-tokens", "3", "--save", str(saved_decoder))
    for written in (saved, saved_decoder):
        _run("sign", str(written), "--key", str(private))
    return {
        "model": directory,
        "decoder": decoder,
        "bpe": bpe,
        "saved": saved,
        "saved_decoder": saved_decoder,
        "program": program,
        "texts": texts,
        "arrays": arrays,
        "private": private,
        "public": public,
    }


def _run(*arguments: str) -> str:
    found = CliRunner().invoke(app, [*arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


# torch.compile, which the demo compares with, warns of its own parts.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("line", LINES)
def test_a_command_runs_and_writes_its_files(line, places, tmp_path, monkeypatch):
    if "openvino" in line:
        pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lissom[openvino]'")
    monkeypatch.setenv("LISSOM_KEPT_DECODERS", "0")
    if "{store}" in line:
        search = "tune {model} --data {texts} --minutes 0.1 --no-distill --store {store}"
        places = {**places, "store": tmp_path / "store"}
        _run(*(word.format(**places) for word in search.split()))
    words = [word.format(**places, new=tmp_path) for word in line.split()]
    _run(*words)
    written = [Path(word) for word in words if word.startswith(str(tmp_path)) and word != str(places.get("store"))]
    assert all(path.exists() and (path.is_dir() or path.stat().st_size) for path in written)


def _options() -> Iterator[tuple[str, str]]:
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        for part in getattr(command, "commands", {"": command}).values():
            for parameter in part.params:
                words = [*parameter.opts, *parameter.secondary_opts]
                yield from ((name, option) for option in words if option.startswith("--"))


def test_every_view_is_shown() -> None:
    assert {line.split()[1] for line in SHOW} - {"{model}"} == set(_views())


def _views() -> list[str]:
    return list(typer.main.get_command(views).commands)  # pyright: ignore[reportAttributeAccessIssue]


def test_no_option_is_left_out():
    lines = [*QUICK, *SLOW]
    tried = {(line.split()[0], word) for line in lines for word in line.split()[1:]}
    left_out = set(_options()) - tried
    # `-o` stands for --save.
    assert left_out - {("compile", "--save"), ("tune", "--save")} == set()
