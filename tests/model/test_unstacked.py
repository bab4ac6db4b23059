"""Layers with arrays of their own against the stacked ones under a scan."""

import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from dense import dense_attend
from flax import nnx

from kvc_jax.checkpoint.store import load_model
from kvc_jax.model.llama import abstract_llama, unstack_layers

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "biases"
TOKENS = jnp.asarray([1, 9, 4, 27, 3, 12, 5])


@jax.jit
def _logits(model):
  """Attention that tells layers apart, so that a wrong order shows."""

  def attend(layer, q, k, v, state):
    out, _ = dense_attend(layer, q, k, v, None)
    return out * (layer + 1), state + layer

  hidden, state = model(TOKENS, jnp.arange(len(TOKENS)), attend, jnp.int32(0))
  return model.logits(hidden), state


def test_unstacked_layers_give_the_same_logits():
  expected, layer_sum = _logits(load_model(GOLDEN, jnp.float32))
  apart = unstack_layers(load_model(GOLDEN, jnp.float32))
  logits, same_sum = _logits(apart)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
  assert layer_sum == same_sum == sum(range(apart.config.num_layers))
  apart.layers = nnx.List(reversed(list(apart.layers)))
  assert np.abs(_logits(apart)[0] - expected).max() > 0.01  # the comparison can fail


def test_stacked_arrays_are_freed():
  model = load_model(GOLDEN, jnp.float32)
  stacked = jax.tree.leaves(nnx.state(model.layers))
  unstack_layers(model)
  assert all(leaf.is_deleted() for leaf in stacked)


def test_no_parameter_is_held_twice():
  model = load_model(GOLDEN, jnp.float32)
  gc.collect()
  gc.disable()  # modules refer to one another
  try:
    before = sum(array.nbytes for array in jax.live_arrays())
    apart = unstack_layers(model)
    assert sum(array.nbytes for array in jax.live_arrays()) <= before
  finally:
    gc.enable()
  assert len(apart.layers) == model.config.num_layers


def test_abstract_model_can_be_unstacked():
  config = load_model(GOLDEN).config
  stacked, apart = (abstract_llama(config, jnp.bfloat16, stacked=stacked) for stacked in (True, False))
  assert len(apart.layers) == config.num_layers
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) for model in (stacked, apart)]
  assert sizes[0] == sizes[1]
