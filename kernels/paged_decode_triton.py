"""Pallas-Triton version of `paged_decode`, for Ampere GPUs and newer.

Two kernels. The first streams each KV once: CTAs take equal shares of all tiles
(stream_k), and leave unnormalised outputs with their running maxima and sums. The
second merges these per (sequence, KV head).

Scores need each KV's final probability, which is known only after the first
kernel. It therefore also writes exp2(logit - running maximum), the very number it
multiplies V with, in bfloat16, and each tile's running maximum; the second kernel
rescales. Beside K and V that is 2 G bytes per KV instead of a second pass over K
(float32 pools keep float32 weights).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvc_jax.kernels import backends, stream_k

_LOG2E = math.log2(math.e)
_MMA_ROWS = 16
"""Query heads of a group are padded to the tensor core's rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels are laid out.

  Attributes:
    tile: KVs per step, a power of two.
    num_warps: of the first kernel.
    num_stages: Triton's; loads behind the table's load keep (num_stages - 1) // 2 tiles in flight.
    waves: CTAs of the first kernel and their part of the work; see stream_k.schedule.
    score_span: KVs per step of the score update, a multiple of `tile`.
    score_ctas: CTAs of the score update.
  """

  tile: int
  num_warps: int = 4
  num_stages: int
  waves: tuple[tuple[int, float], ...]
  score_span: int = 256
  score_ctas: int

  @property
  def ctas(self) -> int:
    return sum(ctas for ctas, _ in self.waves)


def default_config(kv: jax.ShapeDtypeStruct | jax.Array) -> Config:
  """The measured choice for a pool [N, 2, P, D]: about 64 KiB in flight per CTA."""
  row_bytes = kv.shape[-1] * kv.dtype.itemsize
  cores = backends.num_cores()
  tile = max(16, min(64, 16384 // row_bytes))
  return Config(tile=tile, num_stages=5, waves=((3 * cores, 1.0),), score_span=4 * tile, score_ctas=8 * cores)


def paged_decode(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    scores: jax.Array | None = None,
    positions: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    *,
    scale: float,
    power: int = 2,
    buffer: int = 0,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """See `paged_decode.paged_decode`; `interpret` runs on the CPU, for tests."""
  config = config or default_config(kv)
  plan = _Plan.of(q, kv, tables, config, scale, power, buffer)
  packed = stream_k.schedule(lengths, tile=config.tile, waves=config.waves)
  walk = (layer.reshape(1), tables.reshape(-1), lengths.reshape(-1), packed)
  partials = _attend(plan, q, kv, walk, with_weights=scores is not None, interpret=interpret)
  if scores is None:
    return _merge(plan, partials, walk, q, interpret=interpret), None
  score_plan = stream_k.schedule(lengths, tile=config.tile, waves=((config.score_ctas, 1.0),))
  seen = (positions.reshape(-1), query_positions) if buffer else ()
  return _merge_and_score(plan, partials, (*walk, score_plan), q, scores, seen, interpret=interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """Static numbers that both kernels share; letters as in docs/architecture.md."""

  pairs: int
  group: int
  heads: int
  head_dim: int
  block_size: int
  max_blocks: int
  max_tiles: int
  scale: float
  power: int
  buffer: int
  config: Config

  @classmethod
  def of(cls, q, kv, tables, config, scale, power, buffer) -> "_Plan":
    _, seqs, heads, max_blocks = tables.shape
    num_blocks, _, block_size, head_dim = kv.shape
    # The KVs of one layer fit in the pool and in the layer's tables; each pair rounds up to a tile.
    most = min(seqs * heads * max_blocks, num_blocks) * block_size
    return cls(
        pairs=seqs * heads, group=q.shape[1] // heads, heads=heads, head_dim=head_dim, block_size=block_size,
        max_blocks=max_blocks, max_tiles=-(-most // config.tile) + seqs * heads, scale=scale, power=power,
        buffer=buffer, config=config)

  @property
  def padded_dim(self) -> int:
    return pl.next_power_of_2(self.head_dim)

  @property
  def padded_group(self) -> int:
    return pl.next_power_of_2(self.group)

  @property
  def slots(self) -> int:
    return self.config.ctas + self.pairs

  def row(self, ref, layer, ctas) -> stream_k.Row:
    return stream_k.Row(ref, layer, self.pairs, ctas)


def _columns(plan):
  """Indices of the head dimension [padded D], and which are real (None: all)."""
  cols = jnp.arange(plan.padded_dim, dtype=jnp.int32)
  return cols, None if plan.padded_dim == plan.head_dim else cols < plan.head_dim


def _both(rows, cols):
  """Mask [R, C] of a row mask and a column mask, either of which may be None."""
  if cols is None:
    return rows[:, None]
  return rows[:, None] & cols[None, :]


def _blocks_of(plan, tables_ref, row, token, held):
  """Block ids of the tokens of one table row."""
  column = lax.div(token, jnp.int32(plan.block_size))
  return plt.load(tables_ref.at[row * plan.max_blocks + column], mask=held, other=0)


# --------------------------------------------------------------------------- first kernel


def _attend(plan, q, kv, walk, *, with_weights, interpret):
  """Partial outputs f32 [slots*G, D], maxima and sums f32 [slots*G]; then weights and their maxima."""
  group, config = plan.group, plan.config
  rows = plan.slots * group + _MMA_ROWS  # padding rows of a group are written behind the end
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, plan.head_dim), (rows,), (rows,))]
  if with_weights:
    tile_rows = plan.max_tiles * group + _MMA_ROWS
    # bfloat16 keeps the relative precision of small ones, which float16 would lose.
    dtype = jnp.float32 if kv.dtype == jnp.float32 else jnp.bfloat16
    shapes.append(jax.ShapeDtypeStruct((tile_rows * config.tile,), dtype))
    shapes.append(jax.ShapeDtypeStruct((tile_rows,), jnp.float32))
  return pl.pallas_call(
      functools.partial(_attend_kernel, plan=plan), out_shape=shapes, grid=(config.ctas,), interpret=interpret,
      name="paged_decode_attend",
      compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
  )(q.reshape(-1, plan.head_dim), kv.reshape(-1, plan.head_dim), *walk)


def _attend_kernel(q_ref, kv_ref, layer_ref, tables_ref, lengths_ref, plan_ref,
                   out_ref, top_ref, sum_ref, *weight_refs, plan):
  """One CTA: its share of tiles, pair by pair."""
  group, tile = plan.group, plan.config.tile
  cta = pl.program_id(0)
  layer = layer_ref[0]
  row = plan.row(plan_ref, layer, plan.config.ctas)
  first, stop, low, high = row.cta(cta)
  head = jnp.arange(_MMA_ROWS, dtype=jnp.int32)
  real = head < group
  cols, real_cols = _columns(plan)
  precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

  def pair_body(pair, carry):
    start = row.start(pair)
    table_row = layer * plan.pairs + pair
    length = lengths_ref[table_row]
    q_rows = pair * group + jnp.where(real, head, 0)
    q = plt.load(q_ref.at[q_rows[:, None], cols[None, :]],
                 mask=jnp.broadcast_to(_both(real, real_cols), (_MMA_ROWS, plan.padded_dim)), other=0.0)

    def load(rows, held):
      mask = jnp.broadcast_to(_both(held, real_cols), (tile, plan.padded_dim))
      # What lies behind a head's end may be anything, NaN too, and 0 * NaN is NaN.
      return plt.load(kv_ref.at[rows[:, None], cols[None, :]], mask=mask, other=0.0).astype(q.dtype)

    def tile_body(step, carry):
      acc, top, total = carry
      token = step * tile + jnp.arange(tile, dtype=jnp.int32)
      held = token < length
      blocks = _blocks_of(plan, tables_ref, table_row, token, held)
      rows = blocks * (2 * plan.block_size) + lax.rem(token, jnp.int32(plan.block_size))
      logits = plt.dot(q, load(rows, held), trans_b=True, precision=precision) * (plan.scale * _LOG2E)
      logits = jnp.where(held[None, :], logits, -jnp.inf)  # [16, tile]
      new_top = jnp.maximum(top, jnp.max(logits, axis=1))
      decay = jnp.exp2(top - new_top)
      weights = jnp.exp2(logits - new_top[:, None])
      if weight_refs:
        _store_weights(plan, *weight_refs, start + step, weights, new_top)
      values = load(rows + plan.block_size, held)
      gain = plt.dot(weights.astype(values.dtype), values, precision=precision)
      return acc * decay[:, None] + gain, new_top, total * decay + jnp.sum(weights, axis=1)

    begin, end = jnp.maximum(low - start, 0), jnp.minimum(high, row.start(pair + 1)) - start
    acc, top, total = lax.fori_loop(begin, end, tile_body, (
        jnp.zeros((_MMA_ROWS, plan.padded_dim), jnp.float32),
        jnp.full((_MMA_ROWS,), -jnp.inf, jnp.float32), jnp.zeros((_MMA_ROWS,), jnp.float32)))
    slot = jnp.where(real, (cta + pair) * group, plan.slots * group) + head
    plt.store(out_ref.at[slot[:, None], cols[None, :]], acc,
              mask=jnp.broadcast_to(_both(real, real_cols), acc.shape))
    plt.store(top_ref.at[slot], top, mask=real)
    plt.store(sum_ref.at[slot], total, mask=real)
    return carry

  lax.fori_loop(first, stop, pair_body, None)


def _store_weights(plan, weights_ref, top_ref, tile_index, weights, top):
  """Writes a tile's weights [16, tile] and the maxima they are relative to."""
  tile = plan.config.tile
  head = jnp.arange(_MMA_ROWS, dtype=jnp.int32)
  real = head < plan.group
  row = jnp.where(real, tile_index * plan.group, plan.max_tiles * plan.group) + head
  at = row[:, None] * tile + jnp.arange(tile, dtype=jnp.int32)[None, :]
  plt.store(weights_ref.at[at], weights.astype(weights_ref.dtype), mask=jnp.broadcast_to(real[:, None], at.shape))
  plt.store(top_ref.at[row], top, mask=real)


