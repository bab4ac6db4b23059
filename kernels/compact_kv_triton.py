"""Pallas-Triton version of `compact_kv`, for Ampere GPUs and newer.

Three kernels. The first counts the holes and the survivors to move in each chunk
of each head's list; the running sum of these counts over all chunks is where a
chunk's moves stand in the lists, and since a head has as many holes as survivors
to move, the two lists agree head by head. The second writes the lists; the third
shares the moves evenly among its CTAs, however they are spread over heads.
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
  """How the kernels are laid out.

  Attributes:
    chunk: list entries of one CTA of the first two kernels, a power of two.
    tile: KVs moved per step, a power of two.
    num_warps: of the kernel that moves.
    ctas: of the kernel that moves.
  """

  chunk: int = 1024
  tile: int = 16
  num_warps: int = 4
  ctas: int


def default_config() -> Config:
  """What the figures in docs/performance.md were taken with; not swept."""
  return Config(ctas=8 * backends.num_cores())


def compact_kv(
    kv: jax.Array,
    scores: jax.Array,
    positions: jax.Array,
    evicted: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    kept: jax.Array,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `compact_kv.compact_kv`; `interpret` runs on the CPU, for tests."""
  config = config or default_config()
  sources, targets, count = _list_moves(evicted, tables, lengths, kept, kv.shape[2], config, interpret)
  return _move(kv, scores, positions, sources, targets, count, config, interpret)


