"""Tables and plots of records that are written by hand."""

import csv
import json

import numpy as np
import pytest

from kvc_jax import InputError
from kvc_jax.evaluation import plots, summary
from kvc_jax.evaluation.records import open_records


def record(number, *, score=None, nll=None, held=10, group="", seconds=2.0):
  quality = {"score": score} if nll is None else {"nll": nll, "predicted_tokens": 4}
  return {
      "id": str(number), "group": group, **quality, "prompt_tokens": 90, "output_tokens": 10, "seconds": seconds,
      "blocks_held": held, "blocks_uncompressed": 40, "bytes_held": held * 100, "bytes_uncompressed": 4000,
      "kvs_kept": [[held, 2 * held], [0, held]]}


def write(folder, policy, task, records, series=None):
  with open_records(folder / policy / f"{task}.jsonl", {"series": series or policy}) as file:
    for one in records:
      file.append(one)


@pytest.fixture
def folder(tmp_path):
  """Two tasks and a perplexity at several rates; 16x sorts before 4x as a name."""
  for policy, series, held in [
      ("uncompressed", "uncompressed", 40), ("window-all-4x", "window-all", 10), ("window-all-16x", "window-all", 4)]:
    write(tmp_path, policy, "lcc", [
        record(0, score=0.5, held=held, group="0-4k"), record(1, score=1.0, held=held, group="8k+")], series)
    write(tmp_path, policy, "qasper", [record(0, score=0.25, held=held, seconds=6.0)], series)
    write(tmp_path, policy, "perplexity", [record(0, nll=4.0, held=held), record(1, nll=8.0, held=held)], series)
  return tmp_path


def test_rows(folder):
  rows = summary.summarize(summary.read_results(folder))
  assert [(row.policy, row.task, row.group) for row in rows] == [
      (policy, task, group) for policy in ("uncompressed", "window-all-4x", "window-all-16x")
      for task, group in [("lcc", ""), ("lcc", "0-4k"), ("lcc", "8k+"), ("perplexity", ""), ("qasper", ""),
                          ("average", "")]]
  lcc, short, long, perplexity, qasper, average = rows[6:12]
  assert (lcc.score, short.score, long.score, qasper.score, average.score) == (75, 50, 100, 25, 50)
  assert perplexity.perplexity == pytest.approx(np.exp(12 / 8))
  assert perplexity.score is lcc.perplexity is average.perplexity is None
  assert lcc.rate_reached == average.rate_reached == 4
  assert (lcc.bytes_held, lcc.bytes_uncompressed, lcc.samples, average.samples) == (1000, 4000, 2, 3)
  assert (lcc.seconds, lcc.output_tokens_per_second, lcc.tokens_per_second) == (4, 5, 50)
  assert (average.seconds, average.output_tokens_per_second, average.tokens_per_second) == (10, 3, 30)


def test_tables(folder):
  rows = summary.summarize(summary.read_results(folder))
  lines = summary.table(rows)
  assert lines[0].split()[:4] == ["policy", "task", "samples", "score"]
  assert lines[7].split() == ["window-all-4x", "lcc", "2", "75.00", "4.00x", "1,000", "90", "10", "5.0"]
  csv_path, json_path = summary.write_tables(rows, folder)
  with csv_path.open(newline="") as file:
    written = list(csv.DictReader(file))
  as_json = json.loads(json_path.read_text())
  assert len(written) == len(as_json) == len(rows)
  assert float(written[6]["score"]) == as_json[6]["score"] == 75
  assert written[3]["score"] == ""
  assert as_json[3]["score"] is None


def test_policy_names():
  assert summary.policy_name("window-all", {"rate": 8.0}) == "window-all-8x"
  assert summary.policy_name("mine", {"max_cache_tokens": 256}) == "mine-max_cache_tokens-256"
  assert summary.policy_name("uncompressed", {}) == "uncompressed"


def test_kept_shares(folder):
  results = [found for found in summary.read_results(folder) if found.policy == "window-all-4x"]
  np.testing.assert_allclose(plots.kept_shares(results), [[0.1, 0.2], [0, 0.1]])


def test_plots(folder):
  results = summary.read_results(folder)
  written = plots.save_all(summary.summarize(results), results, folder)
  assert [path.name for path in written] == ["quality.png", "kept.png"]
  for path in written:
    assert path.read_bytes().startswith(b"\x89PNG")
  plain = [found for found in results if found.policy == "uncompressed"]
  assert [path.name for path in plots.save_all(summary.summarize(plain), plain, folder)] == ["quality.png"]


@pytest.mark.parametrize(("change", "message"), [
    ({"blocks_uncompressed": None}, "no number as 'blocks_uncompressed'"),
    ({"seconds": "2"}, "no number as 'seconds'"),
    ({"score": None}, "no number as 'score'"),
    ({"group": None}, "no text as 'group'"),
    ({"kvs_kept": None}, "by layer and head as 'kvs_kept'"),
    ({"kvs_kept": [[1, 2], [3]]}, "by layer and head as 'kvs_kept'"),
    ({"kvs_kept": [[1, 2]]}, "has kvs_kept of another model"),
])
def test_a_record_of_something_else_is_named(folder, change, message):
  every = {**record(2, score=0.5), **change}.items()
  wrong = {name: value for name, value in every if value is not None or name == "score"}
  write(folder, "window-all-4x", "qasper", [wrong], "window-all")
  with pytest.raises(InputError, match=rf"window-all-4x/qasper.jsonl, line 2, .*{message}"):
    summary.read_results(folder)


def test_a_record_without_its_quality_is_named(folder):
  wrong = {name: value for name, value in record(2, score=0.5).items() if name != "score"}
  write(folder, "window-all-4x", "qasper", [wrong], "window-all")
  with pytest.raises(InputError, match=r"line 2, has no number as 'nll'"):
    summary.read_results(folder)


def test_an_empty_folder_is_named(tmp_path):
  with pytest.raises(InputError, match="has no results"):
    summary.read_results(tmp_path)
