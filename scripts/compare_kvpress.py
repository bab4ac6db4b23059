#!/usr/bin/env python
"""Asks a model the same questions under this project's compression and under kvpress's, at equal kept share.

    python scripts/compare_kvpress.py MODEL --work DIR                            # our half
    python scripts/compare_kvpress.py MODEL --work DIR --python PEER/bin/python   # theirs as well, and the comparison

Both get the same weights, dtype and prompt tokens, answer greedily, and are scored by the same function. A share s
of an n-token prompt is a budget of s * n tokens per head, rounded down to whole blocks, window included; where the
window is more than half of it, the window is halved, for both. What was answered before is in DIR and is not asked
again, so the halves may run on different machines. PEER is an environment of its own with torch and kvpress
0.5.5 (transformers below 5.3); see scripts/peer_kvpress.py.

Prints a line for each policy, share and task: scores and their difference in points, the share of the prompt's KVs that
attention still sees, bytes held at the end, the percentage of answers that are the same, and how far the same KVs stay:
`overlap` is the mean over heads of the KVs that both keep, over those that the side with more keeps; `same heads` the
share of heads that keep exactly the same. `errors` counts prompts that kvpress could not do: scored on neither side.
"""

import argparse
import base64
import dataclasses
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import tqdm

from kvc_jax import Compression, SamplingParams
from kvc_jax.engine.engine import Engine
from kvc_jax.engine.request import RequestOutput
from kvc_jax.errors import InputError, check_count
from kvc_jax.evaluation.haystack import held_out_sentences
from kvc_jax.evaluation.recall import recall_tasks
from kvc_jax.evaluation.recall_episodes import TASKS
from kvc_jax.evaluation.records import RecordFile, open_records
from kvc_jax.evaluation.task import Sample, Task
from kvc_jax.eviction.rules import RULES
from kvc_jax.tokenizer import Tokenizer

PEER = pathlib.Path(__file__).with_name("peer_kvpress.py")
FULL, KV_COMPRESS, AVERAGE = "full", "kv-compress", "average"
POLICIES = (FULL, "snapkv", "adakv", "tova", "streaming", "keydiff", "expected", "key-norm", KV_COMPRESS)
"""Ours; kvpress has all but the last under these names (peer_kvpress.py)."""

Row = dict[str, Any]


def compression_of(policy: str, budget: int, window: int) -> Compression | None:
  """Our compression with the settings of the press of that name; None for `FULL`."""
  if policy == FULL:
    return None
  if policy == KV_COMPRESS:
    scoring, heads = RULES["window"](queries=min(16, window)), {}
  elif policy in ("snapkv", "adakv"):
    scoring = RULES["snapkv"](queries=window, pooling=5, pool="mean")
    heads = {"allocation": "head"} if policy == "snapkv" else {"allocation": "layer", "safeguard": 0.2}
  else:
    scoring, heads, window = RULES[policy](), {"allocation": "head"}, 1  # these presses protect no window
  return Compression(max_cache_tokens=budget, window=window, scoring=scoring, **heads)


# --------------------------------------------------------------------------- questions and runs


