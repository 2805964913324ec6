"""Folders of ONNX files: what is in them, and that other runtimes give Lissom's answers."""

import json
import queue
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import onnx
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import BertConfig, BertForSequenceClassification

import lissom
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import ArtifactError, CaptureError, InputError, UnsupportedError
from lissom.frontends.models.huggingface import Checkpoint
from lissom.runtime.compiled_model import CompiledModel
from tests.frontends.capture.test_kv_cache import SIZES, llama
from tests.support import captures
from tests.support.models import VOCABULARY, feed_forward, tiny_bert
from tools.zoo import catalogue

QUICK = lissom.OnnxRuntime(timing_seconds=0, threads=1)
CLOSE = 1e-4
ZOO = {
    "causal": "llama gpt2 qwen3 bloom opt gemma mistral phi gpt_neox falcon",
    "classifier": "bert mistral albert roberta",
    "masked": "bert roberta distilbert electra albert mpnet deberta camembert ernie squeezebert xlm-roberta modernbert",
    "encoder": "clip_text_model siglip_vision_model dpr",
    "vision": "vit deit beit dinov2 swin segformer",
    "speech": "wav2vec2 hubert",
    "encoder-decoder": "bart t5 mbart",
}
"""Names by family of the zoo."""
ENTRIES = {entry.name: entry for entry in catalogue.entries()}
TEXTS = ["How do I reset my password?", "Whisk the eggs, then season them."]


def compiled_bert(passes: str = "exact") -> CompiledModel:
    case = tiny_bert()
    return captures.compile(case.model, case.inputs, backend=QUICK, passes=passes, checks="off")


