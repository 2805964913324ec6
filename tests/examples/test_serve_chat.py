"""The server of examples/serve_chat.py over HTTP: answers, streams, stop strings, schemas, refusals, overload and its end."""

from __future__ import annotations

import json

import pytest
import torch

from lissom.generation.sampling import Sampling
from tests.support.chat_server import (
    LENGTH,
    NAME,
    PROMPTS,
    alone,
    completion,
    running,
    small_tokenizer,
    until_idle,
)
from tests.support.servers import HOST, ask, ask_many

NEEDED = "is not installed: pip install 'lissom[dev]'"
for package in ("starlette", "uvicorn", "llguidance"):
    pytest.importorskip(package, reason=f"{package} {NEEDED}")
openai = pytest.importorskip("openai", reason=f"openai {NEEDED}")

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The dog?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def port(chat_example, decoder, words):
    """A server with small bounds, for the tests that do not stop it."""
    with running(decoder, words, chat_example.Limits(body_bytes=20_000, body_seconds=0.3)) as server:
        yield server.config.port


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none", max_retries=0) as found:
        yield found


def chat_prompt(words, messages) -> list[int]:
    text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return words(text, add_special_tokens=False)["input_ids"]


def test_completions_are_those_of_each_prompt_alone(port, decoder, words):
    answers = ask_many(port, "/v1/completions", [completion(prompt) for prompt in PROMPTS])
    assert [body["choices"][0]["text"] for _, body, _ in answers] == [alone(decoder, words, p, 16) for p in PROMPTS]
    tokens = len(words(PROMPTS[0])["input_ids"])
    assert answers[0][1]["usage"] == {"prompt_tokens": tokens, "completion_tokens": 16, "total_tokens": tokens + 16}


def test_a_chat_follows_the_template(client, decoder, words):
    found = client.chat.completions.create(model=NAME, messages=CHAT, max_completion_tokens=12, temperature=0)
    assert found.choices[0].message.content == alone(decoder, words, chat_prompt(words, CHAT), 12)
    assert (found.object, found.choices[0].finish_reason) == ("chat.completion", "length")
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    again = client.chat.completions.create(model=NAME, messages=parts, max_tokens=12, temperature=0)
    assert again.choices[0].message.content == found.choices[0].message.content


def test_a_chat_without_a_template_is_lines(chat_example, decoder):
    words = small_tokenizer(None)
    with running(decoder, words, chat_example.Limits()) as server:
        body = {"model": NAME, "messages": CHAT, "max_tokens": 12, "temperature": 0}
        found = ask(server.config.port, "/v1/chat/completions", body)[1]
    text = alone(decoder, words, "system: Be brief.\nuser: The dog?\nassistant:", 12)
    assert found["choices"][0]["message"]["content"] == text.partition("\nuser:")[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_has_the_same_text(client, decoder, words, prompt):
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 24}
    chunks = list(client.completions.create(model=NAME, prompt=prompt, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == alone(decoder, words, prompt, 24)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] in ("length", "stop")
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 24)


def test_a_stream_of_a_chat(client, decoder, words):
    chunks = list(client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=12, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == alone(decoder, words, chat_prompt(words, CHAT), 12)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_stop_strings_end_the_text_and_are_not_sent(client, decoder, words):
    ids = decoder.generate([words(PROMPTS[0])["input_ids"]], 24, Sampling(stop=(3,)))[0]
    text = words.decode(ids)
    tokens = [words.decode([token]) for token in ids]
    at = next(i for i in range(2, 20) if all("�" not in token and token for token in tokens[i : i + 2]))
    across = tokens[at][-1] + tokens[at + 1][0]  # the end of a token and the beginning of the next
    for stops in ([across], [text[5:9]], ["nowhere", text[7:8]]):
        wanted = text[: min(found for stop in stops if (found := text.find(stop)) >= 0)]
        options = {"model": NAME, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "stop": stops}
        whole = client.completions.create(**options)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (wanted, "stop")
        chunks = list(client.completions.create(**options, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
        assert chunks[-1].choices[0].finish_reason == "stop"
    until_idle(decoder)


def test_the_beginning_of_a_stop_string_is_sent_at_the_end(client, decoder, words):
    text = alone(decoder, words, "and", 8)
    found = client.completions.create(model=NAME, prompt="and", max_tokens=8, temperature=0, stop=text[-1] + "nowhere")
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text, "length")


def test_samples_follow_the_seed(client, decoder, words):
    def sample(seed: int) -> str:
        options = {"max_tokens": 16, "temperature": 0.8, "top_p": 0.9, "seed": seed}
        return client.completions.create(model=NAME, prompt="and", **options).choices[0].text

    sampling = Sampling(0.8, top_p=0.9, seed=7, stop=(3,))
    assert sample(7) == words.decode(decoder.generate([words("and")["input_ids"]], 16, sampling)[0], skip_special_tokens=True)
    assert len({sample(seed) for seed in range(3)}) > 1


def test_logprobs(client, decoder, words):
    found = client.completions.create(model=NAME, prompt="and", max_tokens=5, temperature=0, logprobs=2).choices[0]
    assert "".join(found.logprobs.tokens) == found.text or "�" in "".join(found.logprobs.tokens)
    assert [max(top.values()) for top in found.logprobs.top_logprobs] == found.logprobs.token_logprobs
    region = decoder.new_slots().take(words("and")["input_ids"], 32)  # of an empty pool, whose slots no text uses now
    row = decoder.read([(region, words("and")["input_ids"])]).log_softmax(-1)
    assert found.logprobs.token_logprobs[0] == pytest.approx(float(row.max()), abs=1e-5)  # other calls, other rounding
    asked = {"messages": CHAT, "max_tokens": 4, "logprobs": True, "top_logprobs": 3, "stream": True}
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(model=NAME, **asked)]
    content = [item for chunk in chunks for item in chunk.logprobs.content]
    assert [len(item.top_logprobs) for item in content] == [3] * len(content)
    assert len(content) == 4 or chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_is_followed(client, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "entry", "schema": SCHEMA}}
    options = {"model": NAME, "messages": CHAT, "temperature": temperature, "seed": 1, "max_tokens": 60}
    found = client.chat.completions.create(**options, response_format=form).choices[0]
    answer = json.loads(found.message.content)
    assert sorted(answer) == ["count", "name"]
    assert len(answer["name"]) <= 8
    assert answer["count"] in range(100)
    assert found.finish_reason == "stop"
    whole = client.chat.completions.create(**options, response_format={"type": "json_object"}).choices[0]
    assert whole.message.content.startswith("{")


