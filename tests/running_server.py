"""A server in this process, on a free port, with the shipped model."""

import contextlib
import dataclasses
import json
import pathlib
import threading
import time
import urllib.request

import uvicorn

from kvc_jax.cache.state import check_invariants
from kvc_jax.engine.engine import Engine
from kvc_jax.serving.app import AppSettings
from kvc_jax.serving.server import Address, listen, make_server

STORIES = pathlib.Path(__file__).parents[1] / "assets" / "stories260K"
SECONDS = 60
"""Nothing that a test waits for may take longer."""


@dataclasses.dataclass
class Running:
  """A server that runs, and its engine, to look at while it is idle."""

  url: str
  engine: Engine
  server: uvicorn.Server

  def get(self, path):
    with urllib.request.urlopen(self.url + path, timeout=SECONDS) as answer:
      return answer.read().decode()

  def stats(self):
    return json.loads(self.get("/status"))["stats"]

  def wait_until(self, holds):
    """Waits until `holds(stats)`."""
    end = time.monotonic() + SECONDS
    while not holds(stats := self.stats()):
      assert time.monotonic() < end, stats
      time.sleep(0.02)
    return stats

  def check_empty(self):
    """Waits until nothing runs; every block must be free then."""
    self.wait_until(lambda stats: not stats["running"] and not stats["waiting"])
    state = self.engine.batch.state
    check_invariants(state)
    assert int(state.free_count) == self.engine.config.num_blocks - 1
    assert not self.engine.has_work


@contextlib.contextmanager
def serving(engine, **settings):
  """Runs a server around an engine."""
  ready = threading.Event()
  urls = []

  def on_ready(url):
    urls.append(url)
    ready.set()

  with listen(Address(port=0)) as sock:
    server = make_server(engine, AppSettings(**{"model": "stories", "drain_timeout": 10.0, **settings}), on_ready)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
      assert ready.wait(SECONDS)
      yield Running(urls[0], engine, server)
    finally:
      server.should_exit = True
      thread.join(SECONDS)
      assert not thread.is_alive()
