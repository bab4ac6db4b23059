"""Many clients at once, clients that die, and bodies that no client should send."""

import asyncio
import collections
import http.client
import json
import pathlib
import random
import re
import subprocess
import sys
import urllib.parse

import httpx
import pytest
from running_server import SECONDS

PROMPT = "Once upon a time, there was a little girl named Lily. "
BODY = {"model": "stories", "prompt": PROMPT, "max_tokens": 8}
HEADERS = {"Content-Type": "application/json"}


def _port(server):
  return urllib.parse.urlsplit(server.url).port


# --- 200 clients ---------------------------------------------------------------------------


async def _ask(client, url, i):
  """Every third streams, every second compresses; returns the status and whether the answer is whole."""
  body = {**BODY, "prompt": PROMPT * (1 + i % 5), "seed": i, "temperature": 1.0, "ignore_eos": True}
  if i % 2:
    body.update(rate=4, window=8)
  if i % 3:
    answer = await client.post(f"{url}/v1/completions", json=body)
    whole = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
    return answer.status_code, whole, answer.headers.get("retry-after")
  async with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as answer:
    lines = [line async for line in answer.aiter_lines()]
  return answer.status_code, "data: [DONE]" in lines and "length" in "".join(lines), answer.headers.get("retry-after")


def test_200_clients_at_once_are_answered_or_refused(server):
  async def run():
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=SECONDS, limits=limits) as client:
      return await asyncio.gather(*(_ask(client, server.url, i) for i in range(200)))

  answers = asyncio.run(run())
  statuses = collections.Counter(status for status, _, _ in answers)
  assert set(statuses) <= {200, 429}
  assert statuses[200] >= 64  # the length of the queue
  assert statuses[429]
  for status, whole, retry_after in answers:
    assert whole == (status == 200)
    assert (retry_after is None) == (status == 200)
  server.check_empty()
  metrics = server.get("/metrics")
  for status, count in statuses.items():
    assert f'kvc_http_requests_total{{endpoint="completions",status="{status}"}} {float(count)}' in metrics
  assert f"kvc_time_to_first_token_seconds_count {float(statuses[200])}" in metrics
  (latencies,) = re.findall(r"^kvc_inter_token_latency_seconds_count (.+)$", metrics, re.MULTILINE)
  assert 0 < float(latencies) <= 7 * statuses[200]  # without those that came together with a first token


# --- Clients that go away ------------------------------------------------------------------


def test_killed_clients_leave_nothing_behind(server):
  before = server.stats()["cancelled"]
  script = pathlib.Path(__file__).with_name("streaming_client.py")
  clients = [
      subprocess.Popen([sys.executable, script, str(_port(server))], stdout=subprocess.PIPE) for _ in range(6)]
  try:
    for client in clients[:4]:
      assert client.stdout.readline() == b"streaming\n"
  finally:
    for client in clients:
      client.kill()
      client.wait(SECONDS)
      client.stdout.close()
  server.check_empty()
  assert server.stats()["cancelled"] > before


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_cancels(server, stream):
  before = server.stats()["cancelled"]
  connection = http.client.HTTPConnection("127.0.0.1", _port(server), timeout=SECONDS)
  body = {**BODY, "max_tokens": 480, "ignore_eos": True, "n": 4, "stream": stream}
  connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
  if stream:
    assert connection.getresponse().readline().startswith(b"data: ")
  else:
    server.wait_until(lambda stats: stats["running"])
  connection.close()
  server.check_empty()
  assert server.stats()["cancelled"] > before


# --- Malformed requests --------------------------------------------------------------------


WRONG = [{}, [], [[]], {"a": 1}, [None], "\ud800", -7, 1e300, 2**70, True, "", [1.5], [[1], "a"], 0.5]
RIGHT = {  # what of WRONG a field may hold
    "prompt": ["\ud800", ""], "temperature": [0.5], "stop": [[], "\ud800"], "seed": [], "stream": [True],
    "rate": [2**70], "ignore_eos": [True], "stop_token_ids": [[]], "top_p": [0.5], "keep": [[]]}
