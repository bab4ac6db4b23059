"""`kvc eval`: its options, its policies and its runs. Imports no JAX before it is needed."""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from kvc_jax.cli_options import (
    BUDGET_OPTIONS,
    MODEL_OPTIONS,
    Parser,
    add_compression_options,
    add_model_options,
    compression_of,
    flag,
    given_options,
    read_text,
)
from kvc_jax.errors import InputError, check_count
from kvc_jax.eviction.names import PROFILE


def add_eval(commands: Any) -> None:
  """Adds `eval` with its own commands to those of `kvc`."""
  evaluate = commands.add_parser("eval", help="measure quality, bytes held and speed under compression")
  kinds = evaluate.add_subparsers(required=True, metavar="WHAT", parser_class=Parser)
  longbench = kinds.add_parser("longbench", help="LongBench and LongBench-E, by their own metrics")
  _add_eval_options(longbench)
  group = longbench.add_argument_group("questions")
  group.add_argument("--data", required=True, help="folder with LongBench's SET.jsonl files")
  group.add_argument("--set", nargs="+", default=[], metavar="NAME", help="sets to ask; all that are there by default")
  group.add_argument("--longbench-e", action="store_true", help="LongBench-E (SET_e.jsonl), with scores by length")
  group.add_argument("--limit", type=int, help="ask only so many questions of each set")
  group.add_argument("--max-input-tokens", type=int,
                     help="longer prompts are cut in the middle; by default what the context has room for")
  group.add_argument("--max-new-tokens", type=int, help="of an answer; by default LongBench's own number for each set")
  group.add_argument("--template", choices=("auto", "model", "llama2", "none"), default="auto",
                     help="around prompts: the model's chat template, LongBench's [INST]...[/INST], or none; never "
                     "around few-shot and code prompts (default: the model's, where it has one)")
  longbench.set_defaults(run=_eval_longbench)
  recall = kinds.add_parser("recall", help="facts to be found again in a text, at any length")
  _add_eval_options(recall)
  group = recall.add_argument_group("questions")
  group.add_argument("--task", nargs="+", default=[], metavar="NAME", help="tasks to ask (default: all)")
  group.add_argument("--length", nargs="+", type=int, default=[1024, 2048, 4096], metavar="TOKENS",
                     help="of prompt and answer together (default: 1024 2048 4096)")
  group.add_argument("--count", type=int, default=50, help="questions of each task and length (default: %(default)s)")
  group.add_argument("--text", metavar="FILE", help="UTF-8 text to hide facts in (default: a novel that is shipped)")
  group.add_argument("--question-seed", type=int, default=0, help="other seeds ask other questions")
  recall.set_defaults(run=_eval_recall)
  perplexity = kinds.add_parser("perplexity", help="perplexity of a text's tokens behind a compressed context")
  _add_eval_options(perplexity)
  group = perplexity.add_argument_group("text")
  group.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, - for standard input")
  group.add_argument("--context-tokens", type=int,
                     help="prefilled and compressed in each window (default: what the targets leave, 4096 at most)")
  group.add_argument("--target-tokens", type=int, default=128, help="predicted in each window (default: %(default)s)")
  group.add_argument("--windows", type=int, default=32, help="most windows (default: %(default)s)")
  perplexity.set_defaults(run=_eval_perplexity)
  score = kinds.add_parser("score", help="score existing predictions by LongBench's metrics")
  score.add_argument("predictions", metavar="DIR",
                     help="folder with SET.jsonl files of pred, answers, all_classes and length")
  score.add_argument("--longbench-e", action="store_true", help="scores by length as well")
  score.add_argument("--json", action="store_true", help="print one JSON object, with the score of every sample")
  score.set_defaults(run=_eval_score)
  report = kinds.add_parser("report", help="table and plots of what kvc eval wrote so far")
  report.add_argument("out", metavar="DIR", type=pathlib.Path, help="--out of a kvc eval command")
  report.set_defaults(run=_eval_report)


