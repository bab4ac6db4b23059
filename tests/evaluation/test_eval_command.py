"""`kvc eval` as a user meets it, on the shipped model."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from kvc_jax import Compression, HeadProfile, InputError, RandomScore, cli, cli_eval
from kvc_jax.cli import main
from kvc_jax.engine.engine import Engine
from kvc_jax.evaluation import plots

ROOT = pathlib.Path(__file__).parents[2]
STORIES = ROOT / "assets" / "stories260K"
PREDICTIONS = pathlib.Path(__file__).parent / "longbench" / "full.jsonl"
TINY = ["--block-size", "4", "--chunk-size", "32", "--max-num-seqs", "2", "--warm-up", "none", "--quiet"]


def row(number, **changes):
  return {"input": f"Where did Tim go on day {number}?", "context": "Tim went to the park. " * (3 + number),
          "answers": ["the park", "park"], "length": 3000 * (number + 1), "all_classes": None, **changes}


def write_rows(path, rows):
  path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
  """Three rows of two sets, and of one of LongBench-E."""
  folder = tmp_path / "data"
  folder.mkdir()
  write_rows(folder / "hotpotqa.jsonl", [row(i) for i in range(3)])
  write_rows(folder / "trec.jsonl", [row(i, answers=["Place"], all_classes=["Place", "Date"]) for i in range(3)])
  write_rows(folder / "qasper_e.jsonl", [row(i) for i in range(3)])
  return folder


def records(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fails(capsys, command):
  """The one line of a command that ends with status 2."""
  assert main(command) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.count("\n") == 1
  assert err.startswith("kvc: error: ")
  return err


def longbench(data, out, *options):
  return ["eval", "longbench", str(STORIES), "--data", str(data), "--out", str(out), "--max-new-tokens", "8", *TINY,
          *options]


def test_longbench_runs_goes_on_and_reports(data, tmp_path, capsys):
  out = tmp_path / "out"
  command = longbench(data, out, "--set", "hotpotqa", "trec", "--rate", "1", "4", "--window", "4", "--interval", "2")
  assert main([*command, "--limit", "2"]) == 0
  table = capsys.readouterr().out.splitlines()
  assert [line.split()[:3] for line in table[1:-1]] == [
      [policy, task, samples] for policy in ("uncompressed", "window-all-4x")
      for task, samples in [("hotpotqa", "2"), ("trec", "2"), ("average", "4")]]
  before = {path: path.read_bytes() for path in out.glob("*/*.jsonl")}
  assert len(before) == 4
  path = out / "window-all-4x" / "trec.jsonl"
  path.write_bytes(before[path][:-9])  # a machine that fell
  assert main(command) == 0  # and now all rows
  for path, old in before.items():
    assert len(records(path)) == 3
    assert path.read_bytes().startswith(old[: old.index(b"\n") + 1])
  compressed, plain = (records(out / policy / "hotpotqa.jsonl") for policy in ("window-all-4x", "uncompressed"))
  for one, other in zip(compressed, plain, strict=True):
    assert one["bytes_held"] < other["bytes_held"] == one["bytes_uncompressed"]
    assert one["prompt_tokens"] == other["prompt_tokens"]
    assert one["output_tokens"] <= 8
  rows = json.loads((out / "summary.json").read_text())
  assert {(one["policy"], one["task"]): one["samples"] for one in rows}["window-all-4x", "average"] == 6
  assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
  assert (out / "kept.png").is_file()
  capsys.readouterr()
  assert main(["eval", "report", str(out)]) == 0
  assert "window-all-4x  average" in capsys.readouterr().out
  # What was written is in the format that LongBench's scorer takes.
  assert main(["eval", "score", str(out / "uncompressed")]) == 0
  scored = dict(line.split()[::2] for line in capsys.readouterr().out.splitlines()[1:])
  assert scored == {one["task"]: f"{one['score']:.2f}" for one in rows
                    if one["policy"] == "uncompressed" and not one["group"]}
  assert "was made with max_new_tokens" in fails(capsys, [*command, "--max-new-tokens", "7"])
  assert "or ask for as many samples as before" in fails(capsys, [*command, "--limit", "1"])


def test_longbench_e_has_scores_by_length_with_a_converted_model(data, tmp_path, capsys):
  assert main(["convert", str(STORIES), str(tmp_path / "model")]) == 0
  command = longbench(data, tmp_path / "out", "--longbench-e", "--label", "mine", "--max-cache-tokens", "24",
                      "--window", "4", "--allocation", "head", "--scoring", "full")
  command[2] = str(tmp_path / "model")
  capsys.readouterr()
  assert main(command) == 0
  rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
  assert [line[0] for line in rows] == ["mine-max_cache_tokens-24"] * 4
  assert [line[2] for line in rows[1:]] == ["0-4k", "4-8k", "8k+"]
  assert main(["eval", "score", str(tmp_path / "out" / "mine-max_cache_tokens-24"), "--longbench-e"]) == 0


def test_perplexity(tmp_path, capsys):
  (tmp_path / "text.txt").write_text((STORIES / "expected_200_steps.txt").read_text(encoding="utf-8"), encoding="utf-8")
  command = ["eval", "perplexity", str(STORIES), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"),
             "--context-tokens", "60", "--target-tokens", "30", "--rate", "1", "8", "--window", "4", *TINY]
  assert main(command) == 0
  rows = json.loads((tmp_path / "out" / "summary.json").read_text())
  plain, compressed = rows
  # Its own greedy text is easy for the model, and harder when most of the context is gone.
  assert 1 < plain["perplexity"] < compressed["perplexity"] - 0.1
  assert compressed["bytes_held"] < plain["bytes_held"]
  assert "a window takes" in fails(capsys_after(capsys), [*command, "--target-tokens", "400"])


def capsys_after(capsys):
  capsys.readouterr()
  return capsys


def test_score_of_real_predictions(tmp_path, capsys):
  wanted = {}
  for line in PREDICTIONS.read_text(encoding="utf-8").split("\n")[:-1]:
    one = json.loads(line)
    wanted.setdefault(one["set"], []).append(one["official"])
    with (tmp_path / f"{one['set']}.jsonl").open("a", encoding="utf-8") as file:
      file.write(line + "\n")
  assert main(["eval", "score", str(tmp_path), "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert {name: one["scores"] for name, one in found.items()} == wanted
  for name, one in found.items():
    assert one["score"] == round(100 * sum(wanted[name]) / len(wanted[name]), 2)
  shutil.copy(tmp_path / "lcc.jsonl", tmp_path / "lcc_e.jsonl")
  assert "lcc twice" in fails(capsys, ["eval", "score", str(tmp_path)])
  (tmp_path / "lcc_e.jsonl").rename(tmp_path / "other.jsonl")
  assert "no set 'other'" in fails(capsys, ["eval", "score", str(tmp_path)])
  (tmp_path / "other.jsonl").rename(tmp_path / "lcc.jsonl")
  (tmp_path / "lcc.jsonl").write_text("")
  assert "lcc.jsonl is empty" in fails(capsys, ["eval", "score", str(tmp_path)])


def test_score_by_length(tmp_path, capsys):
  rows = [{"pred": pred, "answers": ["cat"], "all_classes": None, "length": length}
          for pred, length in [("cat", 10), ("dog", 3999), ("cat", 4000), ("cat", 7999), ("dog", 8000)]]
  write_rows(tmp_path / "qasper_e.jsonl", rows)
  assert main(["eval", "score", str(tmp_path), "--longbench-e"]) == 0
  assert capsys.readouterr().out.splitlines()[1].split() == ["qasper", "5", "60.00", "50.0", "100.0", "0.0"]
  write_rows(tmp_path / "qasper_e.jsonl", [{"pred": "cat", "answers": ["cat"], "all_classes": None}])
  assert "has no 'length'" in fails(capsys, ["eval", "score", str(tmp_path), "--longbench-e"])
  assert main(["eval", "score", str(tmp_path)]) == 0


def recall(out, *options):
  return ["eval", "recall", str(STORIES), "--out", str(out), "--task", "single", *TINY, *options]


def test_recall_asks_at_each_length_and_goes_on(tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("It was a day. " + "The sun went down over the sea and the boats came in. " * 60, encoding="utf-8")
  command = recall(tmp_path / "out", "--length", "512", "--count", "2", "--text", str(text), "--rate", "1", "8")
  assert main(command) == 0
  files = [tmp_path / "out" / policy / "recall-single.jsonl" for policy in ("uncompressed", "window-all-8x")]
  whole, compressed = map(records, files)
  assert len(whole) == len(compressed) == 2
  assert [one["prompt_tokens"] <= 512 for one in whole] == [True, True]
  assert compressed[0]["blocks_held"] < whole[0]["blocks_held"]
  files[1].write_text(json.dumps(compressed[0]) + "\n", encoding="utf-8")
  assert main(command) == 0
  assert [one["pred"] for one in records(files[1])] == [one["pred"] for one in compressed]


@pytest.mark.parametrize(("options", "message"), [
    (["--task", "nothing"], "no recall task 'nothing'"),
    (["--length", "4096"], "--length 4096 is more than the model's context of 512"),
    (["--length", "10"], "length is 10"),
    (["--count", "0"], "count is 0"),
    (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
])
def test_recall_bad_input(tmp_path, capsys, options, message):
  assert message in fails(capsys, recall(tmp_path / "out", *options))
  assert not (tmp_path / "out").exists()


def test_without_matplotlib_there_are_tables(data, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(plots, "can_draw", lambda: False)
  assert main(longbench(data, tmp_path / "out", "--set", "trec", "--limit", "1")) == 0
  out, err = capsys.readouterr()
  assert "summary.json" in out
  assert err.count("\n") == 1
  assert "pip install 'kvc_jax[plot]', then: kvc eval report" in err


@pytest.mark.parametrize(("options", "message"), [
    (["--set", "lccc"], "no set 'lccc'"),
    (["--set", "lcc"], "has no lcc.jsonl"),
    (["--longbench-e", "--set", "musique"], "LongBench-E has no set 'musique'"),
    (["--limit", "0"], "--limit is 0"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
    (["--rate", "0.5"], "rate is 0.5"),
    (["--scoring", "full"], "--scoring compresses nothing without --rate"),
    (["--seed", "3"], "--seed is of --scoring random alone"),
    (["--rate", "2", "--scoring", "full", "window", "--seed", "3"], "--seed is of --scoring random alone"),
    (["--rate", "2", "--label", "a/b"], "--label 'a/b' is no name"),
    (["--rate", "2", "--label", "uncompressed"], "--label 'uncompressed' is no name"),
    (["--rate", "2", "--label", "a", "--scoring", "full", "window"], "two policies would be called a-2x"),
    (["--max-input-tokens", "509"], "--max-input-tokens is 509"),
    (["--max-model-len", "64"], "lower --max-new-tokens, or leave the set out"),
    (["--template", "model"], "no chat template"),
])
def test_bad_input_is_one_line(data, tmp_path, capsys, options, message):
  assert message in fails(capsys, longbench(data, tmp_path / "out", *options))


def perplexity(tmp_path):
  (tmp_path / "text.txt").write_text("Once upon a time there was a dog. " * 20, encoding="utf-8")
  return ["eval", "perplexity", str(STORIES), "--text", str(tmp_path / "text.txt"), "--context-tokens", "30",
          "--target-tokens", "4", "--windows", "1", *TINY, "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("what", ["longbench", "recall", "perplexity"])
def test_a_bad_out_is_found_before_the_model_is_loaded(data, tmp_path, capsys, monkeypatch, what):
  monkeypatch.setattr("kvc_jax.engine.engine.Engine", None)
  (tmp_path / "out").mkdir()
  command = {"longbench": longbench(data, tmp_path / "out"), "recall": recall(tmp_path / "out"),
             "perplexity": perplexity(tmp_path)}[what]
  (tmp_path / "out" / "window-all-2x").touch()
  assert "window-all-2x is no folder" in fails(capsys, [*command, "--rate", "2"])
  (tmp_path / "file").touch()
  below = str(tmp_path / "file" / "a")
  assert "file is no folder, so results cannot go to" in fails(capsys, [*command, "--out", below])
  monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
  assert "cannot be written" in fails(capsys, [*command, "--out", str(tmp_path / "new" / "a")])
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["longbench", "perplexity"])
def test_other_settings_of_any_policy_are_found_before_steps_are_compiled(data, tmp_path, capsys, monkeypatch, what):
  command = {"longbench": [*longbench(data, tmp_path / "out"), "--set", "trec", "--limit", "1"],
             "perplexity": perplexity(tmp_path)}[what]
  assert main([*command, "--rate", "4", "--window", "4"]) == 0
  monkeypatch.setattr(Engine, "warm_up", None)
  capsys.readouterr()
  again = [*command, "--rate", "1", "2", "4", "--window", "5", "--warm-up", "own"]
  assert "window-all-4x" in (line := fails(capsys, again))
  assert "was made with compression" in line
  assert not (tmp_path / "out" / "window-all-2x").exists()


def test_references_that_cannot_be_scored_are_found_at_once(data, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("kvc_jax.engine.engine.Engine", None)
  write_rows(data / "passage_retrieval_en.jsonl", [row(0, answers=["Paragraph 3"]), row(1, answers=["Page 3"])])
  message = fails(capsys, longbench(data, tmp_path / "out", "--set", "passage_retrieval_en"))
  assert "passage_retrieval_en.jsonl, line 2, cannot be scored: a reference is 'Page 3'" in message


def test_bad_folders_are_one_line(data, tmp_path, capsys):
  assert "has no set of LongBench;" in fails(capsys, longbench(tmp_path / "none", tmp_path / "out"))
  assert "has no .jsonl files" in fails(capsys, ["eval", "score", str(tmp_path)])
  assert "has no results" in fails(capsys, ["eval", "report", str(tmp_path)])
  command = ["eval", "perplexity", str(STORIES), "--text", str(tmp_path / "none.txt")]
  assert "none.txt is missing; give a text" in fails(capsys, command)


def test_each_combination_is_a_policy():
  args = cli._parser().parse_args([
      "eval", "longbench", "m", "--data", "d", "--rate", "1", "2", "8", "--max-cache-tokens", "64", "--scoring",
      "window", "full", "--allocation", "all", "head"])
  policies = cli_eval.policies_of(args)
  assert policies[0].compression is None
  names = [policy.name for policy in policies]
  assert len(names) == len(set(names)) == 1 + 3 * 4
  assert "full-head-8x" in names
  compression = next(policy.compression for policy in policies if policy.name == "full-head-max_cache_tokens-64")
  assert (compression.rate, compression.max_cache_tokens, compression.allocation) == (None, 64, "head")


def test_a_seed_is_random_scoring_s():
  command = ["eval", "recall", "m", "--rate", "2", "--scoring", "window", "random", "--seed", "3"]
  window, drawn = cli_eval.policies_of(cli._parser().parse_args(command))
  assert window.compression == Compression(rate=2)
  assert drawn.compression == Compression(rate=2, scoring=RandomScore(seed=3))


def test_a_head_profile_is_compared_with_other_allocations(tmp_path):
  path = str(tmp_path / "p.safetensors")
  HeadProfile(np.full((5, 4, 2), 0.5)).save(path)
  command = ["eval", "longbench", "m", "--data", "d", "--rate", "2", "--head-profile", path]
  policies = cli_eval.policies_of(cli._parser().parse_args([*command, "--allocation", "all", "profile", "head"]))
  assert [policy.name for policy in policies] == ["window-all-2x", "window-HeadProfile-2x", "window-head-2x"]
  assert [policy.compression.allocation for policy in policies] == ["all", HeadProfile.load(path), "head"]
  (alone,) = cli_eval.policies_of(cli._parser().parse_args(command))
  assert alone == policies[1]
  for allocations in (["all"], ["all", "head"]):  # a file that no policy would take
    with pytest.raises(InputError, match="--head-profile goes with --allocation profile"):
      cli_eval.policies_of(cli._parser().parse_args([*command, "--allocation", *allocations]))
