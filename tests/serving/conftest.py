"""One engine for all tests of the server, and a server around it."""

import json
import shutil

import pytest
from running_server import STORIES, serving

from kvc_jax.engine.engine import Engine

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Once{% endif %}")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
  """The shipped model with a chat template."""
  folder = tmp_path_factory.mktemp("model") / "stories"
  shutil.copytree(STORIES, folder)
  config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
  (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}), encoding="utf-8")
  return folder


@pytest.fixture(scope="session")
def engine(chat_model):
  """Four slots, and a pool for less than three sequences of full length."""
  return Engine(chat_model, block_size=4, chunk_size=32, max_num_seqs=4, max_waiting=64, num_blocks=6000)


@pytest.fixture
def server(engine):
  with serving(engine) as running:
    yield running
    running.check_empty()
