"""FP8 blocks: keys and values are stored as e4m3 numbers, divided by a scale of their head.

The scales never reach a kernel. Queries are multiplied by the keys' scale before
attention and its output by the values' scale behind it, which is the same and costs
no pass over the pool.
"""

import jax
import jax.numpy as jnp

from kvc_jax.cache.state import CacheState

FP8 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = float(jnp.finfo(FP8).max)
"""The largest e4m3 number, 448."""


def scale_inputs(
    state: CacheState, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries, keys and values as the cache stores them; unchanged where it is not FP8.

  Keys and values are rounded to e4m3 here, in their own dtype, so that a prompt is
  attended as its blocks will be, however it is cut into chunks. What is beyond the
  largest e4m3 number becomes that, not NaN.
  """
  if state.kv_scales is None:
    return q, k, v
  key_scale, value_scale = state.kv_scales[layer, :, 0], state.kv_scales[layer, :, 1]
  group = q.shape[1] // k.shape[1]
  q = (q.astype(jnp.float32) * jnp.repeat(key_scale, group)[:, None]).astype(q.dtype)
  return q, _rounded(k, key_scale), _rounded(v, value_scale)


def scale_output(state: CacheState, layer: jax.Array, out: jax.Array) -> jax.Array:
  """Attention output [T, H*G, D] in the values' own unit."""
  if state.kv_scales is None:
    return out
  value_scale = state.kv_scales[layer, :, 1]
  group = out.shape[1] // value_scale.shape[0]
  return (out.astype(jnp.float32) * jnp.repeat(value_scale, group)[:, None]).astype(out.dtype)


def _rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
  bounded = jnp.clip(x.astype(jnp.float32) / scale[:, None], -LARGEST, LARGEST)
  return bounded.astype(FP8).astype(x.dtype)
