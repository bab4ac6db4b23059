"""The model against transformers and torch, run beside it, on random shapes.

Skipped where torch is not installed; the golden files then stand for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import dense_attend

from kvc_jax.checkpoint.store import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # largest difference of a logit, in f32; logits are of order 1 to 10


def _random_config(rng: np.random.Generator):
  kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
  numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": int(rng.choice([16, 32]))}
  rope = {"rope_theta": float(rng.choice([1e4, 5e5])), **[
      {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.5}, {"rope_type": "llama3", **numbers},
  ][rng.integers(3)]}
  shape = {
      "vocab_size": int(rng.integers(20, 80)), "hidden_size": kv_heads * group * int(rng.integers(4, 9)),
      "intermediate_size": int(rng.integers(10, 60)), "num_hidden_layers": int(rng.integers(1, 4)),
      "num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads,
      "head_dim": 2 * int(rng.integers(2, 20)), "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-2])),
      "tie_word_embeddings": bool(rng.integers(2)), "rope_parameters": rope, "max_position_embeddings": 128,
      "attn_implementation": "eager",
  }
  if rng.integers(3) == 0:
    return transformers.MistralConfig(sliding_window=None, **shape)
  return transformers.LlamaConfig(
      attention_bias=bool(rng.integers(2)), mlp_bias=bool(rng.integers(2)), **shape)


def _random_model(rng: np.random.Generator):
  model = transformers.AutoModelForCausalLM.from_config(_random_config(rng)).float().eval()
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      noise = torch.from_numpy(rng.normal(size=parameter.shape).astype(np.float32))
      parameter.copy_(1 + 0.3 * noise if "norm" in key else 0.25 * noise)
  return model


@pytest.mark.parametrize("seed", range(6))
def test_logits(tmp_path, seed):
  torch.set_num_threads(1)
  rng = np.random.default_rng(seed)
  theirs = _random_model(rng)
  theirs.save_pretrained(tmp_path)
  tokens = rng.integers(0, theirs.config.vocab_size, int(rng.integers(1, 100)))
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()

  ours = load_model(tmp_path, jnp.float32)

  @jax.jit
  def logits(tokens):
    hidden, _ = ours(tokens, jnp.arange(len(tokens), dtype=jnp.int32), dense_attend)
    return ours.logits(hidden)

  np.testing.assert_allclose(logits(jnp.asarray(tokens, jnp.int32)), expected, rtol=0, atol=TOLERANCE)
