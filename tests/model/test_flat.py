"""A flattened model is the model, and jit knows two of them as one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvc_jax.config import LlamaConfig, RopeConfig
from kvc_jax.model.flat import FlatModel
from kvc_jax.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    rms_norm_eps=1e-5, rope=RopeConfig())


def test_the_same_logits_and_one_compile():
  first, second = (Llama(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(seed)) for seed in (0, 1))

  @jax.jit
  def logits(flat, hidden):
    return flat.model().logits(hidden)

  hidden = jnp.ones((1, 8))
  for model in (first, second):
    np.testing.assert_array_equal(logits(FlatModel.of(model), hidden), jax.jit(Llama.logits)(model, hidden))
  assert (logits(FlatModel.of(first), hidden) != logits(FlatModel.of(second), hidden)).any()
  assert logits._cache_size() == 1
