"""Tables of what runs left on disk: quality, bytes held and speed, from the same records."""

import csv
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvc_jax.errors import InputError
from kvc_jax.evaluation.records import Record, read_records, read_settings, settings_path

UNCOMPRESSED = "uncompressed"
AVERAGE = "average"
"""Name of the row that has a policy's mean over its tasks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One task under one policy.

  Attributes:
    policy: folder of the run.
    series: policies of one name that differ in their budget alone.
    task: its name, or `AVERAGE`.
    group: of samples; "" for all of them.
    samples: done so far.
    score: mean, times 100; None of perplexities.
    perplexity: None of tasks that are scored.
    rate_reached: blocks without compression over blocks held, all samples together.
    bytes_held: of a sample at its end, mean.
    bytes_uncompressed: likewise, without compression.
    prompt_tokens: of a sample, mean.
    output_tokens: of a sample, mean.
    seconds: that the samples took, together.
    output_tokens_per_second: all output tokens over these.
    tokens_per_second: prompts' tokens as well.
  """

  policy: str
  series: str
  task: str
  group: str
  samples: int
  score: float | None
  perplexity: float | None
  rate_reached: float
  bytes_held: float
  bytes_uncompressed: float
  prompt_tokens: float
  output_tokens: float
  seconds: float
  output_tokens_per_second: float
  tokens_per_second: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """Records of one task under one policy."""

  policy: str
  series: str
  task: str
  records: list[Record]


def policy_name(series: str, budget: Mapping[str, float]) -> str:
  """Folder of a policy's runs, such as "window-all-8x".

  Args:
    series: what policies that differ in their budget alone have in common; `UNCOMPRESSED` without a budget.
    budget: options of `Compression` by name: the rate, or another and its number.
  """
  return "-".join([series, *(f"{n:g}x" if name == "rate" else f"{name}-{n:g}" for name, n in budget.items())])


def read_results(folder: pathlib.Path) -> list[Results]:
  """All results of an output folder, POLICY/TASK.jsonl: uncompressed ones first, then by series, rate reached and task.

  Raises:
    InputError: there are none, or a file is damaged or has records of something else.
  """
  found = []
  shapes: dict[str, tuple[int, ...]] = {}  # of each policy's layers and heads
  for path in sorted(folder.glob("*/*.jsonl")):
    if settings_path(path).exists() and (records := read_records(path)):
      settings = read_settings(path)
      for number, record in enumerate(records, 1):
        shape = _check_record(f"{path}, line {number},", record)
        if shapes.setdefault(path.parent.name, shape) != shape:
          raise InputError(f"{path}, line {number}, has kvs_kept of another model than the records before; give each "
                           "model an --out of its own")
      found.append(Results(policy=path.parent.name, series=str(settings.get("series", path.parent.name)),
                           task=path.stem, records=records))
  if not found:
    raise InputError(f"{folder} has no results; give the --out of a kvc eval command")
  rates = {policy: _rate_reached([r for f in found if f.policy == policy for r in f.records])
           for policy in {f.policy for f in found}}
  return sorted(found, key=lambda f: (f.policy != UNCOMPRESSED, f.series, rates[f.policy], f.policy, f.task))


_NUMBERS = (
    "blocks_held", "blocks_uncompressed", "bytes_held", "bytes_uncompressed", "prompt_tokens", "output_tokens",
    "seconds")


def _check_record(where: str, record: Record) -> tuple[int, ...]:
  """Shape [L, H] of its `kvs_kept`; raises InputError unless it has the fields that `run_task` writes."""

  def wants(what: str, name: str) -> InputError:
    return InputError(f"{where} has no {what} as {name!r}, so kvc eval did not write it; remove the file")

  quality = ("score",) if "score" in record else ("nll", "predicted_tokens")
  for name in (*_NUMBERS, *quality):
    if not isinstance(record.get(name), (int, float)):
      raise wants("number", name)
  if not isinstance(record.get("group"), str):
    raise wants("text", "group")
  try:
    kept = np.array(record.get("kvs_kept"), np.float64)
  except (TypeError, ValueError):
    kept = np.zeros(0)
  if kept.ndim != 2 or not kept.size:
    raise wants("numbers by layer and head", "kvs_kept")
  return kept.shape