def _list_moves(evicted, tables, lengths, kept, block_size, config, interpret):
  """Sources and targets, i32 KV slots block * P + offset, and their count, i32 [1]."""
  heads, kvs = evicted.shape
  chunks = pl.cdiv(kvs, config.chunk)
  lists = evicted.size // 2 + config.chunk
  call = functools.partial(
      pl.pallas_call, grid=(heads, chunks), interpret=interpret,
      compiler_params=plt.CompilerParams(num_warps=4, num_stages=1))
  walk = (evicted.astype(jnp.int8).reshape(-1), lengths, kept)
  shape = {"kvs": kvs, "size": config.chunk, "chunks": chunks}
  counts = call(
      functools.partial(_count_kernel, **shape), name="compact_kv_count",
      out_shape=jax.ShapeDtypeStruct((2, heads * chunks), jnp.int32))(*walk)
  ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
  sources, targets = call(
      functools.partial(_list_kernel, **shape, block_size=block_size), name="compact_kv_list",
      out_shape=[jax.ShapeDtypeStruct((lists,), jnp.int32)] * 2,
  )(*walk, ends - counts, tables.reshape(-1))
  return sources, targets, ends[0, -1:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
  """The list entries of one CTA of the first two kernels, [chunk] of one head.

  Attributes:
    number: of all heads' chunks.
    row: the head.
    first: index of its first entry.
    length, kept: of the head.
    size: static.
  """

  number: Any
  row: Any
  first: Any
  length: Any
  kept: Any
  size: int

  @classmethod
  def of(cls, lengths_ref, kept_ref, size, chunks) -> "_Chunk":
    row, column = pl.program_id(0), pl.program_id(1)
    return cls(number=row * chunks + column, row=row, first=column * size, length=lengths_ref[row],
               kept=kept_ref[row], size=size)

  @property
  def has_work(self):
    """Whether a head that loses KVs holds any of the entries."""
    return (self.first < self.length) & (self.kept < self.length)

  def marks(self, evicted_ref, kvs):
    """Indices of the entries, which are survivors to move, and which are holes."""
    index = self.first + jnp.arange(self.size, dtype=jnp.int32)
    held = index < self.length
    evicted = plt.load(evicted_ref.at[self.row * kvs + index], mask=held, other=0) != 0
    return index, held & ~evicted & (index >= self.kept), evicted & (index < self.kept)


def _count_kernel(evicted_ref, lengths_ref, kept_ref, counts_ref, *, kvs, size, chunks):
  chunk = _Chunk.of(lengths_ref, kept_ref, size, chunks)

  @pl.when(chunk.has_work)
  def _():
    _, mover, hole = chunk.marks(evicted_ref, kvs)
    counts_ref[0, chunk.number] = jnp.sum(mover.astype(jnp.int32))
    counts_ref[1, chunk.number] = jnp.sum(hole.astype(jnp.int32))

  @pl.when(~chunk.has_work)
  def _():
    counts_ref[0, chunk.number] = jnp.int32(0)
    counts_ref[1, chunk.number] = jnp.int32(0)


def _list_kernel(evicted_ref, lengths_ref, kept_ref, starts_ref, tables_ref, sources_ref, targets_ref,
                 *, kvs, size, chunks, block_size):
  chunk = _Chunk.of(lengths_ref, kept_ref, size, chunks)

  @pl.when(chunk.has_work)
  def _():
    index, mover, hole = chunk.marks(evicted_ref, kvs)
    column = lax.div(index, jnp.int32(block_size))
    blocks = plt.load(tables_ref.at[chunk.row * (kvs // block_size) + column], mask=mover | hole, other=0)
    slots = blocks * block_size + lax.rem(index, jnp.int32(block_size))
    _append(sources_ref, starts_ref[0, chunk.number], slots, mover)
    _append(targets_ref, starts_ref[1, chunk.number], slots, hole)


def _append(list_ref, start, slots, chosen):
  """Writes the chosen slots from `start` on."""
  flags = chosen.astype(jnp.int32)
  before = jnp.cumsum(flags) - flags
  # The others get places of their own behind them, for a masked store is a scatter when interpreted.
  behind = jnp.sum(flags) + jnp.arange(slots.shape[0], dtype=jnp.int32) - before
  plt.store(list_ref.at[start + jnp.where(chosen, before, behind)], slots, mask=chosen)


def _move(kv, scores, positions, sources, targets, count, config, interpret):
  pools = _rows(kv), scores.reshape(-1), positions.reshape(-1)
  rows, *rest = pl.pallas_call(
      functools.partial(_move_kernel, block_size=kv.shape[2], config=config),
      out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
      grid=(config.ctas,), interpret=interpret, name="compact_kv_move", input_output_aliases={3: 0, 4: 1, 5: 2},
      compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=2),
  )(sources, targets, count, *pools)
  scores, positions = (pool.reshape(scores.shape) for pool in rest)
  return lax.bitcast_convert_type(rows, kv.dtype).reshape(kv.shape), scores, positions


def _rows(kv):
  """The pool as rows [N*2*P, D]; of a dtype of one byte as 16-bit words [N*2*P, D/2].

  Words, because Pallas counts elements in 32 signed bits up to 4 GiB.
  """
  head_dim = kv.shape[-1]
  if kv.dtype.itemsize > 1:
    return kv.reshape(-1, head_dim)
  return lax.bitcast_convert_type(kv.reshape(-1, head_dim // 2, 2), jnp.int16)


def _move_kernel(sources_ref, targets_ref, count_ref, _kv, _scores, _positions, kv_ref, scores_ref, positions_ref,
                 *, block_size, config):
  """One CTA: its share of the moves. The pools come in aliased with the outputs."""
  tile, width = config.tile, kv_ref.shape[1]
  count = count_ref[0]
  share = lax.div(count + (config.ctas * tile - 1), jnp.int32(config.ctas * tile)) * tile
  first = pl.program_id(0) * share
  stop = jnp.minimum(first + share, count)
  cols = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)

  def rows_of(slots):
    """The pool's row of each slot's key; the value is P rows further on."""
    return lax.div(slots, jnp.int32(block_size)) * (2 * block_size) + lax.rem(slots, jnp.int32(block_size))

  def body(step, carry):
    move = first + step * tile + jnp.arange(tile, dtype=jnp.int32)
    real = move < stop
    source = plt.load(sources_ref.at[move], mask=real, other=0)
    target = plt.load(targets_ref.at[move], mask=real, other=0)
    mask = jnp.broadcast_to(real[:, None] & (cols < width)[None, :], (tile, cols.size))
    moves = [
        (kv_ref, *((rows_of(slots)[:, None] + half, cols[None, :]) for slots in (source, target)), mask)
        for half in (0, block_size)]
    moves += [(ref, (source,), (target,), real) for ref in (scores_ref, positions_ref)]
    found = [plt.load(ref.at[source], mask=mask, other=0) for ref, source, _, mask in moves]
    for (ref, _, target, mask), rows in zip(moves, found, strict=True):
      plt.store(ref.at[target], rows, mask=mask)
    return carry

  lax.fori_loop(0, lax.div(stop - first + (tile - 1), jnp.int32(tile)), body, None)
