"""What users of OpenAI's own Python client see."""

import contextlib

import httpx
import openai
import pytest
from running_server import SECONDS, serving

PROMPT = "Once upon a time, there was a little girl named Lily. "
GREEDY = {"model": "stories", "temperature": 0}


@pytest.fixture
def client(server):
  with connected(server.url) as client:
    yield client


@contextlib.contextmanager
def connected(url, key="none"):
  with openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=SECONDS, max_retries=0) as client:
    yield client


def _refused(error, call, *parts):
  with pytest.raises(error) as caught:
    call()
  body = caught.value.body
  assert set(body) == {"message", "type", "param", "code"}
  for part in parts:
    assert part in f"{body['message']} {body['param']} {body['code']}"
  return caught.value


def test_completions(client, engine):
  answer = client.completions.create(prompt=PROMPT, max_tokens=20, **GREEDY)
  (choice,) = answer.choices
  assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
  assert len(choice.text) > 20
  ids = engine.tokenizer.encode(PROMPT)
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
  assert answer.usage.total_tokens == len(ids) + 20
  same = client.completions.create(prompt=ids, max_tokens=20, **GREEDY)
  assert same.choices[0].text == choice.text
  assert answer.object == "text_completion"
  assert answer.id != same.id


def test_the_receipt_comes_with_the_usage(client):
  compress = {"rate": 4, "window": 8}
  answer = client.completions.create(prompt=PROMPT * 6, max_tokens=8, extra_body=compress, **GREEDY)
  (receipt,) = answer.usage.compression
  assert receipt["rate_asked"] == 4
  assert receipt["compressions"] == 1
  assert receipt["kvs_kept"] < receipt["kvs_seen"] / 2
  assert sum(receipt["kvs_kept_by_layer"]) == receipt["kvs_kept"]
  assert receipt["rate_reached"] == round(receipt["bytes_uncompressed"] / receipt["bytes_held"], 4)
  plain = client.completions.create(prompt=PROMPT * 6, max_tokens=8, **GREEDY)
  assert plain.usage.compression[0]["kvs_kept"] == plain.usage.compression[0]["kvs_seen"]


@pytest.mark.parametrize(("fields", "ours"), [
    ({"max_cache_tokens": 40, "protected_window_size": 8, "compress_once": True},
     {"max_cache_tokens": 40, "window": 8}),
    ({"max_cache_tokens": 40, "protected_window_size": 8, "compress_once": False},
     {"max_cache_tokens": 40, "window": 8, "interval": 4}),
    ({"max_cache_tokens": -1, "protected_window_size": 8, "compress_once": False}, {}),
])
def test_the_fields_of_the_reference(client, fields, ours):
  texts, receipts = [], []
  for extra in (fields, ours):
    answer = client.completions.create(prompt=PROMPT * 6, max_tokens=12, extra_body=extra, **GREEDY)
    texts.append(answer.choices[0].text)
    receipts.append(answer.usage.compression)
  assert texts[0] == texts[1]
  assert receipts[0] == receipts[1]


def test_scoring_allocation_and_kept_ranges(client):
  extra = {"rate": 8, "window": 4, "sinks": 2, "scoring": "random", "allocation": "head", "keep": [[0, 60]]}
  answer = client.completions.create(prompt=PROMPT * 6, max_tokens=4, extra_body=extra, **GREEDY)
  assert answer.usage.compression[0]["kvs_kept"] >= 64 * 20


@pytest.mark.parametrize("extra", [{}, {"rate": 4, "window": 8, "interval": 4}])
def test_a_stream_is_the_answer_in_pieces(client, extra):
  whole = client.completions.create(prompt=PROMPT * 3, max_tokens=24, extra_body=extra, **GREEDY)
  chunks = list(client.completions.create(
      prompt=PROMPT * 3, max_tokens=24, extra_body=extra, stream=True, stream_options={"include_usage": True},
      **GREEDY))
  texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
  assert len([text for text in texts if text]) > 1
  assert "".join(texts) == whole.choices[0].text
  reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
  assert (reasons[-1], set(reasons[:-1])) == ("length", {None})
  assert chunks[-1].usage == whole.usage
  assert not chunks[-1].choices
  assert len({chunk.id for chunk in chunks}) == 1


def test_chat_and_its_stream(client, engine):
  messages = [{"role": "system", "content": "Tell a story."},
              {"role": "user", "content": [{"type": "text", "text": "Of a "}, {"type": "text", "text": "dog."}]}]
  answer = client.chat.completions.create(messages=messages, max_completion_tokens=16, **GREEDY)
  assert answer.object == "chat.completion"
  message = answer.choices[0].message
  assert message.role == "assistant"
  assert len(message.content) > 10
  chunks = list(client.chat.completions.create(messages=messages, max_tokens=16, stream=True, **GREEDY))
  deltas = [chunk.choices[0].delta for chunk in chunks]
  assert deltas[0].role == "assistant"
  assert "".join(delta.content or "" for delta in deltas) == message.content
  assert chunks[-1].choices[0].finish_reason == "length"
  ids = engine.tokenizer.encode("system: Tell a story.\nuser: Of a dog.\nOnce", add_special_tokens=False)
  raw = client.completions.create(prompt=ids, max_tokens=16, **GREEDY)
  assert raw.choices[0].text == message.content