# -------------------------------------------------------------------------- second kernel


def _merge(plan, partials, walk, q, *, interpret):
  """Output [S, H*G, D] from the partial ones."""
  layer, _, _, packed = walk
  rows = plan.pairs * plan.group
  out = pl.pallas_call(
      functools.partial(_merge_kernel, plan=plan),
      out_shape=jax.ShapeDtypeStruct((rows + plan.padded_group - plan.group, plan.head_dim), q.dtype),
      grid=(plan.pairs,), interpret=interpret, name="paged_decode_merge",
      compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
  )(*partials, layer, packed)
  return out[:rows].reshape(q.shape)


def _merge_kernel(out_ref, top_ref, sum_ref, layer_ref, plan_ref, merged_ref, *, plan):
  pair = pl.program_id(0)
  row = plan.row(plan_ref, layer_ref[0], plan.config.ctas)
  _merge_pair(plan, row, pair, out_ref, top_ref, sum_ref, merged_ref)


def _merge_pair(plan, row, pair, out_ref, top_ref, sum_ref, merged_ref):
  """Merges one pair's partial outputs, several at a time."""
  group, padded = plan.group, plan.padded_group
  at_once = max(1, min(8, 4096 // (padded * plan.padded_dim)))
  first, stop = row.ctas_of(pair)
  cols, real_cols = _columns(plan)
  head = jnp.arange(padded, dtype=jnp.int32)

  def body(step, carry):
    acc, top, total = carry
    rows, tops, sums = _partials(plan, pair, first + step * at_once, stop, at_once, top_ref, sum_ref)
    new_top = jnp.maximum(top, jnp.max(tops, axis=0))
    weights = jnp.exp2(tops - new_top[None])  # [slots, G]
    live = weights[..., None] > 0
    mask = live if real_cols is None else live & real_cols[None, None]
    parts = plt.load(out_ref.at[rows[..., None], cols[None, None]],
                     mask=jnp.broadcast_to(mask, (*rows.shape, plan.padded_dim)), other=0.0)
    decay = jnp.exp2(top - new_top)
    acc = acc * decay[:, None] + jnp.sum(parts * weights[..., None], axis=0)
    return acc, new_top, total * decay + jnp.sum(sums * weights, axis=0)

  steps = lax.div(stop - first + (at_once - 1), jnp.int32(at_once))
  acc, _, total = lax.fori_loop(0, steps, body, (
      jnp.zeros((padded, plan.padded_dim), jnp.float32),
      jnp.full((padded,), -jnp.inf, jnp.float32), jnp.zeros((padded,), jnp.float32)))
  out = acc / jnp.where(total > 0, total, 1.0)[:, None]
  # Rows of a padded group are written behind the end.
  rows = jnp.where(head < group, pair * group, plan.pairs * group - group) + head
  mask = _both(head < group, real_cols)
  plt.store(merged_ref.at[rows[:, None], cols[None, :]], out.astype(merged_ref.dtype),
            mask=jnp.broadcast_to(mask, out.shape))


def _partials(plan, pair, first, stop, count, top_ref, sum_ref):
  """Rows [count, G] of a pair's partial outputs from CTA `first` on, their maxima and sums."""
  head = jnp.arange(plan.padded_group, dtype=jnp.int32)
  cta = first + jnp.arange(count, dtype=jnp.int32)
  live = (cta < stop)[:, None] & (head < plan.group)[None, :]
  rows = jnp.where(live, (cta[:, None] + pair) * plan.group + head[None, :], 0)
  return rows, plt.load(top_ref.at[rows], mask=live, other=-jnp.inf), plt.load(sum_ref.at[rows], mask=live, other=0.0)


def _merge_and_score(plan, partials, walk, q, scores, seen, *, interpret):
  """Output [S, H*G, D], and the scores updated in place."""
  layer, tables, lengths, packed, score_plan = walk
  rows = plan.pairs * plan.group
  config = plan.config
  inputs = (*partials, layer, tables, lengths, packed, score_plan, *seen, scores.reshape(-1))
  out, new_scores = pl.pallas_call(
      functools.partial(_merge_and_score_kernel, plan=plan),
      out_shape=[
          jax.ShapeDtypeStruct((rows + plan.padded_group - plan.group, plan.head_dim), q.dtype),
          jax.ShapeDtypeStruct((scores.size,), jnp.float32)],
      grid=(config.score_ctas + plan.pairs,), interpret=interpret, name="paged_decode_merge_score",
      input_output_aliases={len(inputs) - 1: 1},
      compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
  )(*inputs)
  return out[:rows].reshape(q.shape), new_scores.reshape(scores.shape)


def _merge_and_score_kernel(out_ref, top_ref, sum_ref, weights_ref, tile_top_ref, layer_ref, tables_ref,
                            lengths_ref, plan_ref, score_plan_ref, *rest, plan):
  *seen_refs, _, merged_ref, scores_ref = rest  # scores come in aliased with scores_ref
  program = pl.program_id(0)
  layer = layer_ref[0]
  row = plan.row(plan_ref, layer, plan.config.ctas)

  @pl.when(program < plan.config.score_ctas)
  def _():
    score_row = plan.row(score_plan_ref, layer, plan.config.score_ctas)
    first, stop, low, high = score_row.cta(program)

    def pair_body(pair, carry):
      start = row.start(pair)
      begin, end = jnp.maximum(low - start, 0), jnp.minimum(high, row.start(pair + 1)) - start
      pl.when(end > begin)(lambda: _score_pair(
          plan, row, pair, layer * plan.pairs + pair, begin, end, top_ref, sum_ref, weights_ref, tile_top_ref,
          tables_ref, lengths_ref, seen_refs, scores_ref))
      return carry

    lax.fori_loop(first, stop, pair_body, None)

  @pl.when(program >= plan.config.score_ctas)
  def _():
    _merge_pair(plan, row, program - plan.config.score_ctas, out_ref, top_ref, sum_ref, merged_ref)


def _score_pair(plan, row, pair, table_row, begin, end, top_ref, sum_ref, weights_ref, tile_top_ref,
                tables_ref, lengths_ref, seen_refs, scores_ref):
  """Adds the probabilities of tiles [begin, end) of one pair to the scores."""
  tile, span, group = plan.config.tile, plan.config.score_span, plan.group
  start = row.start(pair)
  length = jnp.minimum(lengths_ref[table_row], end * tile)
  log_sum = _log_sum(plan, row, pair, top_ref, sum_ref)[:, None]  # [G, 1], base 2
  head = jnp.arange(plan.padded_group, dtype=jnp.int32)[:, None]

  def body(step, carry):
    token = begin * tile + step * span + jnp.arange(span, dtype=jnp.int32)
    held = token < length
    row_of = (start + lax.div(token, jnp.int32(tile)))[None, :] * group + head
    mask = held[None, :] & (head < group)
    row_of = jnp.where(mask, row_of, 0)
    weights = plt.load(weights_ref.at[row_of * tile + lax.rem(token, jnp.int32(tile))[None, :]], mask=mask, other=0.0)
    tile_top = plt.load(tile_top_ref.at[row_of], mask=mask, other=-jnp.inf)
    chances = weights.astype(jnp.float32) * jnp.exp2(tile_top - log_sum)
    gain = jnp.sum(chances * chances if plan.power == 2 else chances, axis=0)
    blocks = _blocks_of(plan, tables_ref, table_row, token, held)
    at = blocks * plan.block_size + lax.rem(token, jnp.int32(plan.block_size))
    counted = held
    if seen_refs:
      positions_ref, query_positions_ref = seen_refs
      newest = query_positions_ref[lax.div(pair, jnp.int32(plan.heads))] - plan.buffer
      counted = held & (plt.load(positions_ref.at[at], mask=held, other=0) <= newest)
    at = jnp.where(counted, at, jnp.arange(span, dtype=jnp.int32) % plan.block_size)
    plt.store(scores_ref.at[at], plt.load(scores_ref.at[at], mask=counted, other=0.0) + gain, mask=counted)
    return carry

  lax.fori_loop(0, lax.div(end * tile - begin * tile + (span - 1), jnp.int32(span)), body, None)


def _log_sum(plan, row, pair, top_ref, sum_ref):
  """Base-2 log-sum-exp [padded G] of one pair that holds something."""
  at_once = 8
  first, stop = row.ctas_of(pair)

  def body(step, carry):
    top, total = carry
    _, tops, sums = _partials(plan, pair, first + step * at_once, stop, at_once, top_ref, sum_ref)
    new_top = jnp.maximum(top, jnp.max(tops, axis=0))
    safe = jnp.where(new_top > -jnp.inf, new_top, 0.0)  # rows of a padded group see nothing
    return new_top, total * jnp.exp2(top - safe) + jnp.sum(sums * jnp.exp2(tops - safe[None]), axis=0)

  steps = lax.div(stop - first + (at_once - 1), jnp.int32(at_once))
  top, total = lax.fori_loop(0, steps, body, (
      jnp.full((plan.padded_group,), -jnp.inf, jnp.float32), jnp.zeros((plan.padded_group,), jnp.float32)))
  return jnp.where(total > 0, top + jnp.log2(jnp.where(total > 0, total, 1.0)), 0.0)
