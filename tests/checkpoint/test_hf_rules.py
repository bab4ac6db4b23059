"""The name table covers the model exactly."""

import jax.numpy as jnp
import pytest
from flax import nnx
from hf_folders import hf_config, hf_shapes

from kvc_jax.checkpoint.hf_reader import param_shapes
from kvc_jax.checkpoint.hf_rules import is_ignorable, rules_for
from kvc_jax.config import LlamaConfig
from kvc_jax.model.llama import abstract_llama

CONFIGS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all_biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_each_parameter_has_one_rule_and_each_tensor_one_place(changes):
  raw = hf_config(**changes)
  config = LlamaConfig.from_hf(raw)
  rules = rules_for(config)
  model_paths = [path for path, _ in nnx.to_flat_state(nnx.state(abstract_llama(config, jnp.float32)))]
  assert sorted(rule.path for rule in rules) == sorted(model_paths)
  keys = [key for rule in rules for key in rule.keys(config.num_layers)]
  assert sorted(keys) == sorted(hf_shapes(raw))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_tensor_shapes_are_hugging_faces(changes):
  raw = hf_config(**changes)
  config = LlamaConfig.from_hf(raw)
  shapes = param_shapes(config)
  for rule in rules_for(config):
    for key in rule.keys(config.num_layers):
      assert rule.tensor_shape(shapes[rule.path]) == hf_shapes(raw)[key], key


def test_only_buffers_and_a_tied_head_may_be_left_unread():
  plain, tied = (LlamaConfig.from_hf(hf_config(tie_word_embeddings=tie)) for tie in (False, True))
  assert is_ignorable("model.layers.11.self_attn.rotary_emb.inv_freq", plain)
  assert is_ignorable("model.rotary_emb.inv_freq", plain)
  assert is_ignorable("lm_head.weight", tied)
  assert not is_ignorable("lm_head.weight", plain)
  assert not is_ignorable("model.layers.0.self_attn.q_proj.bias", plain)
  assert not is_ignorable("model.layers.0.self_attn.rotary_emb.inv_freq.extra", plain)
