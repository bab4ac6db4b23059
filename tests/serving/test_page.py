"""The status page in a real browser."""

import json
import shutil
import threading
import urllib.request

import pytest
from running_server import SECONDS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BUSY = {"model": "stories", "prompt": "Once upon a time, there was a little girl named Lily. " * 8, "rate": 4,
        "window": 8, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def page():
  browser = next(filter(None, map(shutil.which, BROWSERS)), None)
  if browser is None:
    pytest.skip(f"no browser is installed (one of {', '.join(BROWSERS)}); on Debian: apt-get install chromium")
  playwright = pytest.importorskip("playwright.sync_api")
  with playwright.sync_playwright() as driver:
    # No sandbox: containers run as root, where Chromium's own refuses to start.
    chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
    page = chromium.new_page()
    page.set_default_timeout(SECONDS * 1000)
    yield page
    chromium.close()


@pytest.fixture
def busy(server):
  """Keeps the server at work until the test ends."""
  ended = threading.Event()

  def work():
    while not ended.is_set():
      request = urllib.request.Request(
          f"{server.url}/v1/completions", json.dumps(BUSY).encode(), {"Content-Type": "application/json"})
      urllib.request.urlopen(request, timeout=SECONDS).read()

  threads = [threading.Thread(target=work) for _ in range(2)]
  for thread in threads:
    thread.start()
  yield server
  ended.set()
  for thread in threads:
    thread.join(SECONDS)


COLORS = """() => {
  const canvas = document.getElementById("heat");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colors = new Set();
  for (let i = 0; i < data.length; i += 4) colors.add([data[i], data[i + 1], data[i + 2], data[i + 3]].join());
  return [canvas.width, canvas.height, colors.size];
}"""
CARD = """(name) => document.querySelector(`dd[data-name="${name}"]`)?.textContent"""


def test_the_page_shows_load_and_the_heads_live(busy, page):
  faults, asked = [], []
  page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
  page.on("pageerror", lambda error: faults.append(str(error)))
  page.on("request", lambda request: asked.append(request.url))
  page.goto(busy.url)
  page.wait_for_function(f"() => /^[1-4] of 4$/.test(({CARD})('running'))")
  assert page.title() == "kvc_jax"
  assert page.inner_text("#model") == "stories"
  assert page.inner_text("#state").startswith("ok, up ")
  # Heads of one layer differ: each holds its own number of KVs.
  page.wait_for_function(f"() => ({COLORS})()[2] > 3")
  assert page.evaluate(COLORS)[:2] == [4, 5]
  first = int(page.evaluate(CARD, "tokens out").replace(",", ""))
  page.wait_for_function(f"(first) => Number(({CARD})('tokens out').replaceAll(',', '')) > first", arg=first)
  page.wait_for_function(f"() => Number(({CARD})('tokens/s out')) > 0")
  page.wait_for_function("() => { const full = document.getElementById('pool').value; return 0 < full && full < 1; }")
  page.hover("#heat")
  assert page.inner_text("#pointed").startswith("layer ")
  assert faults == []
  assert {url for url in asked if not url.startswith(("data:", busy.url))} == set()


def test_the_page_says_when_the_server_is_gone(engine, page):
  from running_server import serving

  with serving(engine) as server:
    page.goto(server.url)
    page.wait_for_function("() => document.getElementById('state').textContent.startsWith('ok')")
  page.wait_for_function("() => document.getElementById('state').textContent === 'the server does not answer'")
