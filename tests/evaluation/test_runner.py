"""Tasks run through a real engine, are broken off and go on."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from kvc_jax import LLM, Compression, Engine, FullAttention, InputError, SamplingParams
from kvc_jax.evaluation import runner
from kvc_jax.evaluation.records import open_records, settings_path
from kvc_jax.evaluation.runner import described, run_task
from kvc_jax.evaluation.task import Sample

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"
STARTS = ("Once upon a time", "The sun was hot", "Lily had a cat", "Tom saw a big dog", "The bird")


@dataclasses.dataclass
class Starts:
  """Stories to go on with; the score is the share of the text that is letters. `broken` ends it at that sample."""

  broken: str | None = None
  name: str = "starts"
  settings: dict = dataclasses.field(default_factory=lambda: {"version": 1})
  scored: list[str] = dataclasses.field(default_factory=list)

  def __len__(self):
    return len(STARTS)

  def samples(self, tokenizer):
    for i, start in enumerate(STARTS):
      prompt = tokenizer.encode(start * 8) if i % 2 else start * 8
      yield Sample(id=f"s{i}", prompt=prompt, max_new_tokens=3 + 4 * i, references=("x",), group="ab"[i % 2],
                   extra={"length": i})

  def score(self, prediction, sample):
    if sample.id == self.broken:
      raise KeyboardInterrupt
    self.scored.append(sample.id)
    return sum(map(str.isalpha, prediction)) / len(prediction)


@pytest.fixture(scope="module")
def engine():
  return Engine(STORIES, block_size=4, max_num_seqs=2, chunk_size=32)


def without_times(records):
  return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory):
  """An unbroken run."""
  return run_task(engine, Starts(), tmp_path_factory.mktemp("whole") / "starts.jsonl", None, {"model": "m"})


def test_records_are_what_generate_gives(whole):
  outputs = LLM(STORIES, block_size=4, max_num_seqs=1).generate(
      [start * 8 for start in STARTS],
      [SamplingParams(temperature=0, max_tokens=3 + 4 * i) for i in range(len(STARTS))])
  assert [record["id"] for record in whole] == [f"s{i}" for i in range(len(STARTS))]
  for record, output in zip(whole, outputs, strict=True):
    assert record["pred"] == output.text
    assert record["answers"] == ["x"]
    assert record["prompt_tokens"] == len(output.prompt_token_ids)
    assert record["output_tokens"] == len(output.token_ids)
    assert record["bytes_held"] == record["bytes_uncompressed"] == output.receipt.bytes_held
    assert record["kvs_kept"] == output.receipt.kvs_kept.tolist()
    assert record["score"] == sum(map(str.isalpha, output.text)) / len(output.text)
    assert record["seconds"] >= 0


def test_compressed_runs_hold_fewer_bytes(engine, tmp_path):
  records = run_task(engine, Starts(), tmp_path / "starts.jsonl", Compression(rate=4, window=4, interval=2), {})
  for record in records:
    assert record["blocks_held"] < record["blocks_uncompressed"] * 0.6
    assert record["bytes_held"] * record["blocks_uncompressed"] == record["bytes_uncompressed"] * record["blocks_held"]


def test_seconds_are_the_engine_s_alone(engine, tmp_path, monkeypatch):
  """On a clock that goes on by 1 in a step and by 1000 in all that is no work of the engine's."""
  now, steps = [0.0], []
  monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

  def passes(seconds):
    now[0] += seconds

  class Slow(Starts):
    def samples(self, tokenizer):
      for sample in super().samples(tokenizer):
        passes(1000)
        yield sample

    def score(self, prediction, sample):
      passes(1000)
      return super().score(prediction, sample)

  step = engine.step

  def counted_step():
    steps.append(passes(1))
    return step()

  monkeypatch.setattr(engine, "step", counted_step)
  records = run_task(engine, Slow(), tmp_path / "starts.jsonl", None, {})
  assert sum(record["seconds"] for record in records) == len(steps) > len(STARTS)


