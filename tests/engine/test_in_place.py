"""The pool is updated in place: read off the compiled steps, nothing is run.

A pool of 16 sequences of 4096 tokens in the head shape of Llama-3.1-8B.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.attention.prefill import init_observation
from kvc_jax.cache.share import hold
from kvc_jax.cache.state import CacheConfig, init_cache
from kvc_jax.config import LlamaConfig, RopeConfig
from kvc_jax.engine import steps
from kvc_jax.eviction.score_critical import CriticalKV
from kvc_jax.eviction.score_expected import ExpectedAttention
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_keydiff import KeyDiff
from kvc_jax.eviction.score_tova import TOVA
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.model.llama import abstract_llama
from kvc_jax.model.rope import inverse_frequencies
from kvc_jax.sampling import SamplingArrays

SLOTS, TOKENS, BLOCK = 16, 4096, 16
MODEL = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=32, num_kv_heads=8, head_dim=128,
    rms_norm_eps=1e-5, rope=RopeConfig())
CACHE = CacheConfig(
    num_layers=MODEL.num_layers, num_slots=SLOTS, num_kv_heads=MODEL.num_kv_heads, head_dim=MODEL.head_dim,
    num_blocks=SLOTS * MODEL.num_layers * MODEL.num_kv_heads * TOKENS // BLOCK + 1, block_size=BLOCK,
    max_blocks_per_head=TOKENS // BLOCK, dtype=jnp.bfloat16, num_heads=MODEL.num_heads)
STATE = jax.eval_shape(lambda: init_cache(CACHE))
SHARED = jax.eval_shape(lambda: init_cache(dataclasses.replace(CACHE, sharing=True)))
HELD = jax.eval_shape(hold, SHARED, np.int32(0))[1]
LLAMA = abstract_llama(MODEL, jnp.bfloat16)


def _ints(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _bytes(tree):
  return sum(np.prod(x.shape, dtype=np.int64) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _decode(rule):
  active = jax.ShapeDtypeStruct((SLOTS,), jnp.bool_)
  return steps.decode_step.lower(LLAMA, STATE, _ints(SLOTS), active, rule=rule)


def _sampling(rows):
  floats = jax.ShapeDtypeStruct((rows,), jnp.float32)
  return SamplingArrays(floats, _ints(rows), floats, floats, jax.ShapeDtypeStruct((rows,), jnp.uint32), _ints(rows))


def _rows(steps_per_sync):
  flags = jax.ShapeDtypeStruct((SLOTS,), jnp.bool_)
  return steps.DecodeRows(
      _ints(SLOTS), _ints(SLOTS), _ints(SLOTS, steps_per_sync), _ints(SLOTS, 4), _sampling(SLOTS), flags)


def _decode_loop(rule, steps_per_sync=8):
  return steps.decode_loop.lower(LLAMA, STATE, _rows(steps_per_sync), _ints(), rule=rule)


def _prefill(rule, decode_rule=None):
  observation = jax.eval_shape(
      lambda: init_observation(rule, MODEL.num_layers, MODEL.num_heads, MODEL.head_dim, jnp.bfloat16))
  chunk = steps.PromptChunk(_ints(256), _ints(), _ints(), _sampling(1), jax.ShapeDtypeStruct((1,), jnp.bool_))
  return steps.mixed_step.lower(LLAMA, STATE, observation, chunk, _rows(1), rule=rule, decode_rule=decode_rule)


def _evict(allocation, rule=None, mass=False):
  rows = (_ints(4),) * 5
  share = jax.ShapeDtypeStruct((4,), jnp.float32) if mass else None
  model = LLAMA if isinstance(rule, CriticalKV) else None
  rows = steps.EvictRows(*rows, _ints(4, 8, 2), _ints(4), share)
  return steps.evict.lower(STATE, rows, rule=rule or WindowAttention(), allocation=allocation, model=model)


def _score(rule=None):
  rule = rule or WindowAttention()
  frequencies = inverse_frequencies(MODEL.rope, MODEL.head_dim)
  observation = jax.eval_shape(
      lambda: init_observation(rule, MODEL.num_layers, MODEL.num_heads, MODEL.head_dim, jnp.bfloat16, frequencies))
  return steps.score_prompt.lower(STATE, observation, _ints(), scale=0.1, rule=rule)


LOWERED = {
    "decode": lambda: _decode(None),
    "decode with scores": lambda: _decode(FullAttention()),
    "decode several": lambda: _decode_loop(None),
    "decode several with scores": lambda: _decode_loop(FullAttention()),
    "prefill": lambda: _prefill(None),
    "prefill with all scores": lambda: _prefill(FullAttention(), FullAttention()),
    "score the prompt": _score,
    "evict over all": lambda: _evict("all"),
    "evict per head": lambda: _evict("head"),
    "evict in a pyramid": lambda: _evict("pyramid"),
    "evict by mass": lambda: _evict("all", mass=True),
    "evict by keys": lambda: _evict("all", KeyDiff()),
    "evict by the last token": lambda: _evict("layer", TOVA()),
    "evict by values": lambda: _evict("head", CriticalKV()),
    "score by moments": lambda: _score(ExpectedAttention()),
    "release": lambda: steps.release.lower(STATE, _ints(1)),
    "release what is shared": lambda: steps.release.lower(SHARED, _ints(2)),
    "hold": lambda: steps.hold.lower(SHARED, _ints()),
    "adopt": lambda: steps.adopt.lower(SHARED, HELD, _ints()),
    "unshare": lambda: steps.unshare.lower(SHARED, _ints()),
    "drop": lambda: steps.drop.lower(SHARED, HELD),
}


@pytest.mark.parametrize("name", LOWERED)
def test_pool_is_aliased_and_temporaries_are_small(name):
  memory = LOWERED[name]().compile().memory_analysis()
  pool = _bytes((STATE.kv, STATE.scores, STATE.positions))
  assert memory.alias_size_in_bytes >= pool
  assert memory.temp_size_in_bytes < 0.06 * pool


def test_without_donation_a_second_pool_appears():
  """The measure above can fail: undonated, the same step does not alias the pool."""
  undonated = jax.jit(lambda state, slots: steps.release(state, slots))
  memory = undonated.lower(STATE, _ints(1)).compile().memory_analysis()
  assert memory.alias_size_in_bytes == 0
  assert memory.output_size_in_bytes >= _bytes(STATE.kv)
