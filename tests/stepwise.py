"""Drives a `Batch` by hand, a step at a time and with logits, where tests look inside."""

import jax
import numpy as np

from kvc_jax.engine import steps
from kvc_jax.engine.batch import Batch, decode_rule
from kvc_jax.engine.request import CompressionReceipt
from kvc_jax.engine.sequence import Sequence


def prefill(batch: Batch, sequence: Sequence) -> jax.Array:
  """Takes a slot, runs the whole prompt and scores it; returns logits [V]."""
  batch.take_slot(sequence)
  while sequence.prefilled < len(sequence.prompt):
    logits, ok = batch.prefill(sequence, min(batch.chunk_size, len(sequence.prompt) - sequence.prefilled))
    assert ok
  if sequence.compression:
    batch.score(sequence)
  return logits


def compress(batch: Batch, sequence: Sequence) -> None:
  for (same,), freed in batch.compress([sequence]):
    same.freed_blocks += int(freed[0])


def decode(batch: Batch, sequences: list[Sequence]) -> tuple[jax.Array, np.ndarray]:
  """Runs one token of each sequence; returns logits [S, V] and ok [S]."""
  tokens, active = np.zeros(batch.config.num_slots, np.int32), np.zeros(batch.config.num_slots, bool)
  for sequence in sequences:
    tokens[sequence.slot] = sequence.token_ids[sequence.steps]
    active[sequence.slot] = True
  rule = next((r for s in sequences if (r := decode_rule(s.compression)) is not None), None)
  logits, ok, batch.state = steps.decode_step(batch.model, batch.state, tokens, active, rule=rule)
  ok = np.asarray(ok)
  for sequence in sequences:
    sequence.steps += int(ok[sequence.slot])
  return logits, ok


def receipt(batch: Batch, sequence: Sequence) -> CompressionReceipt:
  (found,) = batch.receipts([sequence])
  return found
