"""Dense causal attention in jnp: the plain `attend` that tests give to the model."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def dense_attend(
    layer: jax.Array,
    q: Float[Array, "tokens query_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    state: Any,
) -> tuple[Float[Array, "tokens query_heads head_dim"], Any]:
  """An `Attend` (kvc_jax.model.layers) over the tokens of one call, without a cache.

  Token i sees tokens 0..i. f32 inside whatever the dtype, which the output keeps;
  the scale is 1 / sqrt(D); `state` is returned as it came.
  """
  del layer
  tokens, query_heads, head_dim = q.shape
  _, kv_heads, _ = k.shape
  group = query_heads // kv_heads
  q32 = q.astype(jnp.float32).reshape(tokens, kv_heads, group, head_dim)
  k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)
  logits = jnp.einsum("qhgd,khd->hgqk", q32, k32, precision=lax.Precision.HIGHEST) / math.sqrt(head_dim)
  seen = jnp.tril(jnp.ones((tokens, tokens), bool))
  weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
  out = jnp.einsum("hgqk,khd->qhgd", weights, v32, precision=lax.Precision.HIGHEST)
  return out.reshape(tokens, query_heads, head_dim).astype(q.dtype), state
