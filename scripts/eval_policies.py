#!/usr/bin/env python
"""Every policy on the recall tasks, at equal budgets: a table of policy, rate and task, plots, and JSON.

    python scripts/eval_policies.py [MODEL] [--work DIR] [--rate 2 4 8 16 32] [--length 4096] [--count 25]
        [--policy NAME ...] [--jobs 4] [--dtype bfloat16] [--out FOLDER]

Each policy is a `kvc eval recall` of its own, `--jobs` of them at a time, all on the same questions. What was
answered before is in DIR and is not asked again. `profile` gives each head a budget that `kvc calibrate` found on 50
prompts of the task `multi_key` at 8x, with other questions. Blocks of 16 and a window of 32 for all; every other
setting that a policy's paper leaves open is this project's default (docs/policies.md).

FOLDER gets policies.json (a row for each policy, rate and task, with bytes held), policies.png (score over the
rate reached) and policies-kept.png (which heads kept how much at the middle rate).
"""

import argparse
import concurrent.futures
import dataclasses
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import bench_common as common

from kvc_jax.errors import InputError, check_count
from kvc_jax.evaluation import plots, summary
from kvc_jax.evaluation.haystack import held_out_sentences
from kvc_jax.evaluation.recall import SHORTEST, SampleBuilder, check_task_names
from kvc_jax.evaluation.recall_episodes import TASKS
from kvc_jax.tokenizer import Tokenizer

FULL, PROFILE = "full-cache", "profile"
POLICIES: dict[str, list[str]] = {
    FULL: [],
    "kv-compress": [],
    "kv-compress-pool13": ["--pooling", "13"],
    "kv-compress-full": ["--scoring", "full"],
    "kv-compress-layer": ["--allocation", "layer"],
    "kv-compress-layer-pool13": ["--allocation", "layer", "--pooling", "13"],
    "kv-compress-head": ["--allocation", "head"],
    "snapkv": ["--scoring", "snapkv", "--allocation", "head"],
    "snapkv-pool13": ["--scoring", "snapkv", "--allocation", "head", "--pooling", "13"],
    "ada-kv": ["--scoring", "snapkv", "--allocation", "layer", "--safeguard", "0.2"],
    "ada-kv-pool13": ["--scoring", "snapkv", "--allocation", "layer", "--safeguard", "0.2", "--pooling", "13"],
    "pyramid-kv": ["--scoring", "snapkv", "--allocation", "pyramid"],
    "pyramid-kv-pool13": ["--scoring", "snapkv", "--allocation", "pyramid", "--pooling", "13"],
    "critical-kv": ["--scoring", "critical", "--allocation", "layer", "--safeguard", "0.2"],
    "critical-kv-pool13": ["--scoring", "critical", "--allocation", "layer", "--safeguard", "0.2", "--pooling", "13"],
    "expected": ["--scoring", "expected", "--allocation", "layer", "--safeguard", "0.2"],
    "h2o": ["--scoring", "h2o", "--allocation", "head"],
    "tova": ["--scoring", "tova", "--allocation", "head"],
    "keydiff": ["--scoring", "keydiff", "--allocation", "head"],
    "key-norm": ["--scoring", "key-norm", "--allocation", "head"],
    "streaming-llm": ["--scoring", "streaming", "--allocation", "head"],
    "random": ["--scoring", "random", "--allocation", "head"],
    PROFILE: ["--allocation", "profile"],
}
"""Options of `kvc eval recall` by name of the policy."""

CALIBRATION_TASK, CALIBRATION_PROMPTS, CALIBRATION_RATE, CALIBRATION_SEED = "multi_key", 50, 8, 1
_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_KVC = [sys.executable, "-m", "kvc_jax.cli"]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("model", nargs="?", default=str(_REPOSITORY / "assets" / "recall-7m"))
  parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("kvc-policies"), help="folder for answers")
  parser.add_argument("--rate", nargs="+", type=float, default=[2, 4, 8, 16, 32])
  parser.add_argument("--length", type=int, default=4096, help="of prompt and answer, in tokens")
  parser.add_argument("--task", nargs="+", default=[], help="tasks to ask (default: all)")
  parser.add_argument("--count", type=int, default=25, help="questions of each task")
  parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="NAME",
                      help=", ".join(POLICIES))
  parser.add_argument("--jobs", type=int, default=4, help="policies that run at once")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--max-num-seqs", default="16", help="prompts that run at once, of each policy")
  parser.add_argument("--chunk-size", default="1024")
  parser.add_argument("--name", default="policies", help="of the files in FOLDER")
  parser.add_argument("--out", type=pathlib.Path, default=common.RESULTS, help="folder for the JSON and the PNGs")
  args = parser.parse_args()
  args.policy = list(dict.fromkeys(args.policy))
  try:
    _check(args)
    if PROFILE in args.policy:
      _calibrate(args)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
      failed = [name for name, ok in zip(args.policy, pool.map(lambda name: _run(args, name), args.policy),
                                         strict=True) if not ok]
    if failed:
      print(f"{parser.prog}: without an end: {', '.join(failed)}; see {args.work}/NAME.log, and run again to go on",
            file=sys.stderr)
    ended = [name for name in args.policy if name not in failed]
    if ended:
      _report(args, ended)
  except InputError as e:
    print(f"{parser.prog}: error: {e}", file=sys.stderr)
    return 2
  return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
  """Raises InputError before anything runs, where something could not."""
  Tokenizer.from_folder(args.model)
  check_count("--jobs", args.jobs, at_least=1)
  check_count("--count", args.count, at_least=1)
  check_count("--length", args.length, at_least=SHORTEST)
  check_task_names(args.task)
  for rate in args.rate:
    if not 1 < rate < math.inf:
      raise InputError(f"--rate is {rate:g}; give rates above 1 (the policy {FULL} is rate 1)")
  for folder in (args.work, args.out):
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise InputError(f"{folder}: {e.strerror}; give a folder") from None


