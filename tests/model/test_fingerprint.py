"""Models are told apart by shape, dtype and weights."""

import pathlib

import jax.numpy as jnp
import pytest
from flax import nnx

from kvc_jax.checkpoint.store import load_model
from kvc_jax.model.fingerprint import fingerprint
from kvc_jax.model.llama import unstack_layers

STORIES = pathlib.Path(__file__).parents[2] / "assets" / "stories260K"


def test_the_same_folder_has_the_same_fingerprint():
  assert fingerprint(load_model(STORIES)) == fingerprint(load_model(STORIES))


def test_another_dtype_or_a_small_change_of_the_weights_has_another():
  model = load_model(STORIES, dtype="float32")
  before = fingerprint(model)
  assert before != fingerprint(load_model(STORIES, dtype="bfloat16"))
  state = nnx.state(model)
  for path, value in nnx.to_flat_state(state):
    changed = nnx.from_flat_state({path: nnx.Param(value[...] + 1e-3)})
    kept = nnx.from_flat_state({path: nnx.Param(jnp.copy(value[...]))})
    nnx.update(model, changed)
    assert fingerprint(model) != before, path
    nnx.update(model, kept)
  assert fingerprint(model) == before


def test_layers_must_be_stacked():
  with pytest.raises(ValueError, match="before unstack_layers"):
    fingerprint(unstack_layers(load_model(STORIES)))
