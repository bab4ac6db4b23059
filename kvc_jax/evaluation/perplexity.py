"""Perplexity of a text behind a compressed context: the text's own tokens go through the engine's decode steps."""

import dataclasses
import hashlib
import itertools
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from kvc_jax.engine import footprint
from kvc_jax.engine.engine import Engine
from kvc_jax.engine.output_text import OutputText
from kvc_jax.engine.request import CompressionReceipt, SamplingParams
from kvc_jax.engine.sequence import Sequence as EngineSequence
from kvc_jax.errors import InputError, check_count
from kvc_jax.evaluation.records import Record, check_records, open_records
from kvc_jax.evaluation.runner import described, held
from kvc_jax.eviction.compression import Compression
from kvc_jax.sampling import logprobs_of
from kvc_jax.tokenizer import IncrementalDecoder, Tokenizer

_WIDEST_TOKEN = 16
"""Characters; a text whose tokens are longer on the average is tokenized whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
  """A piece of a text.

  Attributes:
    context: token ids that are prefilled, and then compressed.
    targets: those that follow, whose probabilities are asked for.
  """

  context: list[int]
  targets: list[int]


def windows_of(
    tokenizer: Tokenizer, text: str, *, context_tokens: int, target_tokens: int, most: int | None = None
) -> list[Window]:
  """Cuts a text into windows, one behind the other; what is left at its end is not used.

  Args:
    tokenizer: of the model; its BOS token starts each context, where it adds one to texts.
    text: any.
    context_tokens: of each window, with BOS.
    target_tokens: of each window.
    most: windows.

  Raises:
    InputError: the text is too short for one.
  """
  check_count("--context-tokens", context_tokens, at_least=2)
  check_count("--target-tokens", target_tokens, at_least=1)
  if most is not None:
    check_count("--windows", most, at_least=1)
  start = tokenizer.encode("a")[:1]
  bos = start if start == [tokenizer.bos_id] else []
  each = context_tokens - len(bos) + target_tokens
  short = text if most is None else text[: most * each * _WIDEST_TOKEN]
  ids = tokenizer.encode(short, add_special_tokens=False)
  if most is not None and len(ids) < most * each:
    ids = tokenizer.encode(text, add_special_tokens=False)
  count = min(len(ids) // each, len(ids) if most is None else most)
  if not count:
    raise InputError(f"the text has {len(ids)} tokens, but a window takes {each}; give a longer text, or lower "
                     "--context-tokens or --target-tokens")
  pieces = [ids[at * each : (at + 1) * each] for at in range(count)]
  return [Window(context=bos + piece[:-target_tokens], targets=piece[-target_tokens:]) for piece in pieces]


def run_perplexity(
    engine: Engine,
    windows: Sequence[Window],
    path: pathlib.Path,
    compression: Compression | None,
    settings: Mapping[str, Any],
    *,
    name: str = "perplexity",
    progress: bool = False,
) -> list[Record]:
  """Finds the probabilities of every window's targets that `path` has no record of yet.

  A record is one of `run_task` with `nll`, the negative log-likelihood of the targets in nats, and
  `predicted_tokens`, their number, in place of a text and a score.

  Args:
    engine: with nothing to do.
    windows: all of one shape.
    path: .jsonl file to go on with, or to make.
    compression: None holds every KV; `interval` compresses again behind so many targets.
    settings: of the model and engine, JSON values, on which results depend.
    name: of the row in tables.
    progress: show a progress bar on stderr.

  Returns:
    All records of the file, in the order of the windows.

  Raises:
    InputError: the windows do not fit the engine, or the file does not fit the windows.
  """
  context, targets = len(windows[0].context), len(windows[0].targets)
  every = _all_settings(engine, windows, compression, settings, name)
  with open_records(path, every) as file:
    done = {record.get("id") for record in file.records}
    todo = [at for at in range(len(windows)) if str(at) not in done]
    rows = _rows(engine, context, targets, compression)
    if todo:  # compiled before the clock runs, as `Engine.warm_up` does the rest
      jax.block_until_ready(_logprob(np.zeros(engine.model.config.vocab_size, np.float32), np.int32(0)))
    with tqdm.tqdm(total=len(windows), initial=len(done), disable=not progress, unit="window", desc=name) as bar:
      try:
        for batch in itertools.batched(todo, rows):
          began = time.perf_counter()
          found = _measure(engine, [windows[at] for at in batch], compression)
          seconds = (time.perf_counter() - began) / len(batch)
          for at, (nll, receipt) in zip(batch, found, strict=True):
            file.append({"id": str(at), "group": "", "nll": nll, "predicted_tokens": targets, "prompt_tokens": context,
                         "output_tokens": targets, "seconds": round(seconds, 6), **held(receipt)})
            bar.update()
      except BaseException:
        engine.reset()  # a step that was broken off may have donated the cache and not given it back
        raise
    return sorted(file.records, key=lambda record: int(record["id"]))


def check_perplexity(
    engine: Engine, windows: Sequence[Window], path: pathlib.Path, compression: Compression | None,
    settings: Mapping[str, Any], *, name: str = "perplexity",
) -> None:
  """Raises the InputError with which `run_perplexity` would refuse these arguments, before anything is compiled."""
  check_records(path, _all_settings(engine, windows, compression, settings, name))


def _all_settings(
    engine: Engine, windows: Sequence[Window], compression: Compression | None, settings: Mapping[str, Any], name: str
) -> dict[str, Any]:
  context, targets = len(windows[0].context), len(windows[0].targets)
  if context + targets > engine.max_model_len:
    raise InputError(f"a window has {context} + {targets} tokens, but the context is {engine.max_model_len}; lower "
                     "--context-tokens or --target-tokens")
  digest = hashlib.sha256(np.array([w.context + w.targets for w in windows], np.int32).tobytes()).hexdigest()
  return {**settings, "compression": described(compression), "task": name, "windows": digest[:16],
          "context_tokens": context, "target_tokens": targets}


def _rows(engine: Engine, context: int, targets: int, compression: Compression | None) -> int:
  """Windows that run side by side: as many as fit in full; one where not even one does."""
  footprint.prefill_interval(engine.config, "a window's context", context, compression)
  fit = (engine.config.num_blocks - 1) // engine.config.blocks_for(context + targets)
  return max(1, min(engine.config.num_slots, fit))


def _measure(
    engine: Engine, windows: Sequence[Window], compression: Compression | None
) -> list[tuple[float, CompressionReceipt]]:
  """Negative log-likelihood of each window's targets, and what its cache held behind them."""
  batch = engine.batch
  sequences = [_sequence(engine, window, compression) for window in windows]
  firsts = [_prefill(engine, sequence) for sequence in sequences]
  nll = [-float(first) for first in jax.device_get(firsts)]
  for limits in _decode_limits(engine, sequences):
    found = batch.decode(sequences, limits, max(limits))
    counts, drawn = jax.device_get((found.counts, found.logprobs.drawn))
    for row, (sequence, limit) in enumerate(zip(sequences, limits, strict=True)):
      if counts[sequence.slot] < limit:
        raise InputError("the pool ran full behind a window's context; raise --num-blocks or --kv-cache-memory-bytes, "
                         "or lower --target-tokens")
      sequence.steps += limit
      nll[row] -= float(np.sum(drawn[:limit, sequence.slot], dtype=np.float64))
    if due := [sequence for sequence in sequences if sequence.is_due]:
      batch.compress(due)
  receipts = batch.receipts(sequences)
  for sequence in sequences:
    batch.release(sequence)
  if not all(map(math.isfinite, nll)):
    raise InputError("the model gives a target no probability (not a number); its weights or its dtype are at fault")
  return list(zip(nll, receipts, strict=True))