@pytest.mark.parametrize("ending", [b"", b'{"id": "s9", "pr', b'{"id": "s9"}', b"\xc3", b"\0\0\0\0"])
def test_a_broken_run_goes_on(engine, whole, tmp_path, ending):
  path = tmp_path / "new" / "starts.jsonl"
  with pytest.raises(KeyboardInterrupt):
    run_task(engine, Starts(broken="s3"), path, None, {"model": "m"})
  before = path.read_bytes()
  assert 1 <= before.count(b"\n") < len(STARTS)
  path.write_bytes(before + ending)  # what a machine that fell may leave
  rest = Starts()
  again = run_task(engine, rest, path, None, {"model": "m"})
  assert path.read_bytes().startswith(before)
  assert len(rest.scored) == len(STARTS) - before.count(b"\n")
  assert without_times(again) == without_times(whole)
  idle = Starts()
  assert run_task(engine, idle, path, None, {"model": "m"}) == again
  assert idle.scored == []


def test_other_settings_are_refused(engine, tmp_path):
  path = tmp_path / "starts.jsonl"
  run_task(engine, Starts(), path, None, {"model": "m"})
  for settings, compression, task in [
      ({"model": "n"}, None, Starts()), ({"model": "m", "more": 1}, None, Starts()), ({}, None, Starts()),
      ({"model": "m"}, Compression(rate=2), Starts()), ({"model": "m"}, None, Starts(settings={"version": 2}))]:
    with pytest.raises(InputError, match="was made with"):
      run_task(engine, task, path, compression, settings)
  settings_path(path).write_text("[]")
  with pytest.raises(InputError, match="damaged"):
    run_task(engine, Starts(), path, None, {"model": "m"})
  settings_path(path).unlink()
  with pytest.raises(InputError, match="missing"):
    run_task(engine, Starts(), path, None, {"model": "m"})


def test_damage_within_a_file_is_an_error(engine, tmp_path):
  path = tmp_path / "starts.jsonl"
  run_task(engine, Starts(), path, None, {})
  lines = path.read_bytes().splitlines()
  for wrong in (b"{", b"[]", b""):
    path.write_bytes(b"\n".join([lines[0], wrong, *lines[2:]]) + b"\n")
    with pytest.raises(InputError, match="line 2"):
      run_task(engine, Starts(), path, None, {})
  path.write_bytes(b"\n".join([*lines, json.dumps({"id": "other"}).encode()]) + b"\n")
  with pytest.raises(InputError, match="'other', which is no sample"):
    run_task(engine, Starts(), path, None, {})


def test_descriptions_tell_compressions_apart():
  @dataclasses.dataclass(frozen=True)
  class Rule:
    weights: np.ndarray

  rules = [Rule(np.arange(5000.0)), Rule(np.arange(5000.0) + (np.arange(5000) == 2500)), Rule(np.zeros((2, 2)))]
  every = [json.dumps(described(value)) for value in [
      None, Compression(rate=2), Compression(rate=3), Compression(rate=2, keep=[(0, 1)]),
      Compression(rate=2, scoring=FullAttention()), *rules]]
  assert len(set(every)) == len(every)
  assert described(Rule(np.arange(5000.0))) == described(rules[0])


def test_two_runs_do_not_write_one_file(tmp_path):
  with open_records(tmp_path / "a.jsonl", {}), \
      pytest.raises(InputError, match="another run"), open_records(tmp_path / "a.jsonl", {}):
    pass


def test_a_carriage_return_is_no_line_end(tmp_path):
  for _ in range(2):
    with open_records(tmp_path / "a.jsonl", {"a": (1, 2)}) as file:
      file.append({"id": len(file.records), "pred": "a\rb\u2028c\u0085"})
  assert [record["id"] for record in file.records] == [0, 1]


def test_a_sample_that_does_not_fit_is_named(tmp_path):
  small = Engine(STORIES, block_size=4, max_num_seqs=1, max_model_len=16, chunk_size=16)
  with pytest.raises(InputError, match=r"sample s0: .*context is 16"):
    run_task(small, Starts(), tmp_path / "starts.jsonl", None, {})
  assert not small.has_work
