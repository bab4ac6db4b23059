"""The model against logits that transformers computed (scripts/make_goldens.py).

Each tolerance is shown to be tight: single mistakes, one at a time, exceed it.
"""

import functools
import json
import operator
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import dense_attend
from flax import nnx
from safetensors.numpy import load_file

from kvc_jax.checkpoint.store import load_model
from kvc_jax.model.llama import Llama

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
NAMES = sorted(folder.name for folder in GOLDENS.iterdir())

# f32: the largest difference of any logit (they are of order 1 to 6); measured 3e-6 to 1.1e-5.
F32_TOLERANCE = 1e-4
# bf16: the root mean square over all logits, as a single one can be off by 0.4; measured 0.01 to
# 0.04, which is also what transformers' own bf16 differs by from its f32.
BF16_TOLERANCE = 0.08


@functools.cache
def _golden(name: str) -> dict[str, np.ndarray]:
  return load_file(GOLDENS / name / "golden.safetensors")


@functools.cache
def _model(name: str, dtype=jnp.float32) -> Llama:
  """Shared between tests, so not to be changed."""
  return load_model(GOLDENS / name, dtype)


@functools.partial(jax.jit, static_argnames=("graph", "attend"))
def _logits(graph, params, tokens, positions, attend):
  model = nnx.merge(graph, params)
  hidden, _ = model(tokens, positions, attend)
  return model.logits(hidden)


def _difference(model: Llama, name: str, attend=dense_attend, positions=None) -> np.ndarray:
  """|logit - golden logit| [T, V]."""
  golden = _golden(name)
  tokens = jnp.asarray(golden["input_ids"])
  positions = jnp.arange(len(tokens)) if positions is None else positions
  logits = _logits(*nnx.split(model), tokens, positions.astype(jnp.int32), attend)
  assert np.isfinite(logits).all()
  return np.abs(logits - golden["logits"])


def _root_mean_square(x: np.ndarray) -> float:
  return float(np.sqrt(np.mean(x * x)))


def test_goldens_are_there():
  assert len(NAMES) >= 8
  for name in NAMES:
    assert 1 < np.abs(_golden(name)["logits"]).max() < 10


@pytest.mark.parametrize("name", NAMES)
def test_logits_f32(name):
  assert _difference(_model(name), name).max() < F32_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_logits_bf16(name):
  assert _root_mean_square(_difference(_model(name, jnp.bfloat16), name)) < BF16_TOLERANCE


# --- Mutations: each must exceed the tolerance -----------------------------------------------


def _zeroed_values(layer, q, k, v, state):
  return dense_attend(layer, q, k, jnp.zeros_like(v), state)


def _swapped_key_and_value(layer, q, k, v, state):
  return dense_attend(layer, q, v, k, state)


def _swapped_kv_heads(layer, q, k, v, state):
  return dense_attend(layer, q, k[:, ::-1], v[:, ::-1], state)


def _interleaved_query_heads(layer, q, k, v, state):
  """Takes query head g*H + h for KV head h."""
  (tokens, _, head_dim), (_, kv_heads, _) = q.shape, k.shape
  q = q.reshape(tokens, -1, kv_heads, head_dim).swapaxes(1, 2).reshape(q.shape)
  out, state = dense_attend(layer, q, k, v, state)
  return out.reshape(tokens, kv_heads, -1, head_dim).swapaxes(1, 2).reshape(out.shape), state


def _first_token_unseen(layer, q, k, v, state):
  """The oldest KV is lost to all queries but its own."""
  full, state = dense_attend(layer, q, k, v, state)
  rest, state = dense_attend(layer, q[1:], k[1:], v[1:], state)
  return full.at[1:].set(rest), state


def _no_attention_scale(layer, q, k, v, state):
  return dense_attend(layer, q * q.shape[-1] ** 0.5, k, v, state)


def _second_layer_without_attention(layer, q, k, v, state):
  """As if its KVs had gone to another layer."""
  out, state = dense_attend(layer, q, k, v, state)
  return jnp.where(layer == 1, 0, out), state


_WRONG_ATTENTION = [
    _zeroed_values, _swapped_key_and_value, _swapped_kv_heads, _interleaved_query_heads,
    _first_token_unseen, _no_attention_scale, _second_layer_without_attention,
]


@pytest.mark.parametrize("attend", _WRONG_ATTENTION, ids=lambda f: f.__name__.strip("_"))
def test_wrong_attention_shows(attend):
  assert _difference(_model("llama3"), "llama3", attend).max() > F32_TOLERANCE
  in_bf16 = _difference(_model("llama3", jnp.bfloat16), "llama3", attend)
  assert _root_mean_square(in_bf16) > BF16_TOLERANCE