def run_plainly(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of an ONNX file in a session as another program opens it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
    return [torch.from_numpy(found) for found in session.run(None, given)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "bert"
    case = tiny_bert()
    compiled_bert().export_onnx(folder, dtypes=["fp32", "q8"], original=case.model)
    return folder


def test_a_folder_holds_files_configuration_and_card(bert):
    names = {path.relative_to(bert).as_posix() for path in bert.rglob("*") if path.is_file()}
    assert names == {"README.md", "config.json", "onnx/model.onnx", "onnx/model_quantized.onnx"}
    fields = json.loads((bert / "config.json").read_text())
    assert fields["model_type"] == "bert" and "_name_or_path" not in fields
    assert not onnx.load(bert / "onnx" / "model.onnx").metadata_props  # neither names of labels nor a tokenizer
    card = (bert / "README.md").read_text()
    assert "| `onnx/model.onnx` |" in card and "| 1.00000 |" in card and "Operators are standard ONNX" in card


def test_file_holds_names_of_labels_and_tokenizer(minilm: Checkpoint, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(minilm.tokenizer), id2label={0: "cooking", 1: "astronomy"}, **sizes)
    model = BertForSequenceClassification(config).eval()
    compiled = lissom.compile(
        model, dict(minilm.tokenizer(TEXTS, padding=True, return_tensors="pt")), backend=QUICK, checks="off"
    )
    compiled.export_onnx(tmp_path / "bert", dtypes=["fp32"], tokenizer=minilm.tokenizer)
    session = onnxruntime.InferenceSession(tmp_path / "bert" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map
    assert json.loads(found["id2label"]) == {"0": "cooking", "1": "astronomy"}
    assert found["tokenizer.json"] == (tmp_path / "bert" / "tokenizer.json").read_text(encoding="utf-8")


def test_files_hold_standard_operators_of_an_old_opset(bert):
    for path in (bert / "onnx").iterdir():
        model = onnx.load(path)
        assert {item.domain: item.version for item in model.opset_import} == {"": 20}
        assert {node.domain for node in model.graph.node} == {""}
    assert "MatMulInteger" in {node.op_type for node in model.graph.node} or path.name == "model.onnx"


def test_a_file_gives_the_models_answers_at_other_sizes(bert):
    model = tiny_bert().model
    for sizes in ((1, 1), (3, 9)):
        inputs = {"input_ids": torch.randint(0, VOCABULARY, sizes), "attention_mask": torch.ones(sizes, dtype=torch.long)}
        with torch.no_grad():
            wanted = pytree.tree_leaves(model(**inputs))
        for left, right in zip(wanted, run_plainly(bert / "onnx" / "model.onnx", inputs), strict=True):
            assert relative_error(left, right) < CLOSE


def test_quantized_file_gives_answers_of_compiled_quantized_model(bert):
    compiled = compiled_bert("quantize{scheme=int8-dynamic,activations=tensor}")
    inputs = dict(tiny_bert().inputs)
    wanted = pytree.tree_leaves(compiled(**inputs))
    for left, right in zip(wanted, run_plainly(bert / "onnx" / "model_quantized.onnx", inputs), strict=True):
        assert relative_error(left, right) < CLOSE


def test_a_quantized_model_is_one_file(tmp_path):
    compiled = compiled_bert("quantize{scheme=int8-dynamic,activations=tensor}")
    compiled.export_onnx(tmp_path / "int8")
    assert [path.name for path in (tmp_path / "int8" / "onnx").iterdir()] == ["model_quantized.onnx"]
    with pytest.raises(UnsupportedError, match="is quantized already, which is the file 'q8'; leave dtypes= out"):
        compiled.export_onnx(tmp_path / "other", dtypes=["fp32"])
    assert not (tmp_path / "other").exists()


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path):
    compiled, case = compiled_bert(), tiny_bert()
    with pytest.raises(UnsupportedError, match="layout= is 'keras'; choose huggingface"):
        compiled.export_onnx(tmp_path / "a", layout="keras")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="choose some of fp32, fp16, q8, q4"):
        compiled.export_onnx(tmp_path / "a", dtypes=["q3"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="'fp16' in dtypes= needs data="):
        compiled.export_onnx(tmp_path / "a", dtypes=["fp16"])
    with pytest.raises(UnsupportedError, match="needs a model compiled with backend='onnxruntime', and this one is"):
        captures.compile(case.model, case.inputs, checks="off").export_onnx(tmp_path / "a")
    for data in (3, {"input_ids": torch.ones(2, 3)}, [torch.ones(2, 3)]):
        with pytest.raises(InputError, match="data= is not a list of batches; give mappings"):
            compiled.export_onnx(tmp_path / "a", data=data)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CaptureError, match="Linear itself fails on the example inputs"):
        compiled.export_onnx(tmp_path / "a", dtypes=["fp32"], original=torch.nn.Linear(2, 2))
    other = feed_forward()
    with pytest.raises(UnsupportedError, match=r"needs a config of transformers, and .* has none"):
        captures.compile(other.model, other.inputs, backend=QUICK, checks="off").export_onnx(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is not an artifact, so it is not replaced"):
        compiled.export_onnx(tmp_path / "full", dtypes=["fp32"])


@pytest.mark.slow
def test_the_original_may_be_training_and_return_a_cache(tmp_path):
    model, inputs = llama(), {"input_ids": torch.randint(0, SIZES["vocab_size"], (2, 6))}
    model.config.attention_dropout = 0.5
    compiled = lissom.compile(model, inputs, backend=QUICK, checks="off", goal=None)
    compiled.export_onnx(tmp_path / "model", dtypes=["fp32"], original=model.train())
    assert "| 1.00000 |" in (tmp_path / "model" / "README.md").read_text()
    assert model.training and model.config.use_cache


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{family}/{name}" for family, names in ZOO.items() for name in names.split()])
def test_architectures_give_their_answers_in_plain_onnx_runtime(tmp_path, name):
    case = ENTRIES[name].build()
    compiled = lissom.compile(case.model, case.inputs, backend=QUICK, checks="off", goal=None)
    compiled.export_onnx(tmp_path / "model", dtypes=["fp32", "q8", "q4"], original=case.model)
    with torch.no_grad():
        wanted = [leaf for leaf in pytree.tree_leaves(case.model(**case.inputs)) if isinstance(leaf, torch.Tensor)]
    found = run_plainly(tmp_path / "model" / "onnx" / "model.onnx", dict(case.inputs))
    for left, right in zip(wanted, found, strict=False):
        assert relative_error(left, right) < CLOSE


@pytest.fixture(scope="module")
def exported_minilm(minilm: Checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "minilm"
    compiled = lissom.compile(minilm.model, minilm.example_inputs, backend=QUICK, checks="off")
    compiled.export_onnx(folder, tokenizer=minilm.tokenizer, data=[minilm.encode(TEXTS)])
    return folder


DTYPES = pytest.mark.parametrize(("dtype", "cosine"), [("fp32", 0.999999), ("fp16", 0.9999), ("q8", 0.98), ("q4", 0.95)])


@pytest.mark.slow
@DTYPES
def test_transformers_js_gives_the_same_hidden_states(minilm: Checkpoint, exported_minilm, dtype, cosine):
    packages_of_npm()
    script = Path(__file__).parent / "embed.cjs"
    command = ["node", str(script), str(exported_minilm), dtype, json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    check_answer(minilm, json.loads(done.stdout), dtype, cosine)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (Debian: apt-get install chromium)")
@DTYPES
def test_page_in_browser_gives_same_hidden_states(minilm: Checkpoint, exported_minilm, tmp_path, dtype, cosine):
    check_answer(minilm, answer_of_page(packages_of_npm(), exported_minilm, dtype, tmp_path), dtype, cosine)


def packages_of_npm() -> Path:
    """The folder node_modules in which Node.js finds transformers.js; skips the test where there is none."""
    if shutil.which("node") is None:
        pytest.skip("there is no Node.js")
    script = "console.log(require.resolve('@huggingface/transformers'))"
    asked = subprocess.run(["node", "-e", script], capture_output=True, check=False, text=True)
    if asked.returncode:
        pytest.skip("Node.js does not find @huggingface/transformers; install it, and set NODE_PATH to its node_modules")
    return next(folder for folder in Path(asked.stdout).parents if folder.name == "node_modules")


def answer_of_page(packages: Path, folder: Path, dtype: str, profile: Path) -> dict[str, Any]:
    """What embed.html posts, opened in headless Chromium from a server on the loopback interface."""
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    roots = {"packages": packages, "models/model": folder, "page": Path(__file__).parent}

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

        def translate_path(self, path: str) -> str:
            name = path.partition("?")[0].lstrip("/")
            found = ((root, name.removeprefix(f"{top}/")) for top, root in roots.items() if name.startswith(f"{top}/"))
            root, rest = next(found, (profile, "there-is-no-such-file"))
            return str(root / rest)

        def do_POST(self) -> None:
            answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        query = urlencode({"dtype": dtype, "texts": json.dumps(TEXTS)})
        page = f"http://127.0.0.1:{server.server_port}/page/embed.html?{query}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        with subprocess.Popen(["chromium", *options, page], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                return answers.get(timeout=300)
            finally:
                browser.terminate()
                server.shutdown()


def check_answer(minilm: Checkpoint, answer: dict[str, Any], dtype: str, cosine: float) -> None:
    """Compare hidden states that another runtime computed for TEXTS with the model's own."""
    assert "error" not in answer, answer["error"]
    found = torch.tensor(answer["values"]).reshape(answer["sizes"])
    with torch.no_grad():
        wanted = minilm.model(**minilm.encode(TEXTS)).last_hidden_state
    assert found.shape == wanted.shape
    assert float(torch.cosine_similarity(found.flatten(), wanted.flatten(), 0)) > cosine
    if dtype == "fp32":
        assert relative_error(wanted, found) < CLOSE