def _options(args: argparse.Namespace) -> list[str]:
  return ["--dtype", args.dtype, "--max-num-seqs", args.max_num_seqs, "--chunk-size", args.chunk_size]


def _calibrate(args: argparse.Namespace) -> None:
  """Writes the profile of `PROFILE`, if it is not there."""
  if _profile(args).exists():
    return
  folder = args.work / "calibration"
  folder.mkdir(exist_ok=True)
  builder = SampleBuilder(held_out_sentences(), Tokenizer.from_folder(args.model))
  files = []
  for number in range(CALIBRATION_PROMPTS):
    sample = builder.sample(CALIBRATION_TASK, args.length, number, seed=CALIBRATION_SEED)
    files.append(folder / f"{number}.txt")
    files[-1].write_text(str(sample.prompt), encoding="utf-8")
  prompts = [option for file in files for option in ("--file", str(file))]
  command = [*_KVC, "calibrate", args.model, *_options(args), "--rate", str(CALIBRATION_RATE), *prompts,
             "--out", str(_profile(args))]
  if not _succeeds(command, args.work / "calibrate.log"):
    raise InputError(f"calibration failed; see {args.work / 'calibrate.log'}, or leave --policy {PROFILE} out")


def _profile(args: argparse.Namespace) -> pathlib.Path:
  return args.work / f"head-profile-{pathlib.Path(args.model).resolve().name}-{args.length}-{args.dtype}.safetensors"


def _run(args: argparse.Namespace, name: str) -> bool:
  tasks = ["--task", *args.task] if args.task else []
  command = [*_KVC, "eval", "recall", args.model, *_options(args), "--length", str(args.length), *tasks,
             "--count", str(args.count), "--out", str(args.work / "runs"), "--quiet"]
  rates = [f"{rate:g}" for rate in args.rate]
  command += ["--rate", "1"] if name == FULL else ["--rate", *rates, "--label", name, *POLICIES[name]]
  if name == PROFILE:
    command += ["--head-profile", str(_profile(args))]
  ok = _succeeds(command, args.work / f"{name}.log")
  print(f"{name}: {'done' if ok else 'FAILED'}", file=sys.stderr, flush=True)
  return ok


def _succeeds(command: Sequence[str], log: pathlib.Path) -> bool:
  # Processes share the device.
  environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "MPLBACKEND": "agg", **os.environ}
  environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
  with log.open("w", encoding="utf-8") as file:
    return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode == 0


def _report(args: argparse.Namespace, names: Sequence[str]) -> None:
  """Of these policies alone: the folder may have others' results."""
  wanted = {summary.UNCOMPRESSED if name == FULL else name for name in names}
  tasks = {f"recall-{task}" for task in args.task or TASKS}
  results = [found for found in summary.read_results(args.work / "runs")
             if found.series in wanted and found.task in tasks]
  rows = summary.summarize(results)
  whole = [row for row in rows if not row.group]
  common.write_results(
      args.name, [dataclasses.asdict(row) for row in whole], folder=str(args.out), model=pathlib.Path(args.model).name,
      length=args.length, count=args.count, dtype=args.dtype,
      options={name: " ".join(POLICIES[name]) for name in names},
      calibration={"task": CALIBRATION_TASK, "prompts": CALIBRATION_PROMPTS, "rate": CALIBRATION_RATE,
                   "question_seed": CALIBRATION_SEED, "length": args.length} if PROFILE in names else None)
  common.print_table(_pivot(whole))
  if plots.can_draw():
    plots.save_quality(rows, args.out / f"{args.name}.png")
    middle = {"rate": sorted(args.rate)[len(args.rate) // 2]}
    plots.save_kept([found for found in results if found.policy == summary.policy_name(found.series, middle)],
                    args.out / f"{args.name}-kept.png", most=len(names))


def _pivot(rows: Sequence[summary.Row]) -> list[dict[str, object]]:
  """A line for each policy and rate, a column for each task."""
  tasks = dict.fromkeys(row.task.removeprefix("recall-") for row in rows if row.task != summary.AVERAGE)
  lines: dict[str, dict[str, object]] = {}
  for row in rows:
    line = lines.setdefault(row.policy, {"policy": row.policy, **dict.fromkeys([*tasks, summary.AVERAGE])})
    line[row.task.removeprefix("recall-")] = None if row.score is None else round(row.score, 1)
    if row.task == summary.AVERAGE or "reached" not in line:
      line |= {"reached": round(row.rate_reached, 2), "bytes_held": round(row.bytes_held)}
  return list(lines.values())


if __name__ == "__main__":
  sys.exit(main())
