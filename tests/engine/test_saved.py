"""Requests are saved to a file, and go on elsewhere as if they had never left."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kvc_jax import Compression, Engine, FullAttention, InputError, SamplingParams
from kvc_jax.cache.sequence_file import load_sequence, save_sequence
from kvc_jax.cache.state import check_invariants

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 2
GREEDY = SamplingParams(temperature=0, max_tokens=40)
DRAWN = SamplingParams(temperature=1.0, seed=5, max_tokens=40, logprobs=2)
CASES = {
    "plain": (GREEDY, None),
    "drawn": (DRAWN, None),
    "compressed once": (GREEDY, Compression(rate=4, window=8)),
    "compressed on and on": (DRAWN, Compression(rate=4, window=8, interval=4, scoring=FullAttention(), keep=[(2, 6)])),
    "stop string": (SamplingParams(temperature=0, max_tokens=60, stop="friends"), None),
}
OPTIONS = {"block_size": 4, "chunk_size": 32, "max_model_len": 256, "steps_per_sync": 3}


@pytest.fixture(scope="module")
def engine():
  return Engine(STORIES, max_num_seqs=2, **OPTIONS)


ELSEWHERE = {**OPTIONS, "max_num_seqs": 3, "num_blocks": 3000}
"""Other slots, another pool."""


@pytest.fixture(scope="module")
def other():
  return Engine(STORIES, **ELSEWHERE)


def _run(engine, request_id, steps=None):
  """Updates of one request, for `steps` steps or to its end."""
  updates = []
  while engine.has_work and (steps is None or steps):
    updates += [u for u in engine.step() if u.request_id == request_id]
    steps = None if steps is None else steps - 1
  return updates


def _what(output):
  receipt = output.receipt
  return (output.token_ids, output.text, output.finish_reason, output.logprobs, receipt.kvs_kept.tolist(),
          receipt.compressions, receipt.freed_blocks, receipt.tokens_seen, output.prompt_token_ids)


@pytest.mark.parametrize("steps", [9, 11, 13])
@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_as_if_it_had_never_left(engine, other, case, steps, tmp_path):
  whole = _run(engine, engine.add(PROMPT, *CASES[case]))[-1].output
  first = engine.add(PROMPT, *CASES[case])
  before = _run(engine, first, steps)
  assert before
  assert before[-1].finish_reason is None
  engine.save(first, tmp_path / "saved")
  engine.cancel(first)
  neighbour = other.add("The dog", GREEDY)  # takes the first slot
  other.step()
  second = other.resume(tmp_path / "saved")
  after = _run(other, second)
  assert _what(after[-1].output) == _what(whole)
  assert "".join(u.text for u in before + after) == whole.text
  assert [i for u in before + after for i in u.token_ids] == whole.token_ids
  assert neighbour != second
  for used in (engine, other):
    check_invariants(used.batch.state)
    assert int(used.batch.state.free_count) == used.config.num_blocks - 1


def test_what_is_saved_goes_on_here_as_well(engine, tmp_path):
  case = CASES["compressed on and on"]
  whole = _run(engine, engine.add(PROMPT, *case))[-1].output
  request_id = engine.add(PROMPT, *case)
  for i in range(12):
    engine.step()
    if i > 6:
      engine.save(request_id, tmp_path / "saved")
  assert _what(_run(engine, request_id)[-1].output) == _what(whole)


def test_another_process_goes_on(engine, tmp_path):
  case = CASES["compressed on and on"]
  whole = _run(engine, engine.add(PROMPT, *case))[-1].output
  request_id = engine.add(PROMPT, *case)
  _run(engine, request_id, 10)
  engine.save(request_id, tmp_path / "saved")
  engine.cancel(request_id)
  program = (
      "import json, sys; from kvc_jax import Engine\n"
      "engine = Engine(sys.argv[1], **json.loads(sys.argv[2])); engine.resume(sys.argv[3])\n"
      "while engine.has_work:\n  for update in engine.step(): output = update.output\n"
      "print(json.dumps([output.token_ids, output.receipt.kvs_kept.tolist()]))")
  command = [sys.executable, "-c", program, STORIES, json.dumps(ELSEWHERE), tmp_path / "saved"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert json.loads(done.stdout) == [whole.token_ids, whole.receipt.kvs_kept.tolist()]


@pytest.mark.parametrize(("first_pool", "swaps"), [(401, False), (None, True)])
def test_a_resumed_request_gives_way_and_still_ends_as_it_would(first_pool, swaps, tmp_path):
  """One whose prompt the pool cannot hold is compressed while it starts over, or is swapped where it was not before."""
  prompt = [i * 7 % 500 + 3 for i in range(160)]
  options = {**OPTIONS, "max_num_seqs": 2}
  params, compression = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), Compression(
      max_cache_tokens=16, window=4)
  engine = Engine(STORIES, num_blocks=first_pool, **options)
  request_id = engine.add(prompt, params, compression)
  _run(engine, request_id, 12)
  engine.save(request_id, path := tmp_path / "saved")
  expected = _run(engine, request_id)[-1].output
  tight = Engine(STORIES, num_blocks=401, swap_bytes=0, **options)
  older = tight.add([1] * 8, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
  while not tight.step():
    pass
  request_id = tight.resume(path)
  outputs = {u.request_id: u.output for _ in range(300) for u in tight.step() if u.output}
  assert outputs.keys() == {older, request_id}
  assert outputs[request_id].token_ids == expected.token_ids
  assert outputs[request_id].receipt.kvs_kept.tolist() == expected.receipt.kvs_kept.tolist()
  assert tight.stats().preemptions > 0
  assert (tight.stats().swaps > 0) == swaps
  check_invariants(tight.batch.state)


@pytest.mark.parametrize("name", ["", "/", "x" * 300, "a\0b", "taken/file"])
def test_a_file_that_cannot_be_written_is_an_error_of_one_line(name, engine, tmp_path):
  (tmp_path / "taken").write_text("")
  request_id = engine.add(PROMPT, GREEDY)
  _run(engine, request_id, 10)
  with pytest.raises(InputError, match="cannot be written"):
    engine.save(request_id, name if name in ("", "/") else f"{tmp_path}/{name}")
  engine.cancel(request_id)


def test_what_cannot_be_saved(engine, tmp_path):
  with pytest.raises(InputError, match="unknown or has ended"):
    engine.save(10**6, tmp_path / "a")
  request_id = engine.add(PROMPT, GREEDY)
  with pytest.raises(InputError, match="not past its prompt"):
    engine.save(request_id, tmp_path / "a")
  _run(engine, request_id)
  with pytest.raises(InputError, match="unknown or has ended"):
    engine.save(request_id, tmp_path / "a")
  assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_resumed(engine, tmp_path):
  request_id = engine.add(PROMPT, GREEDY)
  _run(engine, request_id, 10)
  engine.save(request_id, path := tmp_path / "saved")
  engine.cancel(request_id)
  for options, message in (
      ({"max_model_len": 64}, "raise max_model_len"), ({"num_blocks": 200}, "but the pool has 199"),
      ({"dtype": "bfloat16"}, "another model")):
    with pytest.raises(InputError, match=message):
      Engine(STORIES, max_num_seqs=1, **{**OPTIONS, **options}).resume(path)
  found = load_sequence(path, model=engine.fingerprint)
  for settings in ({}, {**found.settings, "prompt_tokens": 3}, {**found.settings, "params": {"top_p": 7}},
                   {**found.settings, "progress": {}}, {**found.settings, "compression": {"rate": "fast"}}):
    save_sequence(path, found.snapshot, token_ids=found.token_ids, model=engine.fingerprint, settings=settings)
    with pytest.raises(InputError, match="not written by an engine"):
      engine.resume(path)
  path.write_bytes(path.read_bytes()[: np.random.default_rng(0).integers(10, 1000)])
  with pytest.raises(InputError, match="cut off or damaged"):
    engine.resume(path)
  assert not engine.has_work
