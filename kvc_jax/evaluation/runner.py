"""Runs a task's samples through an engine, one JSON line a sample; what is done already is not done again."""

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from kvc_jax.engine.engine import Engine
from kvc_jax.engine.request import CompressionReceipt, RequestOutput, SamplingParams
from kvc_jax.errors import InputError
from kvc_jax.evaluation.records import Record, check_records, open_records
from kvc_jax.evaluation.task import Sample, Task
from kvc_jax.eviction.compression import Compression


def run_task(
    engine: Engine,
    task: Task,
    path: pathlib.Path,
    compression: Compression | None,
    settings: Mapping[str, Any],
    *,
    progress: bool = False,
) -> list[Record]:
  """Answers every sample that `path` has no record of yet, greedily, and scores it.

  A record has the sample's `id`, `group`, `answers` (its references) and extras; `pred`, the text;
  `score`; prompt and output tokens; why the text ended; the receipt's numbers: blocks and bytes held at
  the end and without compression, and `kvs_kept` [L][H]; and `seconds` that the engine worked since the
  record before: their sum is the engine's time, without what samples, scores and files took.

  Args:
    engine: with nothing to do; made and warmed up by the caller, so that no compile is in the times.
    task: what to ask.
    path: .jsonl file to go on with, or to make.
    compression: None holds every KV.
    settings: of the model and engine, JSON values, on which results depend; the task's own
      and the compression's are added.
    progress: show a progress bar on stderr.

  Returns:
    All records of the file, earlier runs' as well, in the order of the task's samples.

  Raises:
    InputError: the file was made under other settings or is damaged, or a sample
      does not fit the engine; what was done before stays on disk.
  """
  with open_records(path, _all_settings(task, compression, settings)) as file:
    done = {record.get("id") for record in file.records}
    order: dict[str, int] = {}
    todo = _counted(task.samples(engine.tokenizer), order, done)
    with tqdm.tqdm(total=len(task), initial=len(done), disable=not progress, unit="sample", desc=task.name) as bar:
      try:
        for sample, output, seconds in _answers(engine, todo, compression):
          file.append(_record(sample, output, task.score(output.text, sample), seconds))
          bar.update()
      except BaseException:
        engine.reset()  # a step that was broken off may have donated the cache and not given it back
        raise
    unknown = [record.get("id") for record in file.records if record.get("id") not in order]
    if unknown:
      raise InputError(f"{path} has a record of {unknown[0]!r}, which is no sample of {task.name}; remove the file, "
                       "or ask for as many samples as before")
    return sorted(file.records, key=lambda record: order[record["id"]])


def check_task(task: Task, path: pathlib.Path, compression: Compression | None, settings: Mapping[str, Any]) -> None:
  """Raises the InputError with which `run_task` would refuse to go on with a file, before anything is compiled."""
  check_records(path, _all_settings(task, compression, settings))


def _all_settings(task: Task, compression: Compression | None, settings: Mapping[str, Any]) -> dict[str, Any]:
  return {**settings, "compression": described(compression), "task": task.name, **task.settings}


def described(value: Any) -> Any:
  """A compression, a rule or another dataclass as JSON values that tell it from all others."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"kind": type(value).__name__, **fields}
  if isinstance(value, (tuple, list)):
    return [described(item) for item in value]
  if isinstance(value, (np.ndarray, jax.Array)):
    array = np.asarray(value)
    return {"shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
  return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _counted(samples: Iterator[Sample], order: dict[str, int], done: set[Any]) -> Iterator[Sample]:
  """Notes every sample's place, and hands on those that are not done."""
  for sample in samples:
    if sample.id in order:
      raise ValueError(f"two samples have the id {sample.id!r}")
    order[sample.id] = len(order)
    if sample.id not in done:
      yield sample


def _answers(
    engine: Engine, samples: Iterator[Sample], compression: Compression | None
) -> Iterator[tuple[Sample, RequestOutput, float]]:
  """Keeps the engine's slots full without reading all prompts at once; gives the engine's seconds with each answer."""
  asked: dict[int, Sample] = {}
  seconds = 0.0
  while True:
    while len(asked) < 2 * engine.config.num_slots and (sample := next(samples, None)) is not None:
      began = time.perf_counter()
      asked[_ask(engine, sample, compression)] = sample
      seconds += time.perf_counter() - began
    if not engine.has_work:
      return
    began = time.perf_counter()
    updates = engine.step()
    if any(update.output for update in updates):  # what the device does behind an answer is the engine's time too
      jax.block_until_ready(engine.batch.state)
    seconds += time.perf_counter() - began
    for update in updates:
      if update.output:
        yield asked.pop(update.request_id), update.output, seconds
        seconds = 0.0


def greedy_params(sample: Sample) -> SamplingParams:
  """How samples are answered."""
  return SamplingParams(temperature=0.0, max_tokens=sample.max_new_tokens, stop_token_ids=sample.stop_token_ids)


def _ask(engine: Engine, sample: Sample, compression: Compression | None) -> int:
  try:
    return engine.add(sample.prompt, greedy_params(sample), compression)
  except InputError as e:
    raise InputError(f"sample {sample.id}: {e}") from None


def held(receipt: CompressionReceipt) -> Record:
  """A receipt's part of a record."""
  return {
      "blocks_held": receipt.blocks_held, "blocks_uncompressed": receipt.blocks_uncompressed,
      "bytes_held": receipt.bytes_held, "bytes_uncompressed": receipt.bytes_uncompressed,
      "kvs_kept": receipt.kvs_kept.tolist()}


def _record(sample: Sample, output: RequestOutput, score: float, seconds: float) -> Record:
  return {
      "id": sample.id, "group": sample.group, "score": score, "pred": output.text, "answers": list(sample.references),
      **sample.extra, "prompt_tokens": len(output.prompt_token_ids), "output_tokens": len(output.token_ids),
      "finish_reason": output.finish_reason, "seconds": round(seconds, 6), **held(output.receipt)}