class TextTask:
  """Stretches of a text to go on with: right is the next word. For models that cannot be asked."""

  name = "text"

  def __init__(self, sentences: Sequence[str], *, lengths: Sequence[int], count: int, seed: int = 0):
    self._sentences, self._lengths, self._count, self._seed = sentences, lengths, count, seed
    self.settings: Mapping[str, Any] = {"lengths": list(lengths), "count": count, "seed": seed}

  def __len__(self) -> int:
    return self._count * len(self._lengths)

  def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
    for length in self._lengths:
      for number in range(self._count):
        first = ((2 * number + 1) * len(self._sentences) // (2 * self._count) + self._seed) % len(self._sentences)
        ids = tokenizer.encode(" ".join(self._sentences[first:first + length]))
        if len(ids) < length:
          raise InputError(f"length {length} is too long for the shipped text; give a shorter one")
        following = tokenizer.decode(ids[length - 8:length])
        yield Sample(id=f"{length}-{number}", prompt=ids[:length - 8], max_new_tokens=8, references=(following,))

  def score(self, prediction: str, sample: Sample) -> float:
    return float(prediction.split()[:1] == sample.references[0].split()[:1])


@dataclasses.dataclass(frozen=True)
class Question:
  """A sample, its task, and the tokens that both sides get."""

  id: str
  task: Task
  sample: Sample
  token_ids: list[int]
  max_new_tokens: int
  stop_token_ids: list[int]

  def as_json(self) -> Row:
    return {"id": self.id, "token_ids": self.token_ids, "max_new_tokens": self.max_new_tokens,
            "stop_token_ids": self.stop_token_ids}


@dataclasses.dataclass(frozen=True)
class Run:
  """One policy at one share; `budgets` has tokens per head and window for each question."""

  policy: str
  share: Fraction
  budgets: dict[str, tuple[int, int]]

  @property
  def name(self) -> str:
    return FULL if self.policy == FULL else f"{self.policy}-{1 / self.share}x"


def make_questions(tasks: Sequence[Task], tokenizer: Tokenizer, context: int) -> list[Question]:
  """All samples of all tasks; none goes beyond the model's context."""
  found = []
  for task in tasks:
    for sample in task.samples(tokenizer):
      ids = tokenizer.encode(sample.prompt) if isinstance(sample.prompt, str) else list(sample.prompt)
      room = context - len(ids)
      if room < 1:
        raise InputError(f"{task.name} {sample.id} has {len(ids)} tokens, but the model's context is {context}; "
                         "give a shorter --length")
      found.append(Question(
          f"{task.name}/{sample.id}", task, sample, ids, min(sample.max_new_tokens, room),
          sorted({*sample.stop_token_ids, *tokenizer.eos_ids})))
  return found


def budget_of(tokens: int, share: Fraction, window: int, block_size: int) -> tuple[int, int]:
  """Tokens per head that may stay, in whole blocks, and the window, at most half of them.

  Raises:
    InputError: less than a block and a window of one token would stay.
  """
  budget = int(tokens * share) // block_size * block_size
  if budget < 2:
    raise InputError(f"a share of {share} leaves {budget} tokens of {tokens} in blocks of {block_size}; give longer "
                     "prompts, larger shares or a smaller --block-size")
  while window > budget // 2:
    window //= 2
  return budget, window


def make_runs(
    questions: Sequence[Question], policies: Sequence[str], rates: Sequence[Fraction], window: int, block_size: int
) -> list[Run]:
  """Every policy at every share 1 / rate; `FULL` once."""
  runs = []
  for policy in dict.fromkeys(policies):
    for rate in [Fraction(1)] if policy == FULL else dict.fromkeys(rates):
      share = 1 / rate
      runs.append(Run(policy, share, {
          q.id: (len(q.token_ids), window) if policy == FULL
          else budget_of(len(q.token_ids), share, window, block_size) for q in questions}))
  return runs


# --------------------------------------------------------------------------- our half


def pack(kept: np.ndarray) -> str:
  """A bit map as text."""
  return base64.b64encode(np.packbits(kept)).decode()


def unpack(line: Row) -> np.ndarray:
  """The bit map [L, H, tokens] of the prompt's KVs that a line says were kept."""
  shape = line["shape"]
  bits = np.frombuffer(base64.b64decode(line["kept"]), np.uint8)
  return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)


def our_line(run: Run, question: Question, output: RequestOutput) -> Row:
  """What ours.jsonl says of one answer."""
  receipt, tokens = output.receipt, len(question.token_ids)
  assert receipt.positions is not None
  layers, heads, _ = receipt.positions.shape
  kept = np.zeros((layers, heads, tokens), bool)
  layer, head, place = np.nonzero((receipt.positions >= 0) & (receipt.positions < tokens))
  kept[layer, head, receipt.positions[layer, head, place]] = True
  return {"run": run.name, "id": question.id, "token_ids": output.token_ids, "kvs_seen": int(kept.sum()),
          "bytes_held": receipt.bytes_held, "shape": list(kept.shape), "kept": pack(kept)}


