"""Llama-family decoder: stacked layers under one scan, or apart; attention as a function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvc_jax.config import LlamaConfig
from kvc_jax.model.layers import Attend, DecoderLayer, RMSNorm
from kvc_jax.model.rope import inverse_frequencies


class Llama(nnx.Module):
  """Llama 2, 3, 3.1, 3.2 and Mistral (no sliding window).

  Parameters of all layers are stacked on a leading axis L, as in a checkpoint, and
  run under one scan, so a layer compiles once. On a GPU that scan copies each layer's
  slice of them, which more than doubles the time of a decode step: `unstack_layers`
  gives every layer its own. The caller's `state` (a cache, or None) goes from layer to
  layer.
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
    return self.run_layers(self.embed(tokens), positions, attend, state)

  def run_layers(
      self,
      x: Float[Array, "tokens hidden"],
      positions: Int[Array, " tokens"],
      attend: Attend,
      state: Any = None,
  ) -> tuple[Float[Array, "tokens hidden"], Any]:
    """The same from the tokens' embeddings [T, E] on."""
    frequencies = inverse_frequencies(self.config.rope, self.config.head_dim)
    run = _scan_layers if isinstance(self.layers, DecoderLayer) else _run_each_layer
    x, state = run(self.layers, x, positions, frequencies, attend, state)
    return self.norm(x), state

  def logits(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
    """Next-token logits, f32 [T, V]."""
    table = (self.embed if self.lm_head is None else self.lm_head).embedding[...]
    precision = lax.Precision.HIGHEST if table.dtype == jnp.float32 else None
    return lax.dot_general(
        hidden, table, (((1,), (1,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32)


def _scan_layers(
    layers: DecoderLayer, x: jax.Array, positions: jax.Array, frequencies: np.ndarray, attend: Attend, state: Any,
) -> tuple[jax.Array, Any]:
  graph, stacked = nnx.split(layers)

  def body(carry, inputs):
    x, state = carry
    layer, params = inputs
    x, state = nnx.merge(graph, params)(x, layer, positions, frequencies, attend, state)
    return (x, state), None

  num_layers = len(jax.tree.leaves(stacked)[0])
  (x, state), _ = lax.scan(body, (x, state), (jnp.arange(num_layers, dtype=jnp.int32), stacked))
  return x, state


def _run_each_layer(
    layers: nnx.List[DecoderLayer], x: jax.Array, positions: jax.Array, frequencies: np.ndarray, attend: Attend,
    state: Any,
) -> tuple[jax.Array, Any]:
  @jax.jit  # so that a layer is traced once
  def run(layer: DecoderLayer, index: jax.Array, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    return layer(x, index, positions, frequencies, attend, state)

  for index, layer in enumerate(layers):
    x, state = run(layer, jnp.asarray(index, jnp.int32), x, state)
  return x, state


def unstack_layers(model: Llama) -> Llama:
  """The same model as a GPU runs it fastest; the layers' arrays of `model` are deleted.

  Each layer has arrays of its own, and one product for queries, keys and values, and
  one for gate and up. Beside the model one stacked parameter is held twice at a time.
  """
  graph, stacked = nnx.split(model.layers)
  leaves, tree = jax.tree.flatten(stacked)
  rows = [_unstack(leaf) for leaf in leaves]
  layers = []
  for _ in range(model.config.num_layers):
    layer = nnx.merge(graph, jax.tree.unflatten(tree, [row.pop(0) for row in rows]))
    layer.merge_products()
    layers.append(layer)
  graph, params = nnx.split(model)
  apart = nnx.merge(graph, params)
  apart.layers = nnx.List(layers)
  return apart


def _unstack(stacked: jax.Array) -> list[jax.Array]:
  rows = [_row(stacked, index) for index in range(len(stacked))]
  if not isinstance(stacked, jax.core.Tracer):  # as in `abstract_llama`
    jax.block_until_ready(rows)
    stacked.delete()
  return rows


@jax.jit
def _row(stacked: jax.Array, index: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def output_projections(model: Llama) -> jax.Array | list[jax.Array]:
  """What each query head's output goes through: [L, H*G, D, E], or one [H*G, D, E] for each layer apart."""
  config = model.config

  def by_head(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(*kernel.shape[:-2], config.num_heads, config.head_dim, kernel.shape[-1])

  if isinstance(model.layers, DecoderLayer):
    return by_head(model.layers.attention.o_proj.kernel[...])
  return [by_head(layer.attention.o_proj.kernel[...]) for layer in model.layers]


def abstract_llama(config: LlamaConfig, dtype: DTypeLike, *, stacked: bool = True) -> Llama:
  """A model whose parameters are shapes and dtypes only; nothing is allocated."""
  form = (lambda model: model) if stacked else unstack_layers
  return nnx.eval_shape(lambda: form(Llama(config, dtype=dtype, rngs=nnx.Rngs(0))))