@pytest.mark.parametrize("name", ["llama3", "llama31", "head_dim_10"])
@pytest.mark.parametrize("positions", [
    lambda n: jnp.arange(n) + (jnp.arange(n) >= n // 2),  # a chunk that starts one too late
    lambda n: jnp.maximum(jnp.arange(n) - 1, 0),
    lambda n: 2 * jnp.arange(n),
    lambda n: jnp.zeros(n, jnp.int32),
], ids=["chunk shifted", "shifted", "stretched", "none"])
def test_wrong_positions_show(name, positions):
  tokens = len(_golden(name)["input_ids"])
  assert _difference(_model(name), name, positions=positions(tokens)).max() > F32_TOLERANCE


@pytest.mark.parametrize(("name", "changes"), [
    ("eps", {"rms_norm_eps": 1e-5}),
    ("eps", {"rms_norm_eps": 0.06}),
    ("llama2", {"rms_norm_eps": 1e-6}),
    ("llama3", {"rope_parameters": {"rope_theta": 10_000.0}}),
    ("mistral", {"rope_parameters": {"rope_theta": 10_000.0}}),
    ("linear", {"rope_parameters": {"rope_type": "default"}}),
    ("linear", {"rope_parameters": {"factor": 4.5}}),
    ("llama31", {"rope_parameters": {"rope_type": "default"}}),
    ("llama31", {"rope_parameters": {"rope_type": "linear"}}),
    ("llama31", {"rope_parameters": {"factor": 9.0}}),
    ("llama31", {"rope_parameters": {"low_freq_factor": 1.5}}),
    ("llama31", {"rope_parameters": {"high_freq_factor": 3.0}}),
    ("llama31", {"rope_parameters": {"original_max_position_embeddings": 8192}}),
    ("llama32_tied", {"rope_parameters": {"rope_type": "default"}}),
    ("llama32_tied", {"rope_parameters": {"factor": 8.0}}),
], ids=lambda value: value if isinstance(value, str) else json.dumps(value))
def test_wrong_config_shows(tmp_path, name, changes):
  folder = shutil.copytree(GOLDENS / name, tmp_path / name)
  config = json.loads((folder / "config.json").read_text())
  for key, value in changes.items():
    config[key] = {**config[key], **value} if isinstance(value, dict) else value
  (folder / "config.json").write_text(json.dumps(config))
  assert _difference(load_model(folder, jnp.float32), name).max() > F32_TOLERANCE


@pytest.mark.parametrize(("name", "parameter", "change"), [
    ("llama2", "norm.weight", jnp.ones_like),
    ("llama2", "layers.input_norm.weight", jnp.ones_like),
    ("llama2", "layers.post_attention_norm.weight", jnp.ones_like),
    ("llama2", "layers.mlp.gate_proj.kernel", lambda x: x[::-1]),  # layers in reverse
    ("mqa", "layers.attention.v_proj.kernel", jnp.zeros_like),
    ("llama3", "lm_head.embedding", lambda x: jnp.roll(x, 1, axis=0)),
    ("llama32_tied", "embed.embedding", lambda x: jnp.roll(x, 1, axis=0)),
    ("biases", "layers.attention.q_proj.bias", jnp.zeros_like),
    ("biases", "layers.attention.k_proj.bias", jnp.zeros_like),
    ("biases", "layers.attention.v_proj.bias", jnp.zeros_like),
    ("biases", "layers.attention.o_proj.bias", jnp.zeros_like),
    ("biases", "layers.mlp.gate_proj.bias", jnp.zeros_like),
    ("biases", "layers.mlp.up_proj.bias", jnp.zeros_like),
    ("biases", "layers.mlp.down_proj.bias", jnp.zeros_like),
])
def test_wrong_weights_show(name, parameter, change):
  model = load_model(GOLDENS / name, jnp.float32)
  weight = operator.attrgetter(parameter)(model)
  weight[...] = change(weight[...])
  assert _difference(model, name).max() > F32_TOLERANCE


def test_all_positions_may_move_together():
  """RoPE is relative: a prompt that starts at 17 has the logits of one that starts at 0."""
  positions = 17 + jnp.arange(len(_golden("llama31")["input_ids"]))
  assert _difference(_model("llama31"), "llama31", positions=positions).max() < F32_TOLERANCE