def _add_eval_options(parser: argparse.ArgumentParser) -> None:
  """What every evaluation that runs a model takes."""
  add_model_options(parser)
  add_compression_options(
      parser, "compression: a run for each combination of one budget, one scoring and one allocation; "
      "a rate of 1 is without", several=True)
  group = parser.add_argument_group("run")
  group.add_argument("--out", type=pathlib.Path, default=pathlib.Path("kvc-eval"),
                     help="folder for results; a run that was broken off goes on there (default: %(default)s)")
  group.add_argument("--label", help="name of these policies in tables and plots, instead of scoring and allocation")
  group.add_argument("--seed", type=int, help="of --scoring random")
  group.add_argument("--warm-up", choices=("own", "none"), default="own",
                     help="compile before the clock runs, or not (default: %(default)s)")
  group.add_argument("--compilation-cache", help="folder where compiled steps are kept for the next start")
  group.add_argument("--quiet", action="store_true", help="no progress bars")


def _eval_longbench(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation import longbench

  extended = args.longbench_e
  names = longbench.check_names(args.set or longbench.sets_in(args.data, extended=extended), extended=extended)
  rows = {name: longbench.read_rows(args.data, name, extended=extended) for name in names}
  for option in ("limit", "max_new_tokens"):
    if (given := getattr(args, option)) is not None:
      check_count(flag(option), given, at_least=1)
  policies = policies_of(args)  # all is checked before the model is loaded
  engine = _load_to_measure(args, policies)
  tasks = []
  for name in names:
    new = min(longbench.most_new_tokens(name), args.max_new_tokens or longbench.most_new_tokens(name))
    tasks.append(longbench.LongBenchTask(
        name, rows[name], extended=extended, most_new_tokens=new, template=args.template, limit=args.limit,
        most_input_tokens=longbench.input_tokens(name, engine.max_model_len, new, args.max_input_tokens)))
  return _run_tasks(args, engine, policies, tasks)


def _eval_recall(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation.recall import recall_tasks

  lengths = sorted(set(args.length))
  tasks = recall_tasks(args.task, text=args.text, lengths=lengths, count=args.count, seed=args.question_seed)
  policies = policies_of(args)
  engine = _load_to_measure(args, policies)
  if lengths[-1] > engine.max_model_len:
    raise InputError(f"--length {lengths[-1]} is more than the model's context of {engine.max_model_len} tokens; "
                     "give shorter ones, or --max-model-len where the model can take more")
  return _run_tasks(args, engine, policies, tasks)


def _run_tasks(args: argparse.Namespace, engine: Any, policies: Sequence["Policy"], tasks: Sequence[Any]) -> int:
  """Every task under every policy, then the report; what is on disk already is not run again."""
  from kvc_jax.evaluation.runner import check_task, run_task

  runs = [(task, args.out / policy.name / f"{task.name}.jsonl", policy.compression, _settings(engine, policy))
          for policy in policies for task in tasks]
  for run in runs:
    check_task(*run)
  _warm_up_to_measure(args, engine, policies)
  for run in runs:
    run_task(engine, *run, progress=_shows_progress(args))
  return _eval_report(args)


def _eval_perplexity(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation.perplexity import check_perplexity, run_perplexity, windows_of

  text = read_text(args.text, "a text, or - for standard input")
  policies = policies_of(args)
  engine = _load_to_measure(args, policies)
  context = args.context_tokens
  if context is None:
    context = min(engine.max_model_len - args.target_tokens, 4096)
  windows = windows_of(
      engine.tokenizer, text, context_tokens=context, target_tokens=args.target_tokens, most=args.windows)
  runs = [(args.out / policy.name / "perplexity.jsonl", policy.compression, _settings(engine, policy))
          for policy in policies]
  for run in runs:
    check_perplexity(engine, windows, *run)
  _warm_up_to_measure(args, engine, policies)
  for run in runs:
    run_perplexity(engine, windows, *run, progress=_shows_progress(args))
  return _eval_report(args)


@dataclasses.dataclass(frozen=True)
class Policy:
  """One run of an evaluation."""

  name: str
  series: str
  compression: Any


def policies_of(args: argparse.Namespace) -> list[Policy]:
  """A policy for each combination of a budget, a scoring and an allocation; one without compression for a rate of 1."""
  from kvc_jax.evaluation.summary import UNCOMPRESSED, policy_name

  if args.label is not None and (not args.label.strip(".") or "/" in args.label or args.label == UNCOMPRESSED):
    raise InputError(f"--label {args.label!r} is no name for a folder of its own; give letters and digits")
  if args.seed is not None and "random" not in (args.scoring or []):
    raise InputError("--seed is of --scoring random alone, and nothing else is drawn; give that, or leave --seed out")
  policies: dict[str, Policy] = {}
  for scoring, allocation, budget in itertools.product(
      args.scoring or [None], args.allocation or [None], _budgets(args)):
    every = {name: budget.get(name) for name in BUDGET_OPTIONS}
    if budget.get("rate") == 1:
      policy = Policy(UNCOMPRESSED, UNCOMPRESSED, None)
    else:
      # Beside `profile` the file is that allocation's alone: the others take it only where it biases them.
      others = allocation != PROFILE and PROFILE in (args.allocation or []) and args.head_bias is None
      compression = compression_of(argparse.Namespace(**{
          **vars(args), **every, "scoring": scoring, "allocation": allocation,
          "head_profile": None if others else args.head_profile}))
      series = UNCOMPRESSED
      if compression is not None:
        heads = compression.allocation
        heads = heads if isinstance(heads, str) else type(heads).__name__
        series = args.label or f"{scoring or 'window'}-{heads}"
      policy = Policy(policy_name(series, budget), series, compression)
    if (other := policies.setdefault(policy.name, policy)) != policy:
      raise InputError(f"two policies would be called {other.name}; leave --label out, or run them one by one")
  return sorted(policies.values(), key=lambda policy: policy.compression is not None)


def _budgets(args: argparse.Namespace) -> list[dict[str, Any]]:
  """Each number that is given for a budget is one of its own."""
  given = given_options(args, BUDGET_OPTIONS)
  return [{name: value} for name, values in given.items()
          for value in (values if isinstance(values, list) else [values])] or [{}]


def _load_to_measure(args: argparse.Namespace, policies: Sequence[Policy]) -> Any:
  from kvc_jax.engine.engine import Engine
  from kvc_jax.evaluation.records import check_can_write

  for policy in policies:
    check_can_write(args.out / policy.name)
  compressions = [policy.compression for policy in policies if policy.compression]
  return Engine(
      args.model, **given_options(args, MODEL_OPTIONS), compilation_cache_dir=args.compilation_cache,
      progress=not args.quiet,
      rules=tuple(dict.fromkeys(compression.scoring for compression in compressions)),
      allocations=tuple(dict.fromkeys(compression.allocation for compression in compressions)))


def _warm_up_to_measure(args: argparse.Namespace, engine: Any, policies: Sequence[Policy]) -> None:
  """Compiles what will run, so that no compile is in the measured times."""
  if args.warm_up != "none":
    engine.warm_up(progress=_shows_progress(args), kinds=[policy.compression for policy in policies])


def _shows_progress(args: argparse.Namespace) -> bool:
  return not args.quiet and sys.stderr.isatty()


def _settings(engine: Any, policy: Policy) -> dict[str, Any]:
  """What an evaluation's results depend on, beside its questions and its compression."""
  return {"series": policy.series, "model": engine.fingerprint, "max_model_len": engine.max_model_len,
          "dtype": str(engine.config.query_dtype), "kv_cache_dtype": str(engine.config.dtype),
          "block_size": engine.config.block_size}


def _eval_report(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation import plots, summary

  results = summary.read_results(args.out)
  rows = summary.summarize(results)
  print("\n".join(summary.table(rows)))
  written = summary.write_tables(rows, args.out)
  if plots.can_draw():
    written += plots.save_all(rows, results, args.out)
  else:
    print("kvc: no plots, for matplotlib is missing; run: pip install 'kvc_jax[plot]', then: "
          f"kvc eval report {args.out}", file=sys.stderr)
  print("wrote", ", ".join(map(str, written)))
  return 0


def _eval_score(args: argparse.Namespace) -> int:
  from kvc_jax.evaluation import longbench

  found = longbench.score_folder(args.predictions, extended=args.longbench_e)
  if args.json:
    print(json.dumps({name: {**longbench.means(scores, buckets), "scores": scores}
                      for name, (scores, buckets) in found.items()}))
    return 0
  print(f"{'set':<20} samples  score" + "".join(f"  {name:>6}" for name in longbench.BUCKETS if args.longbench_e))
  for name, (scores, buckets) in found.items():
    means = longbench.means(scores, buckets)
    by_length = "".join(f"  {means.get(bucket, '-'):>6}" for bucket in longbench.BUCKETS if args.longbench_e)
    print(f"{name:<20} {means['samples']:>7} {means['score']:>6.2f}{by_length}")
  if len(found) > 1:
    average = sum(longbench.means(*one)["score"] for one in found.values()) / len(found)
    print(f"{'average':<20} {sum(len(scores) for scores, _ in found.values()):>7} {average:>6.2f}")
  return 0