def answer_ours(
    make_engine: Callable[[], Engine], questions: Sequence[Question], runs: Sequence[Run], file: RecordFile
) -> None:
  """Appends a line for each run and question that the file has none of; the engine is made where there is such."""
  done = {(line["run"], line["id"]) for line in file.records}
  todo = [(q, run) for q in questions for run in runs if (run.name, q.id) not in done]
  if not todo:
    return
  engine = make_engine()
  left, asked = iter(tqdm.tqdm(todo, desc="ours", disable=None)), {}
  while True:
    for question, run in itertools.islice(left, max(0, 2 * engine.config.num_slots - len(asked))):
      params = SamplingParams(
          temperature=0.0, max_tokens=question.max_new_tokens, stop_token_ids=question.stop_token_ids)
      compression = compression_of(run.policy, *run.budgets[question.id])
      asked[engine.add(question.token_ids, params, compression, return_positions=True)] = run, question
    if not engine.has_work:
      break
    for update in engine.step():
      if update.output:
        file.append(our_line(*asked.pop(update.request_id), update.output))
  engine.close()


# --------------------------------------------------------------------------- their half


def ask_peer(python: str, model: str, work: pathlib.Path, dtype: str, threads: int) -> None:
  """Runs peer_kvpress.py to its end.

  Raises:
    InputError: it cannot start, or ended with an error; its last line is in the message.
  """
  command = [python, str(PEER), model, str(work), "--dtype", dtype, "--threads", str(threads)]
  try:
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
      assert process.stderr is not None
      last = ""
      for line in process.stderr:
        last = line.strip() or last
        if line.startswith("kvpress: "):
          print(line.strip(), file=sys.stderr)
  except OSError as e:
    raise InputError(f"{python} cannot be run ({e.strerror}); give --python the interpreter of an environment with "
                     "torch and kvpress 0.5.5") from None
  if process.returncode:
    raise InputError(f"{PEER.name} failed: {last or 'no message'}; its environment needs torch and kvpress 0.5.5")


def read_lines(path: pathlib.Path) -> list[Row]:
  """JSON objects of a file, none where there is no file; a last line that was not written to its end is left out."""
  return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


# --------------------------------------------------------------------------- comparison


