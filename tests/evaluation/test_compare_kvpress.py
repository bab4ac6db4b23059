"""The comparison with kvpress: its budgets, table and errors; and our rules against positions that kvpress kept."""

import argparse
import importlib
import importlib.util
import json
import pathlib
import sys
from fractions import Fraction

import numpy as np
import pytest

from kvc_jax import Engine, InputError
from kvc_jax.evaluation.records import open_records
from kvc_jax.evaluation.task import Sample
from kvc_jax.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[2]
STORIES = ROOT / "assets" / "stories260K"
KVPRESS = pathlib.Path(__file__).parent / "kvpress"


@pytest.fixture(scope="module")
def script():
  sys.path.insert(0, str(ROOT / "scripts"))
  yield importlib.import_module("compare_kvpress")
  sys.path.remove(str(ROOT / "scripts"))
  for name in ("compare_kvpress", "bench_common"):
    sys.modules.pop(name, None)


class Digits:
  """A task whose right answer is the reference itself."""

  settings = {"version": 1}  # noqa: RUF012

  def __init__(self, name):
    self.name = name

  def score(self, prediction, sample):
    return float(prediction == sample.references[0])


class Letters:
  """Token i is the letter number i."""

  eos_ids = frozenset({0})

  def decode(self, ids):
    return "".join(chr(96 + i) for i in ids)


def _question(script, task, number, answer):
  sample = Sample(id=str(number), prompt="", max_new_tokens=3, references=(answer,))
  return script.Question(f"{task.name}/{number}", task, sample, [1] * 4, 3, [0])


def _line(script, run, question, token_ids, kept, held):
  kept = np.asarray(kept, bool)
  return {"run": run.name, "id": question.id, "token_ids": token_ids, "kvs_seen": int(kept.sum()), "bytes_held": held,
          "shape": list(kept.shape), "kept": script.pack(kept)}


FIRST = [[[1, 1, 0, 0], [1, 0, 1, 0]]]  # [L=1, H=2, T=4]
OTHER = [[[1, 1, 0, 0], [0, 0, 1, 1]]]


@pytest.fixture
def compared(script):
  """Two tasks; one of two questions of the first, kvpress could not do."""
  a, b = Digits("a"), Digits("b")
  questions = [_question(script, a, 0, "ab"), _question(script, a, 1, "ab"), _question(script, b, 0, "c")]
  runs = script.make_runs(questions, ["adakv", "kv-compress"], [Fraction(2)], 1, 1)
  ours = [_line(script, run, q, [1, 2, 0] if q.task is a else [4], FIRST, 100.0 + 100 * (q.task is b))
          for run in runs for q in questions]
  theirs = [
      _line(script, runs[0], questions[0], [1, 2, 3], OTHER, 800),
      _line(script, runs[0], questions[2], [3, 0, 7], FIRST, 800),
      {"run": runs[0].name, "id": "a/1", "error": "ValueError: x"}]
  return questions, runs, ours, theirs


def test_rows_hold_both_sides(script, compared):
  rows = script.compare(*compared, Letters())
  assert [(row["policy"], row["kept"], row["task"], row["samples"], row["errors"]) for row in rows] == [
      ("adakv", "1/2", "a", 1, 1), ("adakv", "1/2", "b", 1, 0), ("adakv", "1/2", "average", 2, 1),
      ("kv-compress", "1/2", "a", 2, 0), ("kv-compress", "1/2", "b", 1, 0), ("kv-compress", "1/2", "average", 3, 0)]
  one, two, both = rows[:3]
  assert (one["score_ours"], one["score_theirs"], one["difference"]) == (100, 0, 100)  # "ab" ends at 0, "abc" is wrong
  assert (two["score_ours"], two["score_theirs"], two["difference"]) == (0, 100, -100)  # "d" and "c"
  assert (one["bytes_ours"], two["bytes_ours"], both["bytes_ours"], both["bytes_theirs"]) == (100, 200, 150, 800)
  assert (one["share_ours"], one["share_theirs"]) == (0.5, 0.5)
  assert (one["overlap"], one["same_heads"]) == (0.75, 0.5)  # heads: 2 of 2, 1 of 2
  assert (two["overlap"], two["same_heads"], two["same_answers"]) == (1, 1, 0)
  assert both["overlap"] == 0.875
  assert rows[3]["score_ours"] == 100
  missing = ("score_theirs", "difference", "overlap", "same_answers")
  assert all(row[name] is None for row in rows[3:] for name in missing)


def test_the_best_of_theirs(script, compared):
  rows = script.compare(*compared, Letters())
  assert script.best_of_theirs(rows) == [
      {"kept": "1/2", "kv_compress": 50, "best": "adakv", "score": 50, "difference": 0, "bytes_ours": 150,
       "bytes_theirs": 800}]
  assert script.best_of_theirs([row for row in rows if row["policy"] == "adakv"]) == []


def test_the_table_has_a_column_for_each_key(script, compared):
  lines = script.table(script.compare(*compared, Letters()))
  assert lines[0].split()[:3] == ["policy", "kept", "task"]
  assert "score ours" in lines[0]
  assert [line.split()[-1] for line in lines[1:]] == ["0.5000", "1.0000", "0.7500", "-", "-", "-"]
  assert len({len(line) for line in lines}) == 1
  assert script.table([]) == []


def test_overlap_counts_by_head(script):
  first, other = np.array(FIRST, bool), np.array(OTHER, bool)
  assert script.overlap(first, first) == (1, 1)
  assert script.overlap(first, first[:, ::-1]) == (0.5, 0)
  more = np.array([[[1, 1, 1, 0], [0, 0, 1, 1]]], bool)
  assert script.overlap(other, more) == (pytest.approx((2 / 3 + 1) / 2), 0.5)


