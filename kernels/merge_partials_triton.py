"""The merge of partial decode results as a kernel of its own, for interpret mode of `paged_decode_mosaic`.

On a GPU the last CTA to arrive at a pair merges it; interpret mode knows no semaphores.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kvc_jax.kernels import paged_decode_triton as triton


def merge(plan, partials, walk, q, observed):
  """Output [S, H*G, D] from the partial results; and `observed` with the new queries."""
  layer, _, _, packed = walk
  queries = q.reshape(-1, plan.head_dim)
  inputs = {"q": queries, "layer": layer, "plan": packed,
            **dict(zip(("partial_out", "partial_top", "partial_sum"), partials, strict=True))}
  outputs = {"out": jax.ShapeDtypeStruct((len(queries) + plan.padded_group - plan.group, plan.head_dim), q.dtype)}
  if observed is not None:
    kept = {"queries": observed.queries.reshape(-1, plan.head_dim), "log_sums": observed.log_sums.reshape(-1)}
    inputs |= kept
    outputs |= kept
  read, written = tuple(inputs), tuple(outputs)
  results = pl.pallas_call(
      functools.partial(_merge_kernel, plan=plan, names=(read, written)), grid=(plan.pairs,), interpret=True,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
      input_output_aliases={read.index(name): written.index(name) for name in written if name in inputs},
  )(*inputs.values())
  found = dict(zip(written, results, strict=True))
  if observed is not None:
    observed = observed._replace(
        **{name: found[name].reshape(getattr(observed, name).shape) for name in ("queries", "log_sums")})
  return found["out"][: len(queries)].reshape(q.shape), observed


def _merge_kernel(*refs, plan, names):
  """One pair; zeros where it holds nothing."""
  read, written = names
  ref = dict(zip(read, refs, strict=False)) | dict(zip(written, refs[len(read):], strict=True))
  pair, layer = pl.program_id(0), ref["layer"][0]
  first, stop = plan.row(ref["plan"], layer).ctas_of(pair)

  @pl.when(stop > first)
  def _():
    triton.merge_pair(plan, ref, layer, pair, first, stop)

  @pl.when(stop == first)
  def _():
    cols, real_cols = triton.columns_of(plan)
    triton.store_output(plan, ref["out"], pair, jnp.arange(plan.padded_group, dtype=jnp.int32), cols, real_cols,
                        jnp.zeros((plan.padded_group, plan.padded_dim), jnp.float32))
