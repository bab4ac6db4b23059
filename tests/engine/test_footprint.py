"""Blocks that a request takes, worked by hand: two heads, four KVs in a block, 24 blocks."""

import dataclasses

import pytest

from kvc_jax import CacheConfig, Compression, InputError, SamplingParams
from kvc_jax.engine import footprint
from kvc_jax.engine.sequence import Sequence

CONFIG = CacheConfig(
    num_layers=1, num_slots=2, num_kv_heads=2, head_dim=4, num_blocks=25, max_blocks_per_head=64, block_size=4)
SMALL = Compression(max_cache_tokens=16, window=4)


def _interval(tokens, compression):
  return footprint.prefill_interval(CONFIG, "the prompt", tokens, compression)


def _sequence(tokens, compression, **fields):
  return Sequence(request_id=0, prompt=[0] * tokens, params=SamplingParams(), compression=compression, output=None,
                  prefill_interval=_interval(tokens, compression), **fields)


@pytest.mark.parametrize(("tokens", "compression", "interval"), [
    (47, None, None),  # 12 blocks of each head, the next token's among them
    (47, SMALL, None),  # it fits as it is, so it is compressed once
    (48, SMALL, 32),  # 8 blocks of budget leave 16: 8 of each head
    (5000, SMALL, 32),
    (40, Compression(max_cache_tokens=16, window=4, prefill_interval=10), 10),
    (100, Compression(max_cache_tokens=16, window=4, prefill_interval=100), 25),  # halved until it fits
    (40, Compression(max_cache_tokens=40, window=4, prefill_interval=10), None),  # nothing would be evicted
    (100, Compression(max_cache_tokens=44, window=4), 4),  # 22 blocks, and one more of each head
    (100, Compression(max_cache_tokens=8, window=4, keep=[(0, 20)]), 16),  # 24 protected: 12 blocks
])
def test_interval_follows_from_request_and_pool(tokens, compression, interval):
  assert _interval(tokens, compression) == interval


@pytest.mark.parametrize(("compression", "message"), [
    (None, "the prompt needs 26 blocks, but the pool has 24"),
    (Compression(rate=1), "the prompt needs 26 blocks, but the pool has 24"),
    (Compression(max_cache_tokens=45, window=4), "the prompt needs 26 blocks even when it is compressed"),
])
def test_what_cannot_fit_is_refused(compression, message):
  with pytest.raises(InputError, match=message):
    _interval(48, compression)


def test_peak_and_pieces():
  assert footprint.peak_blocks(CONFIG, _sequence(47, SMALL)) == 24
  assert footprint.peak_blocks(CONFIG, _sequence(47, None)) == 24
  every_16 = Compression(max_cache_tokens=16, window=4, prefill_interval=16)
  sequence = _sequence(100, every_16)
  assert footprint.peak_blocks(CONFIG, sequence) == 8 + 8
  pieces = []
  while sequence.prefilled < 40:
    count = footprint.next_piece(sequence, 10)
    pieces.append((count, footprint.blocks_behind(CONFIG, sequence, count)))
    sequence.prefilled += count
  # Behind 16 and 32 tokens no more than 8 blocks are left, and these pieces start anew from there.
  assert pieces == [(10, 6), (6, 8), (10, 8 + 6), (6, 8 + 8), (10, 8 + 6)]


def test_excess_is_what_lies_above_the_floor():
  sequence = _sequence(40, SMALL, prefilled=40, held_blocks=13)
  assert footprint.excess_blocks(CONFIG, sequence) == 13 - 8
  sequence.compressed_at = 40
  assert footprint.excess_blocks(CONFIG, sequence) == 0
  assert footprint.excess_blocks(CONFIG, _sequence(40, None, prefilled=40, held_blocks=20)) == 0


def _decoding(tokens, compression=None, max_tokens=9, steps=0):
  sequence = _sequence(tokens, compression, steps=steps, prefilled=tokens)
  sequence.params = SamplingParams(max_tokens=max_tokens)
  return sequence


@pytest.mark.parametrize(("compression", "steps", "blocks"), [
    (None, 7, 2 * 10),  # 33 + 7 tokens
    (SMALL, 7, 2 * (4 + 2)),  # once: what comes behind the prompt stays
    (Compression(max_cache_tokens=16, window=4, interval=8), 7, 2 * (4 + 1)),  # always about half an interval
    (Compression(rate=2, window=1, interval=8), 8, 2 * (6 + 1)),  # 41 tokens: 1 + 20
    (Compression(max_cache_tokens=60, window=4, interval=8), 7, 2 * 10),  # never more than there are
])
def test_blocks_to_come(compression, steps, blocks):
  assert footprint.blocks_after(CONFIG, _decoding(33, compression), steps) == blocks


def test_planning_ahead_counts_the_blocks_when_each_ends():
  # Alone 12 tokens end with 20, 10 blocks, so two fit the 24; the third is too much.
  assert footprint.fit_ahead(CONFIG, [_decoding(12), _decoding(12)], 1.0)
  assert not footprint.fit_ahead(CONFIG, [_decoding(12), _decoding(12), _decoding(12)], 1.0)
  # 6 blocks each now, and 8 half way to their ends.
  assert footprint.fit_ahead(CONFIG, [_decoding(12), _decoding(12), _decoding(12)], 0.5)
  assert not footprint.fit_ahead(CONFIG, [_decoding(12)] * 4, 0.5)
  # One that ends in a step gives its 14 blocks back before the other, of 8 now, gets to its 22.
  assert footprint.fit_ahead(CONFIG, [_decoding(27, max_tokens=2), _decoding(15, max_tokens=30)], 1.0)
  assert not footprint.fit_ahead(CONFIG, [_decoding(27, max_tokens=20), _decoding(15, max_tokens=30)], 1.0)
  # What the context leaves bounds an output as well: 256 tokens.
  roomy = dataclasses.replace(CONFIG, num_blocks=129)
  assert footprint.fit_ahead(roomy, [_decoding(15, max_tokens=10_000)], 1.0)