def test_chat_goes_on_to_the_end_of_the_context(client, engine):
  answer = client.chat.completions.create(
      messages=[{"role": "user", "content": "hi"}], extra_body={"ignore_eos": True}, **GREEDY)
  assert answer.usage.total_tokens == engine.max_model_len


def test_stop_strings(client):
  answer = client.completions.create(prompt=PROMPT, max_tokens=64, stop=["play", "xyz"], **GREEDY)
  assert answer.choices[0].finish_reason == "stop"
  assert "play" not in answer.choices[0].text
  chunks = client.completions.create(prompt=PROMPT, max_tokens=64, stop="play", stream=True, **GREEDY)
  assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_seeds_and_samples(client):
  settings = {"model": "stories", "prompt": PROMPT, "max_tokens": 24, "temperature": 1.0}
  three = client.completions.create(n=3, seed=7, **settings)
  assert [choice.index for choice in three.choices] == [0, 1, 2]
  assert len({choice.text for choice in three.choices}) > 1
  assert len(three.usage.compression) == 3
  assert three.usage.completion_tokens > 24
  again = client.completions.create(n=3, seed=7, **settings)
  assert [c.text for c in again.choices] == [c.text for c in three.choices]
  assert client.completions.create(seed=7, **settings).choices[0].text == three.choices[0].text
  chunks = list(client.completions.create(n=3, seed=7, stream=True, **settings))
  for i in range(3):
    mine = [c.choices[0].text for c in chunks if c.choices[0].index == i]
    assert "".join(mine) == three.choices[i].text


def test_several_prompts_and_echo(client):
  prompts = [PROMPT, "The dog", "Tim was"]
  answer = client.completions.create(prompt=prompts, echo=True, n=2, max_tokens=8, **GREEDY)
  assert [choice.text.startswith(prompts[i // 2]) for i, choice in enumerate(answer.choices)] == [True] * 6
  alone = client.completions.create(prompt="The dog", max_tokens=8, **GREEDY)
  assert answer.choices[2].text == "The dog" + alone.choices[0].text
  chunks = client.completions.create(prompt="The dog", echo=True, max_tokens=8, stream=True, **GREEDY)
  assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[2].text


def test_logprobs(client):
  answer = client.completions.create(prompt=PROMPT, max_tokens=6, logprobs=3, **GREEDY)
  found = answer.choices[0].logprobs
  assert "".join(found.tokens) == answer.choices[0].text
  assert found.text_offset == [sum(len(t) for t in found.tokens[:i]) for i in range(6)]
  for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
    assert len(top) == 3
    assert max(top.values()) == top[token] == value <= 0  # greedy
  chat = client.chat.completions.create(
      messages=[{"role": "user", "content": "hi"}], max_tokens=6, logprobs=True, top_logprobs=2, **GREEDY)
  entries = chat.choices[0].logprobs.content
  assert "".join(entry.token for entry in entries) == chat.choices[0].message.content
  assert [len(entry.top_logprobs) for entry in entries] == [2] * 6
  assert bytes(entries[0].bytes).decode() == entries[0].token
  chunks = client.chat.completions.create(
      messages=[{"role": "user", "content": "hi"}], max_tokens=6, logprobs=True, stream=True, **GREEDY)
  streamed = [e.logprob for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
  assert streamed == [entry.logprob for entry in entries]


def test_models(client):
  assert [model.id for model in client.models.list()] == ["stories"]
  assert client.models.retrieve("stories").owned_by == "kvc_jax"
  _refused(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"), "gpt-4", "model_not_found")


@pytest.mark.parametrize(("fields", "parts"), [
    ({"temperature": -1}, ["temperature is -1", "from 0"]),
    ({"max_tokens": 0}, ["max_tokens is 0"]),
    ({"n": 200}, ["n is 200"]),
    ({"logit_bias": {"5": 1}}, ["logit_bias", "not supported"]),
    ({"suffix": "end"}, ["suffix", "not supported"]),
    ({"frequency_penalty": 1.5}, ["frequency_penalty", "not supported"]),
    ({"best_of": 3}, ["best_of", "not supported"]),
    ({"echo": True, "logprobs": 1}, ["echo does not go with logprobs"]),
    ({"stream_options": {"include_usage": True}}, ["stream_options"]),
    ({"stop": [""]}, ["stop"]),
    ({"extra_body": {"stop_token_ids": [2**31 - 1, 5]}}, ["stop_token_ids", "each from 0 to 1073741824"]),
    ({"prompt": [1, 5000]}, ["5000", "outside the vocabulary"]),
    ({"prompt": "Once " * 600}, ["context", "context_length_exceeded"]),
    ({"extra_body": {"rate": 0.5}}, ["rate is 0.5", "at least 1"]),
    ({"extra_body": {"window": 8}}, ["window compresses nothing"]),
    ({"extra_body": {"max_cache_tokens": 8, "window": 16}}, ["max_cache_tokens (8) is below window"]),
    ({"extra_body": {"rate": 2, "window": 8, "protected_window_size": 9}}, ["differ"]),
    ({"extra_body": {"rate": 2, "interval": 8, "compress_once": True}}, ["contradict"]),
    ({"extra_body": {"rate": 2, "scoring": "best"}}, ["scoring is 'best'", "window, full, random"]),
    ({"extra_body": {"speed": 9}}, ["'speed' is no field"]),
    ({"extra_body": {"messages": []}}, ["'messages' is no field of this endpoint"]),
])
def test_bad_fields_are_named(client, fields, parts):
  fields = {"prompt": PROMPT, **GREEDY, **fields}
  error = _refused(openai.BadRequestError, lambda: client.completions.create(**fields), *parts)
  assert error.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(("fields", "param"), [
    ({"prompt": [1, 5000]}, "prompt"), ({"prompt": "a", "n": 100}, "n"), ({"prompt": ["a"] * 100}, "prompt")])
def test_what_the_engine_refuses_has_its_field_named(client, fields, param):
  """More than 4 slots and 64 that wait, for one."""
  error = _refused(openai.BadRequestError, lambda: client.completions.create(**GREEDY, **fields))
  assert error.param == param


@pytest.mark.parametrize(("fields", "parts"), [
    ({"messages": []}, ["messages", "at least one"]),
    ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "a"}]}, ["role"]),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, ["type text"]),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, ["tools", "not supported"]),
    ({"response_format": {"type": "json_object"}}, ["response_format", "not supported"]),
    ({"top_logprobs": 2}, ["top_logprobs goes with logprobs"]),
    ({"max_tokens": 5, "max_completion_tokens": 6}, ["differ"]),
])
def test_bad_chat_fields_are_named(client, fields, parts):
  fields = {"messages": [{"role": "user", "content": "hi"}], **GREEDY, **fields}
  _refused(openai.BadRequestError, lambda: client.chat.completions.create(**fields), *parts)


