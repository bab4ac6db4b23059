"""Tells models apart without reading all of their weights."""

import hashlib

import jax
import numpy as np
from flax import nnx

from kvc_jax.model.layers import DecoderLayer
from kvc_jax.model.llama import Llama

_SAMPLES_PER_AXIS = 16


def fingerprint(model: Llama) -> str:
  """A name of the model's configuration, dtype and weights; 32 hexadecimal digits.

  Looks at some thousand evenly spaced numbers of each parameter, so it takes no time
  with large models and still sees a fine-tune.

  Args:
    model: with stacked layers, as `load_model` gives it.

  Raises:
    ValueError: the layers are no longer stacked.
  """
  if not isinstance(model.layers, DecoderLayer):
    raise ValueError("take the fingerprint before unstack_layers")
  digest = hashlib.sha256(repr(model.config).encode())
  for path, value in sorted(nnx.to_flat_state(nnx.state(model)), key=lambda item: item[0]):
    samples = np.ascontiguousarray(_samples(value[...]))
    digest.update(f"{'.'.join(map(str, path))} {samples.dtype.name} {value.shape}".encode())
    digest.update(samples.view(np.uint8))
  return digest.hexdigest()[:32]


def _samples(array: jax.Array) -> jax.Array:
  return array[tuple(slice(None, None, max(1, size // _SAMPLES_PER_AXIS)) for size in array.shape)]