def test_bit_maps_survive_packing(script):
  kept = np.random.default_rng(0).random((3, 2, 13)) < 0.4
  line = json.loads(json.dumps({"shape": list(kept.shape), "kept": script.pack(kept)}))
  np.testing.assert_array_equal(script.unpack(line), kept)


@pytest.mark.parametrize(("tokens", "share", "window", "block_size", "expected"), [
    (1000, Fraction(1, 8), 32, 1, (125, 32)),
    (1000, Fraction(1, 8), 32, 16, (112, 32)),
    (1000, Fraction(1, 32), 32, 1, (31, 8)),  # 16 is more than half
    (100, Fraction(1, 3), 16, 4, (32, 16)),
])
def test_budgets_are_whole_blocks(script, tokens, share, window, block_size, expected):
  assert script.budget_of(tokens, share, window, block_size) == expected


def test_a_share_of_next_to_nothing_is_refused(script):
  with pytest.raises(InputError, match="leaves 0 tokens of 100 in blocks of 16"):
    script.budget_of(100, Fraction(1, 8), 32, 16)


def test_lines_that_were_cut_off_are_left_out(script, tmp_path):
  path = tmp_path / "theirs.jsonl"
  assert script.read_lines(path) == []
  path.write_text('{"run": 1}\n{"ru')
  assert script.read_lines(path) == [{"run": 1}]


def test_a_peer_that_cannot_run_is_named(script, tmp_path):
  with pytest.raises(InputError, match="cannot be run"):
    script.ask_peer(str(tmp_path / "nothing"), str(STORIES), tmp_path, "float32", 1)
  if importlib.util.find_spec("torch") is None:
    with pytest.raises(InputError, match=r"peer_kvpress.py failed: .*torch"):
      script.ask_peer(sys.executable, str(STORIES), tmp_path, "float32", 1)


def _lines(script, name):
  return script.read_lines(KVPRESS / f"{name}.jsonl")


def test_our_rules_keep_what_kvpress_keeps(script, tmp_path):
  """SnapKV, Ada-KV, TOVA: every head keeps the same KVs, and the answers are the same.

  The file is gone on with, not made again.
  """
  (prompt,) = _lines(script, "prompts")
  question = script.Question(**prompt, task=Digits("text"), sample=None)
  runs = [
      script.Run(name, 1 / Fraction(rate[:-1] or 1), {question.id: tuple(run["budgets"][question.id])})
      for run in _lines(script, "runs") for name, _, rate in [run["run"].partition("-")]]
  make_engine = lambda: Engine(  # noqa: E731
      STORIES, dtype="float32", block_size=1, max_num_seqs=2, max_model_len=128, chunk_size=64)
  path = tmp_path / "ours.jsonl"
  with open_records(path, {}) as file:
    script.answer_ours(make_engine, [question], runs, file)
    assert len(file.records) == len(runs) == 7
  with open_records(path, {}) as file:
    script.answer_ours(None, [question], runs, file)  # nothing is left, so no engine is made
    ours = {line["run"]: line for line in file.records}
  theirs = {line["run"]: line for line in _lines(script, "theirs")}
  for run in runs:
    mine, other = ours[run.name], theirs[run.name]
    kept, seen = script.unpack(mine), script.unpack(other)
    assert kept.sum() == mine["kvs_seen"] == other["kvs_seen"] == run.budgets[question.id][0] * 20
    assert script.overlap(kept, seen) == (1, 1)
    assert mine["token_ids"] == other["token_ids"]
  # No two policies keep so much in common, nor one with its heads swapped.
  for name, another in (("snapkv", "adakv"), ("adakv", "snapkv"), ("tova", "snapkv")):
    assert script.overlap(script.unpack(ours[f"{name}-2x"]), script.unpack(theirs[f"{another}-2x"]))[0] < 0.95
  swapped = script.unpack(theirs["snapkv-2x"])[:, ::-1]
  assert script.overlap(script.unpack(ours["snapkv-2x"]), swapped)[0] < 0.95


def test_text_questions_fit_their_length(script):
  tokenizer = Tokenizer.from_folder(STORIES)
  task = script.TextTask(["The sun was hot.", "Tom saw a big dog."] * 40, lengths=[24, 40], count=2)
  questions = script.make_questions([task], tokenizer, 64)
  assert [len(q.token_ids) for q in questions] == [16, 16, 32, 32]
  assert len({q.id for q in questions}) == len(task) == 4
  (reference,) = questions[0].sample.references
  assert task.score(reference, questions[0].sample) == 1
  assert task.score("nothing", questions[0].sample) == 0
  with pytest.raises(InputError, match="the model's context is 16"):
    script.make_questions([task], tokenizer, 16)


def test_a_folder_made_otherwise_is_refused(script, tmp_path):
  def args(**given):
    names = {"model": str(STORIES), "work": tmp_path, "python": None, "task": ["text"], "length": [64], "count": 1,
             "question_seed": 0, "rate": [Fraction(2)], "policy": [], "window": 8, "block_size": 4, "dtype": "float32",
             "max_num_seqs": 2, "threads": 1}
    return argparse.Namespace(**{**names, **given})

  (tmp_path / "theirs.jsonl").write_text("")
  with pytest.raises(InputError, match="no answers of ours"):
    script.run(args())
  (tmp_path / "theirs.jsonl").unlink()
  assert script.run(args())["rows"] == []
  (tmp_path / "ours.jsonl").write_text('{"run": "full", "id": "text/64-0"}\n')
  with pytest.raises(InputError, match="was made with window = 8, not 4"):
    script.run(args(window=4))
  with pytest.raises(InputError, match="--rate is 1"):
    script.run(args(rate=[Fraction(1)]))
  with pytest.raises(InputError, match="--length is 4"):
    script.run(args(length=[4]))
