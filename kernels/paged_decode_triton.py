"""Pallas-Triton version of `paged_decode`, for Ampere GPUs and newer.

Two kernels. The first streams each KV once: CTAs take equal shares of all tiles
(stream_k), and leave unnormalised outputs with their running maxima and sums. The
second merges these per (sequence, KV head).

Scores are those of the observed queries, whose log-sum-exp is known: their
probabilities are final as soon as a tile's logits are, so each KV's score is
updated while its key is at hand. Tensor cores multiply 16 rows at a time anyway;
the observed queries take rows that would be padding.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvc_jax.kernels import backends, stream_k
from kvc_jax.kernels.observed import Observed

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
  """

  tile: int
  num_warps: int = 4
  num_stages: int
  waves: tuple[tuple[int, float], ...]

  @property
  def ctas(self) -> int:
    return sum(ctas for ctas, _ in self.waves)


def default_config(kv: jax.ShapeDtypeStruct | jax.Array, pairs: int) -> Config:
  """What measured best on an H200 for a pool [N, 2, P, D] and S*H pairs (docs/performance.md)."""
  _, _, _, head_dim = kv.shape
  row_bytes = head_dim * kv.dtype.itemsize
  cores = backends.num_cores()
  tile = max(16, min(128 if kv.dtype.itemsize == 1 else 64, 16384 // row_bytes))
  # Few pairs make short shares: fewer CTAs then leave fewer partial results.
  stages, per_core = (3, 4) if pairs >= 2 * cores else (5, 2)
  return Config(tile=tile, num_stages=stages, waves=((per_core * cores, 1.0),))


def paged_decode(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    observed: Observed | None = None,
    *,
    scale: float,
    power: int = 2,
    buffer: int = 0,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Observed | None]:
  """See `paged_decode.paged_decode`; `interpret` runs on the CPU, for tests."""
  _, seqs, heads, _ = tables.shape
  config = config or default_config(kv, seqs * heads)
  plan = _Plan.of(q, kv, tables, config, observed, scale, power, buffer)
  packed = stream_k.schedule(lengths, tile=config.tile, waves=config.waves)
  walk = (layer.reshape(1), tables.reshape(-1), lengths.reshape(-1), packed)
  partials, observed = _attend(plan, q, kv, walk, observed, interpret=interpret)
  return _merge(plan, partials, walk, q, observed, interpret=interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """Static numbers that both kernels share; letters as in docs/architecture.md."""

  pairs: int
  group: int
  heads: int
  head_dim: int
  block_size: int
  max_blocks: int
  packed: bool
  observes: bool
  out_dtype: Any
  scale: float
  power: int
  buffer: int
  config: Config

  @classmethod
  def of(cls, q, kv, tables, config, observed, scale, power, buffer) -> "_Plan":
    _, seqs, heads, max_blocks = tables.shape
    _, _, block_size, head_dim = kv.shape
    return cls(
        pairs=seqs * heads, group=q.shape[1] // heads, heads=heads, head_dim=head_dim, block_size=block_size,
        max_blocks=max_blocks, packed=kv.dtype.itemsize == 1, observes=observed is not None, out_dtype=q.dtype,
        scale=scale, power=power, buffer=buffer, config=config)

  @property
  def padded_dim(self) -> int:
    return pl.next_power_of_2(self.head_dim)

  @property
  def dot_dtype(self) -> Any:
    """Of the products: float16 holds every e4m3 number exactly."""
    return jnp.float16 if self.packed else self.out_dtype

  @property
  def padded_group(self) -> int:
    return pl.next_power_of_2(self.group)

  @property
  def rows(self) -> int:
    """Query rows of a tile: the group, then the observed group, padded for the tensor core."""
    return _MMA_ROWS * -(-self.group * (2 if self.observes else 1) // _MMA_ROWS)

  @property
  def slots(self) -> int:
    return self.config.ctas + self.pairs

  @property
  def dim_parts(self) -> int:
    """1, or 2 where words of two e4m3 numbers are read: the even and the odd dimensions."""
    return 2 if self.packed else 1

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
  """Block ids of the tokens of one table row, and their places in the blocks."""
  # Signed division by a power of two would cost four instructions instead of one.
  column = lax.shift_right_logical(token, jnp.int32(plan.block_size.bit_length() - 1))
  blocks = plt.load(tables_ref.at[row * plan.max_blocks + column], mask=held, other=0)
  return blocks, token & (plan.block_size - 1)


# --------------------------------------------------------------------------- first kernel


def _attend(plan, q, kv, walk, observed, *, interpret):
  """Partial outputs f32 [slots*G, D], maxima and sums f32 [slots*G]; and `observed`, scores updated."""
  config = plan.config
  rows = plan.slots * plan.group + plan.rows  # the last group's padding rows lie within bounds, though masked
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, plan.head_dim), (rows,), (rows,))]
  inputs, aliases = [q.reshape(-1, plan.head_dim), _rows(kv), *walk], {}
  if observed is not None:
    inputs += [observed.queries.reshape(-1, plan.head_dim), observed.log_sums.reshape(-1), observed.query_positions,
               observed.positions.reshape(-1), observed.scores.reshape(-1)]
    aliases = {len(inputs) - 1: len(shapes)}
    shapes.append(jax.ShapeDtypeStruct((observed.scores.size,), jnp.float32))
  *partials, = pl.pallas_call(
      functools.partial(_attend_kernel, plan=plan), out_shape=shapes, grid=(config.ctas,), interpret=interpret,
      input_output_aliases=aliases, name="paged_decode_attend",
      compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
  )(*inputs)
  if observed is not None:
    observed = observed._replace(scores=partials.pop().reshape(observed.scores.shape))
  return partials, observed


def _rows(kv):
  """The pool as rows [N*2*P, D], keys and values in turn; e4m3 as int16 words [N*2*P, D/2].

  Words, because Pallas counts elements in 32 signed bits up to 4 GiB, and because
  Ampere has no e4m3.
  """
  if kv.dtype != jnp.float8_e4m3fn:
    return kv.reshape(-1, kv.shape[-1])
  return lax.bitcast_convert_type(kv.reshape(-1, kv.shape[-1] // 2, 2), jnp.int16)


_E4M3_FACTOR = 256.0


def _unpack(words):
  """The two e4m3 numbers of each int16 word as float16, divided by _E4M3_FACTOR.

  e4m3's four exponent bits, with a bias of 7, go to the low four of float16's five,
  with a bias of 15: hence 2 ** 8. Subnormal numbers come out right too.
  """

  def high_byte(word):
    bits = (word & jnp.int16(-0x8000)) | lax.shift_right_logical(word & jnp.int16(0x7F00), jnp.int16(1))
    return lax.bitcast_convert_type(bits, jnp.float16)

  return high_byte(lax.shift_left(words, jnp.int16(8))), high_byte(words)


def _attend_kernel(q_ref, kv_ref, layer_ref, tables_ref, lengths_ref, plan_ref, *refs, plan):
  """One CTA: its share of tiles, pair by pair."""
  *observed_refs, out_ref, top_ref, sum_ref = refs[:-1] if plan.observes else refs
  scores_ref = refs[-1] if plan.observes else None
  group, tile, parts = plan.group, plan.config.tile, plan.dim_parts
  cta = pl.program_id(0)
  layer = layer_ref[0]
  row = plan.row(plan_ref, layer, plan.config.ctas)
  first, stop, low, high = row.cta(cta)
  head = jnp.arange(plan.rows, dtype=jnp.int32)
  real = head < group
  width = pl.next_power_of_2(plan.head_dim // parts)
  cols = jnp.arange(width, dtype=jnp.int32)
  real_cols = None if width * parts == plan.head_dim else cols < plan.head_dim // parts
  precision = lax.Precision.HIGHEST if plan.dot_dtype == jnp.float32 else None
  unit = _E4M3_FACTOR if plan.packed else 1.0

  def load_queries(ref, first_row, rows, part):
    at = jnp.where(rows, first_row + head, 0)
    mask = jnp.broadcast_to(_both(rows, real_cols), (plan.rows, width))
    return plt.load(ref.at[at[:, None], cols[None, :] * parts + part], mask=mask, other=0.0)

  def pair_body(pair, carry):
    start = row.start(pair)
    table_row = layer * plan.pairs + pair
    length = lengths_ref[table_row]
    queries = [load_queries(q_ref, pair * group, real, part) for part in range(parts)]
    top0 = jnp.where(real, -jnp.inf, 0.0)
    if plan.observes:
      behind = _Behind.of(plan, observed_refs, scores_ref, head, pair, table_row, length)
      queries = [q + load_queries(observed_refs[0], (table_row - 1) * group, behind.rows, part)
                 for part, q in enumerate(queries)]
      top0 = jnp.where(real, -jnp.inf, behind.log_sums)
    queries = [q.astype(plan.dot_dtype) for q in queries]

    def load(rows, held):
      mask = jnp.broadcast_to(_both(held, real_cols), (tile, width))
      # What lies behind a head's end may be anything, NaN too, and 0 * NaN is NaN.
      loaded = plt.load(kv_ref.at[rows[:, None], cols[None, :]], mask=mask, other=0)
      return _unpack(loaded) if plan.packed else (loaded.astype(plan.dot_dtype),)

    def tile_body(step, carry):
      accs, top, total = carry
      token = step * tile + jnp.arange(tile, dtype=jnp.int32)
      held = token < length
      blocks, place = _blocks_of(plan, tables_ref, table_row, token, held)
      if plan.observes:
        update = behind.start(blocks * plan.block_size + place, token)
      rows = blocks * (2 * plan.block_size) + place
      logits = sum(plt.dot(q, k, trans_b=True, precision=precision)
                   for q, k in zip(queries, load(rows, held), strict=True)) * (plan.scale * unit * _LOG2E)
      logits = jnp.where(held[None, :], logits, -jnp.inf)  # [rows, tile]
      new_top = jnp.maximum(top, jnp.max(logits, axis=1))
      if plan.observes:
        new_top = jnp.where(real, new_top, top)  # an observed query's weights are its probabilities
      decay = jnp.exp2(top - new_top)
      weights = jnp.exp2(logits - new_top[:, None])
      if plan.observes:
        behind.add(update, weights)
      accs = tuple(acc * decay[:, None] + plt.dot(weights.astype(v.dtype), v, precision=precision)
                   for acc, v in zip(accs, load(rows + plan.block_size, held), strict=True))
      return accs, new_top, total * decay + jnp.sum(weights, axis=1)

    begin, end = jnp.maximum(low - start, 0), jnp.minimum(high, row.start(pair + 1)) - start
    accs, top, total = lax.fori_loop(begin, end, tile_body, (
        (jnp.zeros((plan.rows, width), jnp.float32),) * parts, top0, jnp.zeros((plan.rows,), jnp.float32)))
    slot = (cta + pair) * group + head
    out_mask = jnp.broadcast_to(_both(real, real_cols), (plan.rows, width))
    for part, acc in enumerate(accs):
      plt.store(out_ref.at[slot[:, None], cols[None, :] * parts + part], acc * unit, mask=out_mask)
    plt.store(top_ref.at[slot], top, mask=real)
    plt.store(sum_ref.at[slot], total, mask=real)
    return carry

  lax.fori_loop(first, stop, pair_body, None)


@dataclasses.dataclass(frozen=True)
class _Behind:
  """The score update of one pair: the observed queries are one step behind.

  Attributes:
    plan: as elsewhere.
    rows: bool [rows] which rows of a tile are observed queries.
    log_sums: f32 [rows] theirs, base 2; 0 in the other rows.
    newest: i32 [] the newest position that counts.
    length: i32 [] KVs of the pair; the last one is newer than the observed query.
    positions_ref: i32 [N*P].
    scores_ref: f32 [N*P].
  """

  plan: Any
  rows: jax.Array
  log_sums: jax.Array
  newest: jax.Array
  length: jax.Array
  positions_ref: Any
  scores_ref: Any

  @classmethod
  def of(cls, plan, observed_refs, scores_ref, head, pair, table_row, length):
    _, log_sums_ref, query_positions_ref, positions_ref, _ = observed_refs
    rows = (head >= plan.group) & (head < 2 * plan.group)
    at = table_row * plan.group + jnp.where(rows, head - plan.group, 0)
    log_sums = plt.load(log_sums_ref.at[at], mask=rows, other=0.0) * _LOG2E
    newest = query_positions_ref[lax.div(pair, jnp.int32(plan.heads))] - plan.buffer
    return cls(plan, rows, log_sums, newest, length, positions_ref, scores_ref)

  def start(self, at, token):
    """Reads a tile's old scores [tile] early, for they come late: where they lie, which count, and they."""
    counted = token < self.length - 1
    if self.plan.buffer:
      counted &= plt.load(self.positions_ref.at[at], mask=counted, other=0) <= self.newest
    return at, counted, plt.load(self.scores_ref.at[at], mask=counted, other=0.0)

  def add(self, update, weights):
    """Adds the observed rows of a tile's weights [rows, tile]."""
    at, counted, old = update
    chances = jnp.where(self.rows[:, None], weights, 0.0)
    gain = jnp.sum(chances * chances if self.plan.power == 2 else chances, axis=0)
    plt.store(self.scores_ref.at[at], old + gain, mask=counted)


# -------------------------------------------------------------------------- second kernel


def _merge(plan, partials, walk, q, observed, *, interpret):
  """Output [S, H*G, D] from the partial ones; and `observed` with the new queries."""
  layer, _, _, packed = walk
  rows = plan.pairs * plan.group
  shapes = [jax.ShapeDtypeStruct((rows + plan.padded_group - plan.group, plan.head_dim), plan.out_dtype)]
  inputs, aliases = [*partials, layer, packed], {}
  if observed is not None:
    shapes += [jax.ShapeDtypeStruct((observed.queries.size // plan.head_dim, plan.head_dim), observed.queries.dtype),
               jax.ShapeDtypeStruct((observed.log_sums.size,), jnp.float32)]
    inputs += [q.reshape(-1, plan.head_dim), observed.queries.reshape(-1, plan.head_dim), observed.log_sums.reshape(-1)]
    aliases = {len(inputs) - 2: 1, len(inputs) - 1: 2}
  out, *new = pl.pallas_call(
      functools.partial(_merge_kernel, plan=plan), out_shape=shapes, grid=(plan.pairs,), interpret=interpret,
      input_output_aliases=aliases, name="paged_decode_merge",
      compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
  )(*inputs)
  if observed is not None:
    queries, log_sums = new
    observed = observed._replace(
        queries=queries.reshape(observed.queries.shape), log_sums=log_sums.reshape(observed.log_sums.shape))
  return out[:rows].reshape(q.shape), observed


def _merge_kernel(out_ref, top_ref, sum_ref, layer_ref, plan_ref, *refs, plan):
  """One pair: merges its partial outputs, several at a time."""
  group, padded = plan.group, plan.padded_group
  pair = pl.program_id(0)
  layer = layer_ref[0]
  at_once = max(1, min(8, 4096 // (padded * plan.padded_dim)))
  first, stop = plan.row(plan_ref, layer, plan.config.ctas).ctas_of(pair)
  cols, real_cols = _columns(plan)
  head = jnp.arange(padded, dtype=jnp.int32)

  def body(step, carry):
    acc, top, total = carry
    cta = first + step * at_once + jnp.arange(at_once, dtype=jnp.int32)
    live = (cta < stop)[:, None] & (head < group)[None, :]
    rows = jnp.where(live, (cta[:, None] + pair) * group + head[None, :], 0)
    tops = plt.load(top_ref.at[rows], mask=live, other=-jnp.inf)
    sums = plt.load(sum_ref.at[rows], mask=live, other=0.0)
    mask = live[..., None] if real_cols is None else live[..., None] & real_cols[None, None]
    parts = plt.load(out_ref.at[rows[..., None], cols[None, None]],
                     mask=jnp.broadcast_to(mask, (*rows.shape, plan.padded_dim)), other=0.0)
    new_top = jnp.maximum(top, jnp.max(tops, axis=0))
    safe = jnp.where(new_top > -jnp.inf, new_top, 0.0)  # rows of a padded group see nothing
    shares = jnp.exp2(tops - safe[None])  # [slots, G]
    decay = jnp.exp2(top - safe)
    acc = acc * decay[:, None] + jnp.sum(parts * shares[..., None], axis=0)
    return acc, new_top, total * decay + jnp.sum(sums * shares, axis=0)

  steps = lax.div(stop - first + (at_once - 1), jnp.int32(at_once))
  acc, top, total = lax.fori_loop(0, steps, body, (
      jnp.zeros((padded, plan.padded_dim), jnp.float32),
      jnp.full((padded,), -jnp.inf, jnp.float32), jnp.zeros((padded,), jnp.float32)))
  some = total > 0
  out = acc / jnp.where(some, total, 1.0)[:, None]
  # Rows of a padded group are written behind the end.
  rows = jnp.where(head < group, pair * group, plan.pairs * group - group) + head
  mask = jnp.broadcast_to(_both(head < group, real_cols), out.shape)
  if plan.observes:
    q_ref, _, _, merged_ref, queries_ref, log_sums_ref = refs
    _observe(plan, pair, layer, head, cols, mask & some[:, None], some, top, total, q_ref, queries_ref, log_sums_ref)
  else:
    (merged_ref,) = refs
  plt.store(merged_ref.at[rows[:, None], cols[None, :]], out.astype(merged_ref.dtype), mask=mask)


def _observe(plan, pair, layer, head, cols, mask, some, top, total, q_ref, queries_ref, log_sums_ref):
  """Leaves the pair's queries and their log-sum-exp for the next step; a pair that holds nothing keeps the old."""
  real = (head < plan.group) & some
  source = pair * plan.group + jnp.where(real, head, 0)
  target = (layer * plan.pairs + pair) * plan.group + head
  queries = plt.load(q_ref.at[source[:, None], cols[None, :]], mask=mask, other=0.0)
  plt.store(queries_ref.at[target[:, None], cols[None, :]], queries.astype(queries_ref.dtype), mask=mask)
  log_sum = (top + jnp.log2(jnp.where(some, total, 1.0))) / _LOG2E
  plt.store(log_sums_ref.at[target], log_sum, mask=real)
