"""Pallas-Triton version of `column_scores`, for Ampere GPUs and newer: one pass over K.

A program owns a tile of one head's keys, holds it on the chip and walks the queries
that count for any of it. Every query head of the group is a row of the same product,
so K is read once; probabilities follow from the log-sum-exp in one step and pile up
in registers, where they are summed over the queries behind the last step.

             query 0      query 1     ...
    row      g0 g1 g2 g3  g0 g1 g2 g3
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_LOG2E = math.log2(math.e)
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is laid out.

  Attributes:
    tile: keys of a program, a power of two, at least 16.
    rows: query heads times queries per step, a power of two, at least 16.
    num_warps: of a program.
    num_stages: steps of queries in flight.
  """

  tile: int
  rows: int
  num_warps: int = 4
  num_stages: int = 3


def default_config(q: jax.Array | jax.ShapeDtypeStruct) -> Config:
  """The measured choice for queries [R, H*G, D]; it fits in 96 KiB of shared memory."""
  if q.dtype == jnp.float32:  # products without tensor cores, with operands in registers: larger tiles spill
    return Config(tile=32, rows=32, num_warps=8, num_stages=2)
  row_bytes = pl.next_power_of_2(q.shape[-1]) * q.dtype.itemsize
  return Config(tile=max(16, min(128, 32768 // row_bytes)), rows=max(16, min(64, 16384 // row_bytes)))


def column_scores(
    q: jax.Array,
    log_sums: jax.Array,
    query_positions: jax.Array,
    kv: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    layer: jax.Array,
    slot: jax.Array,
    *,
    scale: float,
    power: int,
    buffer: int,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
  """See `column_scores.column_scores`; `interpret` runs on the CPU, for tests."""
  config = config or default_config(q)
  _, slots, heads, max_blocks = tables.shape
  plan = _Plan(
      queries=q.shape[0], heads=heads, group=q.shape[1] // heads, head_dim=q.shape[2], block_size=kv.shape[2],
      slots=slots, max_blocks=max_blocks, scale=scale, power=power, config=config)
  last_counted = jnp.pad(
      query_positions - buffer, (0, plan.steps * plan.per_step - plan.queries), constant_values=_LOWEST)
  step_ends = jnp.max(last_counted.reshape(plan.steps, plan.per_step), axis=1)
  tiles = pl.cdiv(max_blocks * plan.block_size, config.tile)
  sums = pl.pallas_call(
      functools.partial(_kernel, plan=plan),
      out_shape=jax.ShapeDtypeStruct((heads * plan.padded_group, tiles * config.tile), jnp.float32),
      grid=(heads * tiles,), interpret=interpret, name="column_scores",
      compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
  )(q.reshape(-1, plan.head_dim), log_sums.reshape(-1), last_counted, step_ends, kv.reshape(-1, plan.head_dim),
    positions.reshape(-1), tables.reshape(-1), lengths.reshape(-1), jnp.stack([layer, slot]))
  return sums.reshape(heads, plan.padded_group, -1)[:, : plan.group, : max_blocks * plan.block_size]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """Static numbers of one call; letters as in docs/architecture.md."""

  queries: int
  heads: int
  group: int
  head_dim: int
  block_size: int
  slots: int
  max_blocks: int
  scale: float
  power: int
  config: Config

  @property
  def padded_group(self) -> int:
    return pl.next_power_of_2(self.group)

  @property
  def padded_dim(self) -> int:
    return pl.next_power_of_2(self.head_dim)

  @property
  def per_step(self) -> int:
    """Queries of a step."""
    return max(1, self.config.rows // self.padded_group)

  @property
  def rows(self) -> int:
    return self.per_step * self.padded_group

  @property
  def steps(self) -> int:
    return pl.cdiv(self.queries, self.per_step)


def _kernel(q_ref, log_sums_ref, last_counted_ref, step_ends_ref, kv_ref, positions_ref, tables_ref, lengths_ref,
            layer_and_slot_ref, sums_ref, *, plan):
  """One tile of keys of one head.

  Refs: q [R*H*G, D]; log_sums f32 [R*H*G]; last_counted i32 [steps * per_step], newest
  position that each query counts for; step_ends i32 [steps], largest of each step's;
  kv [N*2*P, D]; positions i32 [N*P]; tables i32 [L*S*H*M]; lengths i32 [L*S*H];
  layer_and_slot i32 [2]; sums f32 [H * padded G, tiles * tile].
  """
  # Heads come fastest: the first tiles, which most queries count for, start first.
  head = lax.rem(pl.program_id(0), jnp.int32(plan.heads))
  start = lax.div(pl.program_id(0), jnp.int32(plan.heads)) * plan.config.tile
  token = start + jnp.arange(plan.config.tile, dtype=jnp.int32)
  table_row = (layer_and_slot_ref[0] * plan.slots + layer_and_slot_ref[1]) * plan.heads + head
  length = lengths_ref[table_row]
  group = jnp.arange(plan.padded_group, dtype=jnp.int32)
  target = sums_ref.at[(head * plan.padded_group + group)[:, None], token[None, :]]

  @pl.when(start < length)
  def _():
    keys, key_positions = _load_keys(plan, kv_ref, positions_ref, tables_ref, table_row, token, length)
    first, stop = _counted_steps(plan, step_ends_ref, jnp.min(key_positions))
    load_queries = functools.partial(_load_queries, plan, q_ref, log_sums_ref, last_counted_ref, head)
    plt.store(target, _sum_over_queries(plan, keys, key_positions, load_queries, first, stop))

  @pl.when(start >= length)
  def _():
    plt.store(target, jnp.zeros((plan.padded_group, plan.config.tile), jnp.float32))


def _sum_over_queries(plan, keys, key_positions, load_queries, first, stop):
  """Sums [padded G, tile] over steps [first, stop)."""
  exponent = plan.power * _LOG2E

  def body(step, acc):
    queries, log_sums, last_counted = load_queries(step)
    precision = lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    logits = plt.dot(queries, keys.astype(queries.dtype), trans_b=True, precision=precision)  # [rows, tile]
    raised = jnp.exp2(logits * (plan.scale * exponent) - (log_sums * exponent)[:, None])
    # Selected, not multiplied: an uncounted key may lie so far above the log-sum-exp that this is inf.
    return acc + jnp.where(key_positions[None, :] <= last_counted[:, None], raised, 0.0)

  acc = lax.fori_loop(first, stop, body, jnp.zeros((plan.rows, plan.config.tile), jnp.float32))
  return jnp.sum(acc.reshape(plan.per_step, plan.padded_group, plan.config.tile), axis=0)


def _load_keys(plan, kv_ref, positions_ref, tables_ref, table_row, token, length):
  """Keys [tile, D], zero where nothing is held, and their positions [tile], there the highest number."""
  held = token < length
  block_size = jnp.int32(plan.block_size)
  blocks = plt.load(tables_ref.at[table_row * plan.max_blocks + lax.div(token, block_size)], mask=held, other=0)
  offset = lax.rem(token, block_size)
  # What lies behind a head's end may be anything, NaN too.
  keys = _load_rows(plan, kv_ref, blocks * (2 * plan.block_size) + offset, held)
  return keys, plt.load(positions_ref.at[blocks * plan.block_size + offset], mask=held, other=_HIGHEST)


def _load_queries(plan, q_ref, log_sums_ref, last_counted_ref, head, step):
  """Queries [rows, D] of a step, their log-sum-exps and the newest positions they count for, [rows] each."""
  row = jnp.arange(plan.rows, dtype=jnp.int32)
  query = step * plan.per_step + lax.div(row, jnp.int32(plan.padded_group))
  group = lax.rem(row, jnp.int32(plan.padded_group))
  real = (query < plan.queries) & (group < plan.group)
  at = jnp.where(real, (query * plan.heads + head) * plan.group + group, 0)
  return (_load_rows(plan, q_ref, at, real), plt.load(log_sums_ref.at[at], mask=real, other=0.0),
          plt.load(last_counted_ref.at[query]))


def _load_rows(plan, ref, rows, real):
  """Rows [n, padded D] of a [., D] array; 0 where not `real` and behind D."""
  column = jnp.arange(plan.padded_dim, dtype=jnp.int32)
  mask = real[:, None] & (column < plan.head_dim)[None, :]
  return plt.load(ref.at[rows[:, None], column[None, :]], mask=mask, other=0.0)


def _counted_steps(plan, step_ends_ref, oldest):
  """First and one past the last step in which a query counts for a key at position `oldest`."""
  step = jnp.arange(pl.next_power_of_2(plan.steps), dtype=jnp.int32)
  ends = plt.load(step_ends_ref.at[step], mask=step < plan.steps, other=_LOWEST)
  counts = ends >= oldest
  return jnp.min(jnp.where(counts, step, plan.steps)), jnp.max(jnp.where(counts, step + 1, 0))