def _decode_limits(engine: Engine, sequences: Sequence[EngineSequence]) -> Iterator[list[int]]:
  """Steps of each loop, until all targets are through."""
  while any(limits := [min(s.steps_left(engine.max_model_len), engine.batch.steps_per_sync) for s in sequences]):
    yield limits


def _sequence(engine: Engine, window: Window, compression: Compression | None) -> EngineSequence:
  """A sequence whose output is known: the targets stand where drawn tokens would."""
  interval = footprint.prefill_interval(engine.config, "a window's context", len(window.context), compression)
  sequence = EngineSequence(
      request_id=0, prompt=window.context, compression=compression, prefill_interval=interval,
      params=SamplingParams(temperature=0.0, seed=0, max_tokens=len(window.targets), logprobs=0),
      output=OutputText(IncrementalDecoder(engine.tokenizer), ()))
  sequence.token_ids = list(window.targets)
  engine.batch.take_slot(sequence)
  return sequence


def _prefill(engine: Engine, sequence: EngineSequence) -> jax.Array:
  """Prefills and compresses the context as the engine does; log-probability f32 [] of the first target."""
  batch, interval = engine.batch, sequence.prefill_interval
  while True:
    logits, _ = batch.prefill(sequence, footprint.next_piece(sequence, batch.chunk_size))
    ends = sequence.prefilled == len(sequence.prompt)
    if sequence.compression and (ends or (interval and sequence.prefilled % interval == 0)):
      batch.score(sequence)
      batch.compress([sequence])
    if ends:
      sequence.observation = None
      return _logprob(logits, np.int32(sequence.token_ids[0]))


@jax.jit
def _logprob(logits: jax.Array, token: jax.Array) -> jax.Array:
  return logprobs_of(logits[None], token[None], jax.numpy.bool_(True)).drawn[0]
