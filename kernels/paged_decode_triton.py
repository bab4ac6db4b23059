"""Pallas-Triton version of `paged_decode`, for Ampere GPUs and newer.

Each KV is streamed once: CTAs take equal shares of all tiles (stream_k), and leave
unnormalised outputs with their running maxima and sums. The last CTA to arrive at
a (sequence, KV head) merges them; a second kernel for that would cost its launch.

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
    num_warps: of a CTA.
    num_stages: Triton's; loads behind the table's load keep (num_stages - 1) // 2 tiles in flight.
    ctas: CTAs that share the work.
  """

  tile: int
  num_warps: int = 4
  num_stages: int
  ctas: int


_CTAS_PER_CORE = {(8, 0): 2, (8, 6): 1, (8, 7): 2, (8, 9): 1, (12, 0): 1}
"""By compute capability, where it is not 3: what 100 or 164 KiB of shared memory hold."""


def default_config(kv: jax.ShapeDtypeStruct | jax.Array, pairs: int) -> Config:
  """What measured best on an H200 for a pool [N, 2, P, D] and S*H pairs (docs/performance.md)."""
  _, _, _, head_dim = kv.shape
  row_bytes = head_dim * kv.dtype.itemsize
  cores = backends.num_cores()
  # float32 products take plain multiply-adds, and so many registers.
  most, tile_bytes = {1: (128, 16384), 2: (64, 16384), 4: (32, 8192)}[kv.dtype.itemsize]
  tile = max(16, min(most, tile_bytes // row_bytes))
  # All CTAs have to fit on the GPU at once, or the last ones run alone: 74 KiB of shared memory each.
  fit = _CTAS_PER_CORE.get(backends.target_capability() or (9, 0), 3)
  # Few pairs make short shares: fewer CTAs then leave fewer partial results.
  return Config(tile=tile, num_stages=5, ctas=min(fit, 3 if pairs >= 2 * cores else 2) * cores)


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
    every: int = 1,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Observed | None]:
  """See `paged_decode.paged_decode`; `interpret` runs on the CPU, for tests."""
  _, seqs, heads, _ = tables.shape
  config = config or default_config(kv, seqs * heads)
  plan = Plan.of(q, kv, tables, config, observed, scale, power, buffer, every)
  packed = stream_k.schedule(lengths, tile=config.tile, ctas=config.ctas)
  walk = (layer.reshape(1), tables.reshape(-1), lengths.reshape(-1), packed)
  return _attend(plan, q, kv, walk, observed, interpret=interpret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Static numbers of a call; letters as in docs/architecture.md."""

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
  every: int
  config: Config

  @classmethod
  def of(cls, q, kv, tables, config, observed, scale, power, buffer, every) -> "Plan":
    _, seqs, heads, max_blocks = tables.shape
    _, _, block_size, head_dim = kv.shape
    return cls(
        pairs=seqs * heads, group=q.shape[1] // heads, heads=heads, head_dim=head_dim, block_size=block_size,
        max_blocks=max_blocks, packed=kv.dtype.itemsize == 1, observes=observed is not None, out_dtype=q.dtype,
        scale=scale, power=power, buffer=buffer, every=every, config=config)

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

  def row(self, ref, layer) -> stream_k.Row:
    return stream_k.Row(ref, layer, self.pairs, self.config.ctas)


def columns_of(plan):
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


def _attend(plan, q, kv, walk, observed, *, interpret):
  """Output [S, H*G, D], and `observed` brought up to date."""
  config, dim = plan.config, plan.head_dim
  queries = q.reshape(-1, dim)
  inputs = {"q": queries, "kv": _rows(kv), **dict(zip(("layer", "tables", "lengths", "plan"), walk, strict=True)),
            "arrivals": jnp.zeros((plan.pairs,), jnp.int32)}
  partial_rows = plan.slots * plan.group + plan.rows  # the last group's padding rows lie within bounds, though masked
  outputs = {
      "out": jax.ShapeDtypeStruct((len(queries) + plan.padded_group - plan.group, dim), q.dtype),
      "arrivals": inputs["arrivals"],
      "partial_out": jax.ShapeDtypeStruct((partial_rows, dim), jnp.float32),
      "partial_top": jax.ShapeDtypeStruct((partial_rows,), jnp.float32),
      "partial_sum": jax.ShapeDtypeStruct((partial_rows,), jnp.float32)}
  if observed is not None:
    kept = {"scores": observed.scores.reshape(-1), "queries": observed.queries.reshape(-1, dim),
            "log_sums": observed.log_sums.reshape(-1)}
    inputs |= {**kept, "positions": observed.positions.reshape(-1), "query_positions": observed.query_positions}
    outputs |= kept
  names, updated = tuple(inputs), tuple(outputs)
  results = pl.pallas_call(
      functools.partial(_attend_kernel, plan=plan, names=(names, updated), interpret=interpret),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
      grid=(config.ctas,), interpret=interpret, name="paged_decode",
      input_output_aliases={names.index(name): updated.index(name) for name in updated if name in inputs},
      compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
  )(*inputs.values())
  found = dict(zip(updated, results, strict=True))
  if observed is not None:
    observed = observed._replace(
        **{name: found[name].reshape(getattr(observed, name).shape) for name in ("scores", "queries", "log_sums")})
  return found["out"][: len(queries)].reshape(q.shape), observed


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


def _attend_kernel(*refs, plan, names, interpret):
  """One CTA: its share of tiles, pair by pair."""
  read, written = names
  ref = dict(zip(read, refs, strict=False)) | dict(zip(written, refs[len(read):], strict=True))
  group, tile, parts = plan.group, plan.config.tile, plan.dim_parts
  cta = pl.program_id(0)
  layer = ref["layer"][0]
  row = plan.row(ref["plan"], layer)
  first, stop, low, high = row.cta(cta)
  head = jnp.arange(plan.rows, dtype=jnp.int32)
  real = head < group
  width = pl.next_power_of_2(plan.head_dim // parts)
  cols = jnp.arange(width, dtype=jnp.int32)
  real_cols = None if width * parts == plan.head_dim else cols < plan.head_dim // parts
  precision = lax.Precision.HIGHEST if plan.dot_dtype == jnp.float32 else None
  unit = _E4M3_FACTOR if plan.packed else 1.0
  _clear_empty_pairs(plan, ref, layer, cta)

  def load_queries(ref, first_row, rows, part):
    at = jnp.where(rows, first_row + head, 0)
    mask = jnp.broadcast_to(_both(rows, real_cols), (plan.rows, width))
    return plt.load(ref.at[at[:, None], cols[None, :] * parts + part], mask=mask, other=0.0)

  def pair_body(pair, carry):
    start = row.start(pair)
    table_row = layer * plan.pairs + pair
    length = ref["lengths"][table_row]
    queries = [load_queries(ref["q"], pair * group, real, part) for part in range(parts)]
    top0 = jnp.where(real, -jnp.inf, 0.0)
    if plan.observes:
      behind = _Behind.of(plan, ref, head, pair, table_row, length)
      queries = [q + load_queries(ref["queries"], (table_row - 1) * group, behind.rows, part)
                 for part, q in enumerate(queries)]
      top0 = jnp.where(real, -jnp.inf, behind.log_sums)
    queries = [q.astype(plan.dot_dtype) for q in queries]

    def load(rows, held):
      mask = jnp.broadcast_to(_both(held, real_cols), (tile, width))
      # What lies behind a head's end may be anything, NaN too, and 0 * NaN is NaN.
      loaded = plt.load(ref["kv"].at[rows[:, None], cols[None, :]], mask=mask, other=0)
      return _unpack(loaded) if plan.packed else (loaded.astype(plan.dot_dtype),)

    def tile_body(step, carry):
      accs, top, total = carry
      token = step * tile + jnp.arange(tile, dtype=jnp.int32)
      held = token < length
      blocks, place = _blocks_of(plan, ref["tables"], table_row, token, held)
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
      plt.store(ref["partial_out"].at[slot[:, None], cols[None, :] * parts + part], acc * unit, mask=out_mask)
    plt.store(ref["partial_top"].at[slot], top, mask=real)
    plt.store(ref["partial_sum"].at[slot], total, mask=real)
    pl.when(end > begin)(lambda: _arrive(plan, ref, row, layer, pair, interpret=interpret))
    return carry

  lax.fori_loop(first, stop, pair_body, None)


def _clear_empty_pairs(plan, ref, layer, cta):
  """Zeros for pairs that hold nothing: no CTA walks them. Each CTA looks after some."""
  head, (cols, real_cols) = jnp.arange(plan.padded_group, dtype=jnp.int32), columns_of(plan)

  def clear(i, carry):
    pair = cta + i * plan.config.ctas

    @pl.when(ref["lengths"][layer * plan.pairs + pair] == 0)
    def _():
      store_output(plan, ref["out"], pair, head, cols, real_cols,
                   jnp.zeros((plan.padded_group, plan.padded_dim), jnp.float32))

    return carry

  count = lax.div(plan.pairs - cta + (plan.config.ctas - 1), jnp.int32(plan.config.ctas))
  lax.fori_loop(0, jnp.maximum(count, 0), clear, None)


def _arrive(plan, ref, row, layer, pair, *, interpret):
  """Counts this CTA's arrival at a pair; the last one merges."""
  first, stop = row.ctas_of(pair)
  if not interpret:
    plt.debug_barrier()  # all threads' partial results are written before one of them says so
  arrived = plt.atomic_add(ref["arrivals"], (pair,), jnp.int32(1))

  @pl.when(arrived == stop - first - 1)
  def _():
    merge_pair(plan, ref, layer, pair, first, stop)


@dataclasses.dataclass(frozen=True)
class _Behind:
  """The score update of one pair: the observed queries are one step behind.

  Attributes:
    plan: as elsewhere.
    rows: bool [rows] which rows of a tile are observed queries.
    log_sums: f32 [rows] theirs, base 2; 0 in the other rows.
    newest: i32 [] the newest position that counts.
    length: i32 [] KVs of the pair; the last one is newer than the observed query. 0 where the query does not count.
    ref: the kernel's refs by name.
  """

  plan: Any
  rows: jax.Array
  log_sums: jax.Array
  newest: jax.Array
  length: jax.Array
  ref: Any

  @classmethod
  def of(cls, plan, ref, head, pair, table_row, length):
    rows = (head >= plan.group) & (head < 2 * plan.group)
    at = table_row * plan.group + jnp.where(rows, head - plan.group, 0)
    log_sums = plt.load(ref["log_sums"].at[at], mask=rows, other=0.0) * _LOG2E
    position = ref["query_positions"][lax.div(pair, jnp.int32(plan.heads))]
    length = jnp.where(lax.rem(position, jnp.int32(plan.every)) == 0, length, 0)
    return cls(plan, rows, log_sums, position - plan.buffer, length, ref)

  def start(self, at, token):
    """Reads a tile's old scores [tile] early, for they come late: where they lie, which count, and they."""
    counted = token < self.length - 1
    if self.plan.buffer:
      counted &= plt.load(self.ref["positions"].at[at], mask=counted, other=0) <= self.newest
    return at, counted, plt.load(self.ref["scores"].at[at], mask=counted, other=0.0)

  def add(self, update, weights):
    """Adds the observed rows of a tile's weights [rows, tile]."""
    at, counted, old = update
    chances = jnp.where(self.rows[:, None], weights, 0.0)
    gain = jnp.sum(chances * chances if self.plan.power == 2 else chances, axis=0)
    plt.store(self.ref["scores"].at[at], old + gain * self.plan.every, mask=counted)


# --------------------------------------------------------------------------- merging


def merge_pair(plan, ref, layer, pair, first, stop):
  """Merges the partial outputs that CTAs [first, stop) left of one pair, several at a time."""
  group, padded = plan.group, plan.padded_group
  at_once = max(1, min(8, 4096 // (padded * plan.padded_dim)))
  cols, real_cols = columns_of(plan)
  head = jnp.arange(padded, dtype=jnp.int32)

  def load(name, at, mask, other):
    # Volatile: past the L1 cache, which may hold what lay there before.
    return plt.load(ref[name].at[at], mask=mask, other=other, volatile=True)

  def body(step, carry):
    acc, top, total = carry
    cta = first + step * at_once + jnp.arange(at_once, dtype=jnp.int32)
    live = (cta < stop)[:, None] & (head < group)[None, :]
    rows = jnp.where(live, (cta[:, None] + pair) * group + head[None, :], 0)
    tops = load("partial_top", rows, live, -jnp.inf)
    sums = load("partial_sum", rows, live, 0.0)
    mask = live[..., None] if real_cols is None else live[..., None] & real_cols[None, None]
    parts = load("partial_out", (rows[..., None], cols[None, None]),
                 jnp.broadcast_to(mask, (*rows.shape, plan.padded_dim)), 0.0)
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
  total = jnp.where(head < group, total, 1.0)
  store_output(plan, ref["out"], pair, head, cols, real_cols, acc / total[:, None])
  if plan.observes:
    _observe(plan, ref, layer, pair, head, cols, real_cols, top + jnp.log2(total))


def store_output(plan, out_ref, pair, head, cols, real_cols, out):
  """Writes one pair's output; the rows of a padded group go behind the end, masked."""
  group = plan.group
  rows = jnp.where(head < group, pair * group, plan.pairs * group - group) + head
  mask = jnp.broadcast_to(_both(head < group, real_cols), out.shape)
  plt.store(out_ref.at[rows[:, None], cols[None, :]], out.astype(out_ref.dtype), mask=mask)


def _observe(plan, ref, layer, pair, head, cols, real_cols, log_sums):
  """Leaves the pair's queries and their log-sum-exp, base 2 here, for the next step."""
  real = head < plan.group
  mask = jnp.broadcast_to(_both(real, real_cols), (plan.padded_group, plan.padded_dim))
  source = pair * plan.group + jnp.where(real, head, 0)
  target = (layer * plan.pairs + pair) * plan.group + head
  queries = plt.load(ref["q"].at[source[:, None], cols[None, :]], mask=mask, other=0.0)
  plt.store(ref["queries"].at[target[:, None], cols[None, :]], queries.astype(ref["queries"].dtype), mask=mask)
  plt.store(ref["log_sums"].at[target], log_sums / _LOG2E, mask=real)
