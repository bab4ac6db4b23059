"""`kvc serve` as a process: it starts, answers, drains at SIGTERM, and is clear about bad options."""

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest
from running_server import SECONDS, STORIES

from kvc_jax.cli import main

HEADERS = {"Content-Type": "application/json"}


@contextlib.contextmanager
def _command(*options, **environment):
  command = [sys.executable, "-m", "kvc_jax.cli", "serve", STORIES, "--port", "0", "--block-size", "4",
             "--max-num-seqs", "2", "--warm-up", "none", *options]
  process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
  try:
    yield process
  finally:
    process.kill()
    process.communicate(timeout=SECONDS)


def _port(process):
  line = process.stdout.readline()
  assert line.startswith("serving stories260K at http://127.0.0.1:"), line + process.stderr.read()
  return int(line.rsplit(":", 1)[1])


def test_it_drains_and_ends():
  """A stream that runs when the signal comes is finished; new connections are refused."""
  with _command("--prefix-caching", "--prefix-interval", "32", KVC_API_KEY="secret") as process:
    connection = http.client.HTTPConnection("127.0.0.1", port := _port(process), timeout=SECONDS)
    with contextlib.closing(connection):
      body = {"model": "stories260K", "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True}
      connection.request("POST", "/v1/completions", json.dumps(body), {**HEADERS, "Authorization": "Bearer secret"})
      answer = connection.getresponse()
      assert answer.status == 200
      while not answer.readline().startswith(b"data: "):  # signs of life while steps compile
        pass
      process.send_signal(signal.SIGTERM)
      assert answer.read().endswith(b"data: [DONE]\n\n")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    with pytest.raises(ConnectionRefusedError):
      socket.create_connection(("127.0.0.1", port), timeout=SECONDS)


@pytest.fixture(autouse=True)
def _root_logger():
  """The command sets it up for its process."""
  handlers, level = list(logging.root.handlers), logging.root.level
  yield
  logging.root.handlers[:] = handlers
  logging.root.setLevel(level)


def test_lines_of_the_log_have_a_time(capsys):
  _fails(["--port", "0", "--num-blocks", "4"], "num_blocks", capsys)
  (handler,) = logging.root.handlers
  assert "%(asctime)s" in handler.formatter._fmt


def _fails(options, message, capsys):
  assert main(["serve", str(STORIES), *options]) == 2
  err = capsys.readouterr().err
  assert len(err.strip().splitlines()) == 1, err
  assert message in err


@pytest.mark.parametrize(("options", "message"), [
    (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    (["--port", "99999"], "port is 99999"),
    (["--window", "8"], "--window compresses nothing"),
    (["--max-body-bytes", "0"], "max_body_bytes is 0"),
    (["--request-timeout", "nan"], "request_timeout is nan"),
    (["--api-key-file", "no-such-file"], "no-such-file is missing; give a file with the API key"),
    (["--api-key-file", os.devnull], "/dev/null is empty"),
    (["--port", "0", "--max-waiting", "-1"], "max_waiting is -1"),
    (["--port", "0", "--num-blocks", "4"], "num_blocks"),
    (["--port", "0", "--prefix-caching", "--prefix-interval", "0"], "prefix_interval is 0"),
])
def test_bad_options(options, message, capsys):
  _fails(options, message, capsys)


def test_a_port_that_is_taken(capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    _fails(["--port", str(taken.getsockname()[1])], "give another --host or --port", capsys)


def test_what_is_missing_is_named(capsys, monkeypatch):
  import importlib.util

  found = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
  _fails([], "the server needs uvicorn; run: pip install 'kvc_jax[serve]'", capsys)
