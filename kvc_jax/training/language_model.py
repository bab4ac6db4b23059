"""A Llama as a function of its parameters that can be trained: dense causal attention, loss and an Adam step."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from kvc_jax.config import LlamaConfig
from kvc_jax.model.llama import Llama
from kvc_jax.training.recall_batches import ANSWER, LOOKUP, TEXT, WEIGHTS

Params = dict[str, jax.Array]
"""f32 parameters by dotted path; layers are stacked on the leading axis."""

Implementation = Literal["cudnn", "xla"]


_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


class Progress(NamedTuple):
  """Where training stands: parameters, and what Adam knows of their gradients."""

  params: Params
  adam: optax.ScaleByAdamState

  @classmethod
  def start(cls, params: Params) -> "Progress":
    """Before the first step."""
    return cls(params, _ADAM.init(params))

  def step(self, grads: Params, rate: jax.Array, *, clip: float) -> "tuple[Progress, jax.Array]":
    """One step of Adam with gradients cut to a norm of `clip`; also their norm before."""
    norm = optax.tree.norm(grads)
    grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
    updates, adam = _ADAM.update(grads, self.adam)
    return Progress(jax.tree.map(lambda param, update: param - rate * update, self.params, updates), adam), norm


def init_params(config: LlamaConfig, seed: int) -> Params:
  """Random f32 parameters; what is added to the residual stream starts 1 / sqrt(2 L) as large."""
  params = jax.jit(lambda: flat_params(Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))))()
  shrink = (2 * config.num_layers) ** -0.5
  return {
      path: value * shrink if path.endswith(("o_proj.kernel", "down_proj.kernel")) else value
      for path, value in params.items()}


def flat_params(model: Llama) -> Params:
  """A model's parameters by dotted path."""
  return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
  """Steps of one model; bf16 products with f32 parameters.

  Attributes:
    config: of the model.
    attention: "cudnn" (NVIDIA GPUs) or "xla".
    clip: largest norm of a gradient.
    compute_dtype: of activations and products.
  """

  config: LlamaConfig
  attention: Implementation
  clip: float = 1.0
  compute_dtype: Any = jnp.bfloat16

  def logits(self, params: Params, tokens: Int[Array, "batch length"]) -> Float[Array, "batch*length vocab"]:
    """Next-token logits, f32 [B * T, V]."""
    batch, length = tokens.shape
    model = self._model(params)

    def attend(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, state: Any) -> tuple[jax.Array, Any]:
      del layer
      rows = [x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v)]
      out = jax.nn.dot_product_attention(*rows, is_causal=True, implementation=self.attention)
      return out.reshape(q.shape), state

    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    x = _look_up(model.embed.embedding[...], tokens.reshape(-1))
    hidden, _ = model.run_layers(x, positions, attend)
    return model.logits(hidden)

  def loss(
      self, params: Params, tokens: Int[Array, "batch length"], codes: Int[Array, "batch length"],
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean of the tokens' cross-entropy, and figures for the log.

    Args:
      params: f32.
      tokens: [B, T].
      codes: [B, T]: how much the prediction from each place counts; see `recall_batches`.
    """
    logits, targets, codes = self.logits(params, tokens), _next(tokens), codes.reshape(-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    weights = jnp.asarray(WEIGHTS)[codes]
    loss = jnp.sum(losses * weights) / jnp.sum(weights)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    figures = {"loss": loss, "text_loss": _mean(losses, codes == TEXT), "lookup_loss": _mean(losses, codes == LOOKUP),
               "answer_hits": _mean(hits, codes >= ANSWER), "lookup_hits": _mean(hits, codes == LOOKUP)}
    return loss, figures

  @functools.cached_property
  def step(self) -> Any:
    """Jitted (Progress, tokens, codes, learning rate f32 []) -> (Progress, figures); the first argument is donated."""
    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: Progress, tokens: jax.Array, codes: jax.Array, rate: jax.Array
    ) -> tuple[Progress, dict[str, jax.Array]]:
      grads, figures = jax.grad(self.loss, has_aux=True)(state.params, tokens.astype(jnp.int32), codes)
      state, norm = state.step(grads, rate, clip=self.clip)
      return state, {**figures, "gradient": norm}

    return step

  @functools.cached_property
  def all_right(self) -> Any:
    """Jitted (params, tokens, codes) -> bool [B]: whether greedy decoding would give every token of the answer."""
    @jax.jit
    def all_right(params: Params, tokens: jax.Array, codes: jax.Array) -> jax.Array:
      tokens = tokens.astype(jnp.int32)
      hits = jnp.argmax(self.logits(params, tokens), axis=-1) == _next(tokens)
      return jnp.all(hits.reshape(codes.shape) | (codes < ANSWER), axis=1)

    return all_right

  def _model(self, params: Params) -> Llama:
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(self.config, dtype=self.compute_dtype, rngs=nnx.Rngs(0))))
    values = {tuple(path.split(".")): value.astype(self.compute_dtype) for path, value in params.items()}
    filled = nnx.to_flat_state(state)
    return nnx.merge(graph, nnx.from_flat_state(
        [(path, variable.replace(values[tuple(map(str, path))])) for path, variable in filled]))


def _next(tokens: jax.Array) -> jax.Array:
  return jnp.roll(tokens, -1, axis=1).reshape(-1)


def _mean(values: jax.Array, chosen: jax.Array) -> jax.Array:
  return jnp.sum(values * chosen) / jnp.maximum(jnp.sum(chosen), 1)


@jax.custom_vjp
def _look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
  return table[tokens]


def _look_up_forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
  return table[tokens], (tokens, table.shape[0])


def _look_up_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, Any]:
  # A scatter would add up a common token's thousands of rows in bf16; a product adds in f32, and in a fixed order.
  tokens, rows = saved
  ones = jax.nn.one_hot(tokens, rows, dtype=gradient.dtype)
  summed = jax.lax.dot_general(ones, gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
  return summed.astype(gradient.dtype), np.zeros(tokens.shape, jax.dtypes.float0)


_look_up.defvjp(_look_up_forward, _look_up_backward)