def overlap(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
  """Of bit maps [L, H, T]: mean over heads of KVs both keep over those of the side with more; share of equal heads."""
  both = (ours & theirs).sum(axis=-1)
  most = np.maximum(ours.sum(axis=-1), theirs.sum(axis=-1))
  return float((both / np.maximum(most, 1)).mean()), float((ours == theirs).all(axis=-1).mean())


def text_of(line: Row, question: Question, tokenizer: Tokenizer) -> str:
  """The answer of either side, without what ended it."""
  return tokenizer.decode(list(itertools.takewhile(lambda i: i not in question.stop_token_ids, line["token_ids"])))


def compare(
    questions: Sequence[Question], runs: Sequence[Run], ours: Sequence[Row], theirs: Sequence[Row],
    tokenizer: Tokenizer,
) -> list[Row]:
  """A row for each run and task, and for each run's mean over its tasks; scores times 100.

  Questions that kvpress gave an error for count for neither side. What kvpress has no line of has None.
  """
  lines = [{(line["run"], line["id"]): line for line in side} for side in (ours, theirs)]
  rows = []
  for run in runs:
    of_run = []
    for name, group in itertools.groupby(questions, key=lambda q: q.task.name):
      of_run.append({"policy": run.policy, "kept": str(run.share), "task": name,
                     **_task_row(run, list(group), *lines, tokenizer)})
    rows += of_run
    if len(of_run) > 1:
      rows.append({**of_run[0], "task": AVERAGE, **{
          key: sum(row[key] for row in of_run) if key in ("samples", "errors") else _mean([row[key] for row in of_run])
          for key in of_run[0] if key not in ("policy", "kept", "task")}})
  return rows


_SIDES = ("score", "share", "bytes")


def _task_row(
    run: Run, questions: Sequence[Question], ours: Mapping, theirs: Mapping, tokenizer: Tokenizer
) -> Row:
  errors = sum("error" in theirs.get((run.name, q.id), ()) for q in questions)
  counted = [q for q in questions if "error" not in theirs.get((run.name, q.id), ())]
  columns: dict[str, list[float | None]] = {
      f"{what}_{side}": [] for what in _SIDES for side in ("ours", "theirs")}
  columns |= {"same_answers": [], "overlap": [], "same_heads": []}
  for question in counted:
    both = [side.get((run.name, question.id)) for side in (ours, theirs)]
    for side, line in zip(("ours", "theirs"), both, strict=True):
      for what, value in zip(_SIDES, _measures(line, question, tokenizer), strict=True):
        columns[f"{what}_{side}"].append(value)
    mine, other = both
    if mine and other:
      columns["same_answers"].append(100.0 * (mine["token_ids"] == other["token_ids"]))
      shares = overlap(unpack(mine), unpack(other))
      columns["overlap"].append(shares[0])
      columns["same_heads"].append(shares[1])
  means = {name: _mean(values) for name, values in columns.items()}
  pair = means["score_ours"], means["score_theirs"]
  difference = None if None in pair else pair[0] - pair[1]
  return {"samples": len(counted), "errors": errors, "difference": difference, **means}


def _measures(line: Row | None, question: Question, tokenizer: Tokenizer) -> tuple[float | None, ...]:
  if line is None:
    return (None,) * len(_SIDES)
  score = question.task.score(text_of(line, question, tokenizer), question.sample)
  return 100.0 * score, line["kvs_seen"] / float(np.prod(line["shape"])), float(line["bytes_held"])


def _mean(values: Sequence[float | None]) -> float | None:
  """None where one is missing."""
  known = [value for value in values if value is not None]
  return sum(known) / len(known) if known and len(known) == len(values) else None


def best_of_theirs(rows: Sequence[Row]) -> list[Row]:
  """KV-Compress beside kvpress's best policy at each share, by the mean over tasks (or the only task)."""
  found = []
  whole = [row for row in rows if row["task"] == AVERAGE] or list(rows)
  for mine in (row for row in whole if row["policy"] == KV_COMPRESS):
    others = [row for row in whole if row["kept"] == mine["kept"] and row["score_theirs"] is not None]
    if others and mine["score_ours"] is not None:
      best = max(others, key=lambda row: row["score_theirs"])
      found.append({"kept": mine["kept"], "kv_compress": mine["score_ours"], "best": best["policy"],
                    "score": best["score_theirs"], "difference": mine["score_ours"] - best["score_theirs"],
                    "bytes_ours": mine["bytes_ours"], "bytes_theirs": best["bytes_theirs"]})
  return found


def table(rows: Sequence[Row]) -> list[str]:
  """Lines of a table for people; a column for each key."""
  if not rows:
    return []
  cells = [[name.replace("_", " ") for name in rows[0]]]
  cells += [[_cell(name, value) for name, value in row.items()] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cell(name: str, value: Any) -> str:
  if not isinstance(value, float):
    return "-" if value is None else str(value)
  if name.startswith("bytes"):
    return f"{value:,.0f}"
  return f"{value:.4f}" if name.startswith(("share", "overlap", "same_heads")) else f"{value:.1f}"


# --------------------------------------------------------------------------- command


def main() -> int:
  args = _parser().parse_args()
  try:
    result = run(args)
  except InputError as e:
    print(f"compare_kvpress.py: error: {e}", file=sys.stderr)
    return 2
  for lines in (table(result["rows"]), table(result["best_of_theirs"])):
    print("\n".join([*lines, ""]))
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
  return 0


def run(args: argparse.Namespace) -> Row:
  """What the command line asks for: questions, our answers, theirs where --python is given, and the comparison."""
  check_count("--window", args.window, at_least=1)
  check_count("--count", args.count, at_least=1)
  for length in args.length:
    check_count("--length", length, at_least=16)
  for rate in args.rate:
    if rate <= 1:
      raise InputError(f"--rate is {rate}; give numbers above 1 (the full cache is policy {FULL})")
  tokenizer = Tokenizer.from_folder(args.model)
  config = (pathlib.Path(args.model) / "config.json").read_bytes()
  questions = make_questions(_tasks(args), tokenizer, json.loads(config)["max_position_embeddings"])
  runs = make_runs(questions, args.policy, args.rate, args.window, args.block_size)
  prompts = [json.dumps(q.as_json()) for q in questions]
  settings = {
      "model": pathlib.Path(args.model).name, "weights": _digest(pathlib.Path(args.model)), "dtype": args.dtype,
      "block_size": args.block_size, "window": args.window,
      "questions": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]}
  with open_records(args.work / "ours.jsonl", settings) as file:  # refuses a folder made under other settings
    if not file.records and (args.work / "theirs.jsonl").exists():
      raise InputError(f"{args.work} has theirs.jsonl, but no answers of ours; remove it, or give another --work")
    _write_lines(args.work / "prompts.jsonl", prompts)
    _write_lines(args.work / "runs.jsonl", [
        json.dumps({"run": r.name, "press": r.policy if r.policy != FULL else "none", "budgets": r.budgets})
        for r in runs if r.policy != KV_COMPRESS])
    answer_ours(lambda: _engine(args), questions, runs, file)
    ours = file.records
  if args.python:
    ask_peer(args.python, args.model, args.work, args.dtype, args.threads)
  rows = compare(questions, runs, ours, read_lines(args.work / "theirs.jsonl"), tokenizer)
  about = {side: args.work / f"{side}.machine.json" for side in ("ours", "theirs")}
  return {"name": "compare_kvpress", **settings, "tasks": {q.task.name: dict(q.task.settings) for q in questions},
          **{side: json.loads(path.read_text()) if path.exists() else None for side, path in about.items()},
          "best_of_theirs": best_of_theirs(rows), "rows": rows}


def _rounded(value: Any) -> Any:
  """Floats to five digits."""
  if isinstance(value, dict):
    return {key: _rounded(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_rounded(item) for item in value]
  return float(f"{value:.5g}") if isinstance(value, float) else value


def _tasks(args: argparse.Namespace) -> list[Task]:
  names = list(dict.fromkeys(args.task))
  tasks: list[Task] = []
  if recall := [name for name in names if name != TextTask.name]:
    tasks += recall_tasks(recall, lengths=args.length, count=args.count, seed=args.question_seed)
  if TextTask.name in names:
    tasks.append(TextTask(held_out_sentences(), lengths=args.length, count=args.count,
                          seed=args.question_seed))
  return tasks


def _engine(args: argparse.Namespace) -> Engine:
  from bench_common import machine

  (args.work / "ours.machine.json").write_text(json.dumps(machine()) + "\n", encoding="utf-8")
  return Engine(
      args.model, dtype=args.dtype, block_size=args.block_size, max_num_seqs=args.max_num_seqs, prefix_caching=True)


def _digest(model: pathlib.Path) -> str:
  """Of the configuration and the beginnings of the weight files."""
  digest = hashlib.sha256((model / "config.json").read_bytes())
  for path in sorted(model.glob("*.safetensors")):
    with path.open("rb") as file:
      digest.update(file.read(1 << 20))
  return digest.hexdigest()[:16]


def _write_lines(path: pathlib.Path, lines: Sequence[str]) -> None:
  path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _fraction(text: str) -> Fraction:
  try:
    return Fraction(text)
  except ZeroDivisionError:
    raise argparse.ArgumentTypeError(f"{text} divides by zero") from None


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("model", help="Hugging Face folder")
  parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the answers of both sides")
  parser.add_argument("--python", help="interpreter of kvpress's environment; without it only our half runs")
  parser.add_argument("--task", nargs="+", default=list(TASKS), choices=[*TASKS, TextTask.name],
                      help="recall tasks (all by default), or text: going on with a text")
  parser.add_argument("--length", type=int, nargs="+", default=[4096], help="tokens of prompt and answer")
  parser.add_argument("--count", type=int, default=20, help="questions of each task and length")
  parser.add_argument("--question-seed", type=int, default=0)
  parser.add_argument("--rate", type=_fraction, nargs="+", default=[Fraction(2**i) for i in range(1, 6)])
  parser.add_argument("--policy", nargs="+", default=list(POLICIES), choices=POLICIES)
  parser.add_argument("--window", type=int, default=32, help="of protected and, for snapkv and adakv, observed tokens")
  parser.add_argument("--block-size", type=int, default=16, help="of our cache; 1 holds what kvpress holds, to the KV")
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
  parser.add_argument("--max-num-seqs", type=int, default=8)
  parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
  parser.add_argument("--json", type=pathlib.Path, help="file to write, such as docs/results/compare_kvpress.json")
  return parser


if __name__ == "__main__":
  sys.exit(main())
