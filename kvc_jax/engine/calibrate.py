"""Scales for an FP8 cache, from what a model's keys and values look like."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvc_jax.cache.quantize import LARGEST
from kvc_jax.model.llama import Llama

_MARGIN = 2.0
"""e4m3 is as precise at half its range as at all of it, so room costs nothing but its smallest numbers."""


@nnx.jit
def kv_scales(model: Llama, tokens: Int[Array, " tokens"]) -> Float[Array, "layers kv_heads 2"]:
  """Scales with which this model's keys and values fill half of e4m3's range.

  Args:
    model: the model.
    tokens: i32 [T] what to run it on; some hundred tokens, even random ones, show
      the range of each head.

  Returns:
    f32 [L, H, 2], of keys and of values; for `init_cache`.
  """
  config = model.config

  def attend(layer, q, k, v, largest):
    found = jnp.stack([jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 2)) for x in (k, v)], axis=1)
    out = jax.nn.dot_product_attention(q[None], k[None], v[None], scale=config.head_dim**-0.5, is_causal=True)[0]
    return out, largest.at[layer].set(found)

  positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  largest = jnp.zeros((config.num_layers, config.num_kv_heads, 2), jnp.float32)
  _, largest = model(tokens, positions, attend, largest)
  return jnp.where(largest > 0, largest, 1.0) * (_MARGIN / LARGEST)  # a head may be all zeros
