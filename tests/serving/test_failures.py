"""What clients see when the engine fails, or when they themselves are too slow."""

import asyncio
import http.client
import json
import time
import urllib.parse

import httpx
import pytest
from running_server import SECONDS, serving

from kvc_jax.serving.stream import EventStream

PROMPT = "Once upon a time"
BODY = {"model": "stories", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_answers_500_and_is_unhealthy(engine, monkeypatch, stream):
  fails_at, step = [3], engine.step

  def failing_step():
    fails_at[0] -= 1
    if not fails_at[0]:
      raise RuntimeError("the device is lost")
    return step()

  monkeypatch.setattr(engine, "step", failing_step)
  try:
    with serving(engine) as server:
      assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
      answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": stream}, timeout=SECONDS)
      assert answer.status_code == (200 if stream else 500)  # a stream has begun by then
      error = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))["error"]
      assert (error["type"], error["code"]) == ("server_error", "engine_failed")
      assert "[DONE]" not in answer.text
      health = httpx.get(f"{server.url}/health", timeout=SECONDS)
      assert (health.status_code, health.json()) == (503, {"status": "failed"})
      assert httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=SECONDS).status_code == 500
      assert server.get("/metrics")
      assert json.loads(server.get("/status"))["status"] == "failed"
  finally:
    engine.reset()


@pytest.mark.parametrize(("drain_timeout", "second_signal"), [(1.0, False), (600.0, True)])
def test_while_it_drains_health_says_so_and_a_stream_that_is_cut_ends_in_an_error(
    engine, monkeypatch, caplog, drain_timeout, second_signal):
  step = engine.step

  def slow_step():
    time.sleep(0.05)
    return step()

  monkeypatch.setattr(engine, "step", slow_step)
  try:
    with serving(engine, drain_timeout=drain_timeout) as server:
      body = {**BODY, "prompt": [PROMPT] * 8, "stream": True}
      with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=SECONDS) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.server.should_exit = True
        while (health := httpx.get(f"{server.url}/health", timeout=SECONDS)).status_code == 200:
          pass
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})
        refused = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=SECONDS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert server.get("/metrics")
        server.server.force_exit = second_signal
        last = [line for line in lines if line][-1]
      assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
  finally:
    engine.reset()
  assert not [record for record in caplog.records if record.exc_info]


def test_a_prompt_that_the_engine_chokes_on_fails_alone(engine, monkeypatch):
  """An unexpected exception of `add` is that request's own."""
  add = engine.add

  def odd_add(prompt, *rest):
    if len(prompt) == 1:
      raise RuntimeError("this one is odd")
    return add(prompt, *rest)

  monkeypatch.setattr(engine, "add", odd_add)
  with serving(engine) as server:
    body = {**BODY, "max_tokens": 2}
    answer = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": [1]}, timeout=SECONDS)
    assert answer.status_code == 500
    assert "odd" not in answer.text
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS).status_code == 200
    server.check_empty()


def test_a_body_that_does_not_come(engine):
  with serving(engine, body_timeout=0.1) as server:
    connection = http.client.HTTPConnection("127.0.0.1", urllib.parse.urlsplit(server.url).port, timeout=SECONDS)
    connection.putrequest("POST", "/v1/completions")
    for name, value in (("Content-Type", "application/json"), ("Content-Length", "100")):
      connection.putheader(name, value)
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 408
    answer.read()
    connection.close()


def test_a_client_that_does_not_read_is_let_go(caplog):
  closed = []

  async def events():
    while True:
      yield b"data: 1\n\n"

  async def receive():
    await asyncio.Event().wait()

  async def send(message):
    if message.get("body"):
      await asyncio.Event().wait()  # its buffers are full

  stream = EventStream(events(), lambda: closed.append(True), longest=0.05)
  asyncio.run(asyncio.wait_for(stream({}, receive, send), SECONDS))
  assert closed == [True]
  assert "did not read" in caplog.text


def test_a_client_that_is_gone_before_its_stream_begins():
  closed = []

  async def events():
    yield b"data: 1\n\n"

  async def receive():
    return {"type": "http.disconnect"}

  async def send(message):
    await asyncio.Event().wait()

  asyncio.run(asyncio.wait_for(EventStream(events(), lambda: closed.append(True), longest=9)({}, receive, send), 9))
  assert closed == [True]