def test_fields_that_ask_for_nothing_are_let_through(client):
  client.completions.create(prompt=PROMPT, max_tokens=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={},
                            best_of=1, user="me", suffix=None, **GREEDY)
  client.chat.completions.create(
      messages=[{"role": "user", "content": "hi", "name": "Tim"}], max_tokens=1, response_format={"type": "text"},
      tools=[], store=False, metadata={"a": "b"}, **GREEDY)


def test_another_model_and_a_missing_one(client):
  _refused(openai.NotFoundError, lambda: client.completions.create(model="gpt-4", prompt="a"), "gpt-4", "stories")
  without = httpx.post(f"{client.base_url}completions", json={"prompt": "a"}, timeout=SECONDS)
  assert (without.status_code, without.json()["error"]["param"]) == (400, "model")


def test_the_api_key(engine):
  with serving(engine, api_key="secret") as server:
    for wrong in ("none", "secre", "secret2"):
      with connected(server.url, wrong) as client:
        error = _refused(openai.AuthenticationError, client.models.list, "API key")
        assert error.response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server.url}/v1/models", timeout=SECONDS).status_code == 401
    with connected(server.url, "secret") as client:
      assert client.completions.create(prompt="Once", max_tokens=2, **GREEDY).choices
    assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200


def test_compression_by_default(engine):
  from kvc_jax import Compression

  with serving(engine, compression=Compression(rate=4, window=8)) as server, connected(server.url) as client:
    answer = client.completions.create(prompt=PROMPT * 6, max_tokens=4, **GREEDY)
    assert answer.usage.compression[0]["rate_asked"] == 4
    answer = client.completions.create(
        prompt=PROMPT * 6, max_tokens=4, extra_body={"max_cache_tokens": -1}, **GREEDY)
    assert answer.usage.compression[0]["compressions"] == 0


def test_a_request_that_takes_too_long(engine):
  with serving(engine, request_timeout=0.05) as server, connected(server.url) as client:
    settings = {"prompt": PROMPT, "max_tokens": 400, "extra_body": {"ignore_eos": True}, "n": 4, **GREEDY}
    with pytest.raises(openai.InternalServerError) as caught:
      client.completions.create(**settings)
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="longer than this server allows"):
      list(client.completions.create(stream=True, **settings))
    server.check_empty()
