"""The script that looks at what was evicted: it finds the answer in the prompt, and what each head holds of it."""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import pytest

from kvc_jax.errors import InputError
from kvc_jax.evaluation.haystack import held_out_sentences
from kvc_jax.evaluation.recall import SampleBuilder
from kvc_jax.evaluation.task import Sample
from kvc_jax.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
  sys.path.insert(0, str(ROOT / "scripts"))
  try:
    spec = importlib.util.spec_from_file_location("look_at_evicted", ROOT / "scripts" / "look_at_evicted.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
  finally:
    sys.path.remove(str(ROOT / "scripts"))


def test_the_value_is_found_where_it_stands(script):
  tokenizer = Tokenizer.from_folder(ROOT / "assets" / "recall-7m")
  builder = SampleBuilder(held_out_sentences(), tokenizer)
  for task in ("single", "multi_key"):
    sample = builder.sample(task, 1024, 0, seed=0)
    (places,) = script._places(tokenizer, sample)
    ids = tokenizer.encode(sample.prompt)
    assert tokenizer.decode([ids[place] for place in places]).strip() == sample.references[0]
    assert len(tokenizer.encode(sample.prompt[: sample.prompt.index(sample.references[0])].rstrip())) == places[0]
  several = builder.sample("multi_value", 1024, 0, seed=0)
  ids = tokenizer.encode(several.prompt)
  found = [tokenizer.decode([ids[i] for i in places]).strip() for places in script._places(tokenizer, several)]
  assert len(found) == 4
  assert " ".join(found) == several.references[0]
  with pytest.raises(InputError, match="not in its prompt"):
    script._places(tokenizer, Sample(id="", prompt="Nothing here.", max_new_tokens=1, references=("1234",)))


def test_the_names_on_the_way_to_a_value_count_too(script):
  tokenizer = Tokenizer.from_folder(ROOT / "assets" / "recall-7m")
  prompt = "VAR TEJ = 7851. VAR DUK = WOL. It was. VAR JUQ = TEJ. VAR WOL = KUM. VAR KUM = 4428. Trace: VAR DUK ="
  sample = Sample(id="", prompt=prompt, max_new_tokens=5, references=("4428",))
  ids = tokenizer.encode(sample.prompt)
  found = script._places(tokenizer, sample)
  assert [tokenizer.decode([ids[i] for i in places]).split()[0] for places in found] == ["4428", "WOL", "KUM"]
  assert found.shape == (3, 4)
  assert script._links("Trace: VAR DUK =") == []


def test_what_each_head_holds_of_the_value(script):
  """Two layers of one head; the second has evicted the third digit. -1 pads positions."""
  sample = Sample(id="", prompt="", max_new_tokens=4, references=("1234",))
  positions = np.array([[[4, 5, 6, 7, 9]], [[4, 5, 7, 8, -1]]])
  output = types.SimpleNamespace(text=" 1234 .", receipt=types.SimpleNamespace(positions=positions))
  llm = types.SimpleNamespace(generate=lambda *args, **kwargs: [output, output])
  wrong = Sample(id="", prompt="", max_new_tokens=4, references=("9999",))
  right, held = script._run(llm, "single", [sample, wrong], [np.arange(4, 8)[None]] * 2, None)
  assert right == 50
  np.testing.assert_array_equal(held[0], [[[[1, 1, 1, 1]]], [[[1, 1, 0, 1]]]])


@pytest.mark.parametrize(("options", "words"), [
    (["no-such-model"], "no-such-model"), (["--count", "0"], "--count is 0"), (["--length", "9"], "--length is 9")])
def test_bad_input_is_one_line(script, monkeypatch, capsys, options, words):
  monkeypatch.setattr(sys, "argv", ["look_at_evicted.py", *options])
  assert script.main() == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.count("\n") == 1
