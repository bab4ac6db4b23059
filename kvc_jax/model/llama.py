"""Llama-family decoder: stacked layers under one scan, attention as a function."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvc_jax.config import LlamaConfig
from kvc_jax.model.layers import Attend, DecoderLayer, RMSNorm
from kvc_jax.model.rope import inverse_frequencies


class Llama(nnx.Module):
  """Llama 2, 3, 3.1, 3.2 and Mistral (no sliding window).

  Parameters of all layers are stacked on a leading axis L, so a layer compiles
  once. The caller's `state` (a cache, or None) rides in the scan carry.
  """

  def __init__(self, config: LlamaConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
    self.config = config
    self.embed = nnx.Embed(
        config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> DecoderLayer:
      return DecoderLayer(config, dtype, rngs)

    self.layers = stacked(rngs)
    self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
    # [V, E] as in the embedding, so that tied and untied heads are one product.
    self.lm_head = None if config.tie_embeddings else nnx.Embed(
        config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)

  def __call__(
      self,
      tokens: Int[Array, " tokens"],
      positions: Int[Array, " tokens"],
      attend: Attend,
      state: Any = None,
  ) -> tuple[Float[Array, "tokens hidden"], Any]:
    """Runs all layers.

    Args:
      tokens: i32 [T] token ids.
      positions: i32 [T] position of each token in its sequence.
      attend: attention of one layer; see `Attend`.
      state: any pytree that `attend` reads and returns.

    Returns:
      Normed hidden states [T, E] and the final state.
    """
    frequencies = inverse_frequencies(self.config.rope, self.config.head_dim)
    graph, stacked = nnx.split(self.layers)

    def body(carry, inputs):
      x, state = carry
      layer, params = inputs
      x, state = nnx.merge(graph, params)(x, layer, positions, frequencies, attend, state)
      return (x, state), None

    indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
    (x, state), _ = lax.scan(body, (self.embed(tokens), state), (indices, stacked))
    return self.norm(x), state

  def logits(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
    """Next-token logits, f32 [T, V]."""
    table = (self.embed if self.lm_head is None else self.lm_head).embedding[...]
    precision = lax.Precision.HIGHEST if table.dtype == jnp.float32 else None
    return lax.dot_general(
        hidden, table, (((1,), (1,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32)


def abstract_llama(config: LlamaConfig, dtype: DTypeLike) -> Llama:
  """A model whose parameters are shapes and dtypes only; nothing is allocated."""
  return nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