def chat(**fields: object) -> dict[str, object]:
    return {"model": NAME, "messages": CHAT, **fields}


def schema(form: object) -> dict[str, object]:
    return chat(response_format={"type": "json_schema", "json_schema": {"schema": form}})


def nested(depth: int) -> bytes:
    form = '{"type":"array","items":' * depth + '{"type":"integer"}' + "}" * depth
    return json.dumps(schema("FORM")).replace('"FORM"', form).encode()


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not JSON"),
        (b"[" * 10_000, 400, "the body is not JSON"),
        ([], 400, "the body is not a JSON object"),
        (b" " * 30_000, 413, "the body has 30000 bytes, and may have 20000; send a shorter prompt"),
        (chat(model="other"), 404, f"this server has the model '{NAME}'; give it as model"),
        ({"model": NAME}, 400, "messages is not a list of messages"),
        (
            chat(messages=[{"role": "tool", "content": ""}]),
            400,
            "a message has no role among system, developer, user, assistant",
        ),
        (chat(messages=[{"role": "user", "content": 3}]), 400, "the content of a message is not text"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "the content of a message is not text"),
        (chat(messages=[{"role": "user", "content": "\ud800"}]), 400, "the body has a text that is not Unicode"),
        (
            chat(messages=[{"role": "developer", "content": "a"}]),
            400,
            "the chat template refuses the messages: no developers",
        ),
        (chat(n=2), 400, "n is not supported; leave it out, or give 1"),
        (chat(temperature=3), 400, "temperature is not a number from 0 to 2"),
        (chat(temperature=float("nan")), 400, "temperature is not a number from 0 to 2"),
        (chat(seed=1.5), 400, "seed is not a whole number from -9223372036854775808 to 9223372036854775807"),
        (chat(stop=["a", ""]), 400, "stop is a text or up to 4, of 1 to 256 characters each"),
        (chat(stream="yes"), 400, "stream is neither true nor false"),
        (chat(top_logprobs=2), 400, "top_logprobs needs logprobs: true"),
        (chat(max_tokens=0), 400, "max_tokens is not a whole number from 1 to 2147483648"),
        (
            chat(response_format={"type": "xml"}),
            400,
            "response_format has a type, text, json_object or json_schema, and a schema",
        ),
        (schema({"type": "frog"}), 400, "the JSON schema cannot be compiled: Invalid type: frog"),
        (nested(500), 400, "the JSON schema cannot be compiled: recursion limit exceeded at line 1 column 3430"),
    ],
)
def test_a_bad_chat_is_refused_in_a_sentence(port, body, status, sentence):
    found, answer, _ = ask(port, "/v1/chat/completions", body)
    assert (found, answer["error"]["message"]) == (status, sentence)
    assert ask(port, "/health")[:2] == (200, {"status": "ok"})


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=NAME, prompt="and", max_tokens=200)
    assert refused.value.code == "context_length_exceeded"
    assert "3 + 200 tokens, and may be 128; shorten the prompt, or lower max_tokens" in str(refused.value)
    with pytest.raises(openai.BadRequestError, match="a prompt has token 999, and the vocabulary ids 0 to 425"):
        client.completions.create(model=NAME, prompt=[5, 999])
    with pytest.raises(openai.BadRequestError, match="neither a text nor a list of token ids"):
        client.completions.create(model=NAME, prompt=[])
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a b " * 200}])
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="and")


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_metrics(port, client, decoder):
    client.completions.create(model=NAME, prompt="and", max_tokens=3)
    until_idle(decoder)
    metrics = ask(port, "/metrics")[1]
    assert 'chat_requests_total{path="/v1/completions",status="200"}' in metrics
    for name in ("first_token", "between_tokens"):
        assert f'chat_{name}_seconds_bucket{{le="+Inf"}}' in metrics
    assert "\nchat_running_texts 0\n" in metrics
    assert "\nchat_queue_texts 0\n" in metrics


def test_half_characters_wait_for_the_rest(chat_example, words):
    text = "日本語 🙂 fox"
    ids = words(text, add_special_tokens=False)["input_ids"]
    writer, parts = chat_example.Writer(words, ()), list[str]()
    for token in ids:
        writer.add(token)
        parts.append(writer.take(is_last=False)[0])
    parts.append(writer.take(is_last=True)[0])
    assert "".join(parts) == text
    assert not any("�" in part for part in parts)
    random = torch.randint(5, len(words), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    writer, parts = chat_example.Writer(words, ()), list[str]()
    for token in random:
        writer.add(token)
        parts.append(writer.take(is_last=False)[0])
    parts.append(writer.take(is_last=True)[0])
    assert "".join(parts) == words.decode(random, skip_special_tokens=True)


def test_a_default_answer_fills_the_text(client, words):
    found = client.chat.completions.create(model=NAME, messages=CHAT, temperature=0)
    assert found.usage.total_tokens == LENGTH or found.choices[0].finish_reason == "stop"