def _rate_reached(records: Sequence[Record]) -> float:
  return sum(record["blocks_uncompressed"] for record in records) / max(sum(r["blocks_held"] for r in records), 1)


def summarize(results: Iterable[Results]) -> list[Row]:
  """A row for each task and policy, for each group of samples in it, and for the mean of each policy's scores."""
  rows: list[Row] = []
  for _, of_policy in itertools.groupby(results, key=lambda found: found.policy):
    whole = []
    for found in of_policy:
      whole.append(_row(found, "", found.records))
      groups = {record["group"] for record in found.records} - {""}
      rows.append(whole[-1])
      rows += [_row(found, group, [r for r in found.records if r["group"] == group]) for group in sorted(groups)]
    scored = [row for row in whole if row.score is not None]
    if len(scored) > 1:
      rows.append(_average(scored))
  return rows


def _row(found: Results, group: str, records: Sequence[Record]) -> Row:
  count = len(records)
  total = {name: sum(record[name] for record in records) for name in (
      "bytes_held", "bytes_uncompressed", "prompt_tokens", "output_tokens", "seconds")}
  scores = [record["score"] for record in records if "score" in record]
  nll = sum(record.get("nll", 0.0) for record in records)
  predicted = sum(record.get("predicted_tokens", 0) for record in records)
  seconds = max(total["seconds"], 1e-9)
  return Row(
      policy=found.policy, series=found.series, task=found.task, group=group, samples=count,
      score=100 * sum(scores) / count if scores else None,
      perplexity=math.exp(min(nll / predicted, 700.0)) if predicted else None,
      rate_reached=_rate_reached(records),
      bytes_held=total["bytes_held"] / count, bytes_uncompressed=total["bytes_uncompressed"] / count,
      prompt_tokens=total["prompt_tokens"] / count, output_tokens=total["output_tokens"] / count,
      seconds=total["seconds"], output_tokens_per_second=total["output_tokens"] / seconds,
      tokens_per_second=(total["prompt_tokens"] + total["output_tokens"]) / seconds)


def _average(rows: Sequence[Row]) -> Row:
  """Scores count by task, as LongBench's do; bytes and tokens by sample; speed over the whole time."""
  samples = sum(row.samples for row in rows)
  seconds = sum(row.seconds for row in rows)

  def mean(name: str) -> float:
    return sum(getattr(row, name) * row.samples for row in rows) / samples

  held, uncompressed, prompt, output = map(mean, ("bytes_held", "bytes_uncompressed", "prompt_tokens", "output_tokens"))
  return Row(
      policy=rows[0].policy, series=rows[0].series, task=AVERAGE, group="", samples=samples,
      score=sum(row.score for row in rows if row.score is not None) / len(rows), perplexity=None,
      rate_reached=uncompressed / max(held, 1), bytes_held=held, bytes_uncompressed=uncompressed,
      prompt_tokens=prompt, output_tokens=output, seconds=seconds,
      output_tokens_per_second=output * samples / max(seconds, 1e-9),
      tokens_per_second=(prompt + output) * samples / max(seconds, 1e-9))


def table(rows: Sequence[Row]) -> list[str]:
  """Lines of a table for people."""
  head = ("policy", "task", "samples", "score", "perplexity", "reached", "bytes held", "tokens in", "out", "out/s")
  cells = [head, *(_cells(row) for row in rows)]
  widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
  return ["  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                    for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in cells]


def _cells(row: Row) -> tuple[str, ...]:
  return (
      row.policy, row.task + (f" {row.group}" if row.group else ""), str(row.samples),
      "" if row.score is None else f"{row.score:.2f}", "" if row.perplexity is None else f"{row.perplexity:.3f}",
      f"{row.rate_reached:.2f}x", f"{row.bytes_held:,.0f}", f"{row.prompt_tokens:.0f}", f"{row.output_tokens:.0f}",
      f"{row.output_tokens_per_second:.1f}")


def write_tables(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes summary.csv and summary.json; returns their paths."""
  as_dicts: list[dict[str, Any]] = [dataclasses.asdict(row) for row in rows]
  with (folder / "summary.csv").open("w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(as_dicts)
  (folder / "summary.json").write_text(json.dumps(as_dicts, indent=2) + "\n", encoding="utf-8")
  return [folder / "summary.csv", folder / "summary.json"]
