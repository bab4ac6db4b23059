"""The merge of partial decode outputs as a kernel of its own, for `paged_decode_mosaic`."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kvc_jax.kernels.paged_decode_triton import _both, _columns

_LOG2E = math.log2(math.e)


def merge(plan, partials, walk, q, observed, *, interpret):
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