CHAT = {"model": "stories", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def _wrong_field(rng):
  """A field with a value of the wrong type or far out of its range."""
  name = rng.choice(["model", "max_tokens", "n", "logprobs", "echo", "window", "stream_options", *RIGHT])
  value = rng.choice([value for value in WRONG if not any(value is right for right in RIGHT.get(name, ()))
                      and not (name == "echo" and value is True)])
  if name in ("prompt", "rate", "keep", "stop_token_ids", "stop") and value in ("\ud800", "", [], 2**70):
    value = {"a": 1}
  return {**BODY, "rate": 2, name: value}


def _wrong_message(rng):
  message = rng.choice([{}, [], None, "hi", {"role": "user"}, {"content": "hi"}, {"role": 5, "content": "hi"},
                        {"role": "user", "content": 5}, {"role": "user", "content": [5]},
                        {"role": "user", "content": "\ud800"}, {"role": ["user"], "content": "hi"}])
  return {**CHAT, "messages": rng.choice([[message], message, [*CHAT["messages"], message]])}


def _broken_bytes(rng):
  """Cut off, or with bytes changed so that it is no JSON."""
  while True:
    data = bytearray(json.dumps({**BODY, "rate": 2.5, "stop": ["a", "b"]}).encode())
    if rng.random() < 0.5:
      del data[rng.randrange(len(data)) :]
    for _ in range(rng.randrange(1, 6)):
      data.insert(rng.randrange(len(data) + 1), rng.randrange(256))
    try:
      json.loads(data.decode())
    except ValueError:
      return bytes(data)


def _odd_json(rng):
  return rng.choice([
      b"", b"null", b"[]", b"5", b'"text"', b"NaN", b"[" * 100_000, b'{"model":' * 50_000, b"\xff\xfe{}", b"{}{}",
      b'{"model": "stories", "prompt": "a", "temperature": NaN}', b'{"model": "stories", "prompt": "a", "rate": 1e999}',
      b'{"model": "stories", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"model": "\\ud800", "prompt": "a"}',
      b'{"model": "stories", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
      b'{"model": "stories", "prompt": ' + b'{"a":' * 900 + b"1" + b"}" * 901, b"[" * 5000 + b"]" * 5000,
      b'{"model": "stories", "prompt": "\\ud800"}', b'{"model": "stories", "prompt": "a", "\\u0000": 1}',
      b'{"model": "stories", "prompt": [' + b"1," * 2000 + b"1]}"])


def _malformed(rng):
  """Path, body and headers."""
  kind = rng.choice([_wrong_field, _wrong_message, _broken_bytes, _odd_json, "headers"])
  if kind == "headers":
    body = json.dumps(BODY).encode()
    return "/v1/completions", body, rng.choice([{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x"}])
  body = kind(rng)
  path = "/v1/chat/completions" if kind is _wrong_message else "/v1/completions"
  return path, body if isinstance(body, bytes) else json.dumps(body).encode(), HEADERS


def test_2000_malformed_bodies_are_refused(server):
  rng = random.Random(0)
  connection = http.client.HTTPConnection("127.0.0.1", _port(server), timeout=SECONDS)
  statuses = collections.Counter()
  for _ in range(2000):
    path, body, headers = _malformed(rng)
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    data = answer.read()
    assert 400 <= answer.status < 500, (answer.status, path, body[:300], data)
    error = json.loads(data)["error"]
    assert len(error["message"].splitlines()) == 1
    assert len(error["message"]) < 600
    statuses[answer.status] += 1
  connection.request("POST", "/v1/completions", json.dumps(BODY), HEADERS)
  assert connection.getresponse().status == 200
  connection.close()
  assert {400, 404, 415} <= set(statuses)
  server.check_empty()


def test_a_body_above_the_limit_is_refused_before_it_is_read(server):
  connection = http.client.HTTPConnection("127.0.0.1", _port(server), timeout=SECONDS)
  connection.putrequest("POST", "/v1/completions")
  for name, value in (*HEADERS.items(), ("Content-Length", str(1 << 40))):
    connection.putheader(name, value)
  connection.endheaders()
  assert connection.getresponse().status == 413
  connection.close()


def test_a_body_in_chunks_is_limited_too(server):
  connection = http.client.HTTPConnection("127.0.0.1", _port(server), timeout=SECONDS)
  pieces = (b" " * (1 << 20) for _ in range(5))
  connection.request("POST", "/v1/completions", pieces, HEADERS, encode_chunked=True)
  assert connection.getresponse().status == 413
  connection.close()


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405), ("DELETE", "/", 405),
    ("GET", "/%00%ff", 404), ("GET", "/v1/models/a/b", 404)])
def test_other_paths_and_methods(server, method, path, status):
  answer = httpx.request(method, server.url + path, timeout=SECONDS)
  assert answer.status_code == status
  assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
