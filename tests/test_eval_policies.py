"""The script that compares policies: its commands are valid, and its table has a column for each task."""

import importlib.util
import pathlib
import sys

import pytest

from kvc_jax.cli import _parser
from kvc_jax.cli_eval import policies_of
from kvc_jax.evaluation.summary import Row

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
  sys.path.insert(0, str(SCRIPTS))
  try:
    spec = importlib.util.spec_from_file_location("eval_policies", SCRIPTS / "eval_policies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
  finally:
    sys.path.remove(str(SCRIPTS))


def test_every_policy_is_one_that_kvc_eval_takes(script, monkeypatch, tmp_path):
  """Of its own name, at each rate; no two are the same."""
  commands = []
  monkeypatch.setattr(script, "_succeeds", lambda command, log: commands.append(command) or True)
  monkeypatch.setattr(script, "_calibrate", lambda args: None)
  monkeypatch.setattr(script, "_report", lambda args, names: None)
  monkeypatch.setattr(sys, "argv", ["eval_policies.py", "--work", str(tmp_path), "--rate", "4", "8", "--jobs", "1"])
  profile = pathlib.Path(__file__).parent / "goldens"  # exists; read by the engine alone
  monkeypatch.setattr(script, "_profile", lambda args: profile)
  assert script.main() == 0
  assert len(commands) == len(script.POLICIES)
  found = {}
  for name, command in zip(script.POLICIES, commands, strict=True):
    args = _parser().parse_args(command[3:])
    if name == script.PROFILE:
      assert args.head_profile == str(profile)
      continue
    policies = policies_of(args)
    expected = ["uncompressed"] if name == script.FULL else [f"{name}-4x", f"{name}-8x"]
    assert [policy.name for policy in policies] == expected
    found[name] = tuple(policy.compression for policy in policies)
  assert len(set(found.values())) == len(found)


def test_table_has_a_line_for_each_policy_and_a_column_for_each_task(script):
  def row(policy, task, score):
    return Row(
        policy=policy, series=policy, task=task, group="", samples=2, score=score, perplexity=None, rate_reached=2.0,
        bytes_held=10.0, bytes_uncompressed=20.0, prompt_tokens=5, output_tokens=1, seconds=1.0,
        output_tokens_per_second=1.0, tokens_per_second=6.0)

  table = script._pivot([
      row("uncompressed", "recall-single", 100.0), row("uncompressed", "recall-labels", 50.0),
      row("uncompressed", "average", 75.0), row("snapkv-2x", "recall-labels", 40.0)])
  assert table == [
      {"policy": "uncompressed", "single": 100.0, "labels": 50.0, "average": 75.0, "reached": 2.0, "bytes_held": 10},
      {"policy": "snapkv-2x", "single": None, "labels": 40.0, "average": None, "reached": 2.0, "bytes_held": 10}]


def test_a_policy_that_fails_is_named_and_the_others_go_on(script, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(script, "_succeeds", lambda command, log: "tova" not in command)
  reported = []
  monkeypatch.setattr(script, "_report", lambda args, names: reported.extend(names))
  monkeypatch.setattr(sys, "argv", ["eval_policies.py", "--work", str(tmp_path), "--policy", "tova", "h2o"])
  assert script.main() == 1
  assert reported == ["h2o"]
  assert "without an end: tova;" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "words"), [
    (["no-such-model"], "no-such-model"), (["--rate", "1", "4"], "give rates above 1"),
    (["--jobs", "0"], "--jobs is 0"),
    (["--length", "100"], "--length is 100"), (["--task", "none"], "no recall task 'none'"),
    (["--work", __file__], "give a folder")])
def test_bad_input_is_found_before_anything_runs(script, monkeypatch, tmp_path, capsys, options, words):
  monkeypatch.setattr(script, "_succeeds", lambda command, log: pytest.fail("something ran"))
  command = ["eval_policies.py", "--work", str(tmp_path / "work"), "--out", str(tmp_path), *options]
  monkeypatch.setattr(sys, "argv", command)
  assert script.main() == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  assert words in printed.err
  assert printed.err.count("\n") == 1
