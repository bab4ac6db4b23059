"""Pallas-Triton version of `lowest_kvs`, for Ampere GPUs and newer.

One CTA per head searches the head's threshold some bits at a time, and where a tie
is split there, the last position among the equals. It reads the keys about ten
times; they come from the second-level cache, for the keys of the heads at work
together are a few MiB.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvc_jax.kernels import backends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is laid out.

  Attributes:
    tile: keys of one load, a power of two.
    unroll: loads in flight.
    step_bits: bits of a threshold that one read of the keys finds; divides 32.
    num_warps: of a CTA.
  """

  tile: int = 1024
  unroll: int = 4
  step_bits: int
  num_warps: int = 8


def default_config(heads: int) -> Config:
  """Few heads: more bits at a time and fewer reads. Many: fewer registers, so that more CTAs hide the latency."""
  return Config(step_bits=4 if heads <= 4 * backends.num_cores() else 2)


def lowest_kvs(
    keys: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    wanted: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
  """See `lowest_kvs.lowest_kvs`; `interpret` runs on the CPU, for tests."""
  heads, kvs = keys.shape
  config = config or default_config(heads)
  marks = pl.pallas_call(
      functools.partial(_kernel, kvs=kvs, block_size=positions.shape[1], config=config),
      out_shape=jax.ShapeDtypeStruct((heads * kvs,), jnp.int8), grid=(heads,), interpret=interpret, name="lowest_kvs",
      compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
  )(keys.reshape(-1), positions.reshape(-1), tables.reshape(-1), lengths, wanted)
  return marks.reshape(heads, kvs) != 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Head:
  """One head's list as its CTA reads it.

  Attributes:
    keys_ref, positions_ref, tables_ref: flat.
    row: of the keys and tables.
    length: KVs.
    kvs, block_size, config: static.
  """

  keys_ref: Any
  positions_ref: Any
  tables_ref: Any
  row: Any
  length: Any
  kvs: int
  block_size: int
  config: Config

  def reduce(self, body, init, combine=lambda carry, parts: carry + sum(parts)):
    """Combines `body` of all tiles, elementwise; body(index, held, keys) gives an array [tile] or a tuple of them."""
    tile, unroll = self.config.tile, self.config.unroll

    def step(i, carry):
      loads = [self.load((i * unroll + j) * tile, tile) for j in range(unroll)]
      parts = [body(*load) for load in loads]
      return tuple(combine(c, p) for c, p in zip(carry, zip(*parts, strict=True), strict=True))

    span = tile * unroll
    return lax.fori_loop(0, lax.div(self.length + (span - 1), jnp.int32(span)), step, init)

  def load(self, first, size):
    """Entries from `first` on: indices, which are held, keys."""
    index = first + jnp.arange(size, dtype=jnp.int32)
    held = index < self.length
    return index, held, plt.load(self.keys_ref.at[self.row * self.kvs + index], mask=held, other=0)

  def positions(self, index, chosen):
    """Token positions u32 of the chosen entries."""
    max_blocks, size = self.kvs // self.block_size, jnp.int32(self.block_size)
    blocks = plt.load(self.tables_ref.at[self.row * max_blocks + lax.div(index, size)], mask=chosen, other=0)
    at = blocks * self.block_size + lax.rem(index, size)
    return plt.load(self.positions_ref.at[at], mask=chosen, other=0).astype(jnp.uint32)

  def counts(self, flags, number):
    """How many entries have each of `number` flags; flags(index, held, keys) gives a list of masks."""
    zeros = (jnp.zeros((self.config.tile,), jnp.int32),) * number
    found = self.reduce(lambda *tile: tuple(flag.astype(jnp.int32) for flag in flags(*tile)), zeros)
    return [jnp.sum(count) for count in found]

  def smallest(self, flags_at, wanted, steps):
    """Smallest u32 below 16**steps (for 4 bits) at which `wanted` entries have flags_at(threshold, *tile)."""
    bits = self.config.step_bits
    digits = 2**bits - 1

    def body(step, low):
      shift = ((steps - 1 - step) * bits).astype(jnp.uint32)
      tried = [low + (jnp.uint32(digit + 1) << shift) - jnp.uint32(1) for digit in range(digits)]
      found = self.counts(lambda *tile: [flags_at(t, *tile) for t in tried], digits)
      return low + (sum((count < wanted).astype(jnp.uint32) for count in found) << shift)

    return lax.fori_loop(0, steps, body, jnp.uint32(0))


def _kernel(keys_ref, positions_ref, tables_ref, lengths_ref, wanted_ref, marks_ref, *, kvs, block_size, config):
  row = pl.program_id(0)
  wanted = wanted_ref[row]
  length = jnp.where(wanted > 0, lengths_ref[row], 0)  # nothing to read for a head that loses nothing
  head = _Head(keys_ref=keys_ref, positions_ref=positions_ref, tables_ref=tables_ref, row=row, length=length,
               kvs=kvs, block_size=block_size, config=config)
  threshold = head.smallest(lambda t, _, held, keys: held & (keys <= t), wanted, jnp.int32(32 // config.step_bits))
  lower, equal = head.counts(lambda _, held, keys: [held & (keys < threshold), held & (keys == threshold)], 2)
  needed = wanted - lower
  split = needed < equal
  # Without a split all equals are marked and the search has nothing to read.
  last = _last_position(dataclasses.replace(head, length=jnp.where(split, length, 0)), threshold, needed)
  tile = config.tile

  def write(i, carry):
    index, held, keys = head.load(i * tile, tile)
    tied = held & (keys == threshold)
    marked = held & (keys < threshold) | tied & (head.positions(index, tied & split) <= last)
    plt.store(marks_ref.at[row * kvs + index], marked.astype(jnp.int8), mask=index < kvs)
    return carry

  lax.fori_loop(0, pl.cdiv(kvs, tile), write, None)


def _last_position(head, threshold, needed):
  """Position up to which the equals of `threshold` are marked."""
  config = head.config

  def tied(held, keys):
    return held & (keys == threshold)

  newest, = head.reduce(
      lambda index, held, keys: (head.positions(index, tied(held, keys)),),
      (jnp.zeros((config.tile,), jnp.uint32),), lambda top, parts: functools.reduce(jnp.maximum, parts, top))
  newest = jnp.max(newest)
  # As many steps as the newest of them has digits.
  steps = jnp.int32(1)
  for shift in range(config.step_bits, 32, config.step_bits):
    steps += (newest >= jnp.uint32(1 << shift)).astype(jnp.int32)
  return head.smallest(
      lambda t, index, held, keys: tied(held, keys) & (head.positions(index, tied(held, keys)) <= t), needed, steps)
