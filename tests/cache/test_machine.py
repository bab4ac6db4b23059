"""Random sequences of allocate, prefill, decode, evict and release against block-free models.

A second machine holds, adopts, unshares and drops as well, in a cache whose blocks may be shared.
After every operation all KV slots that hold nothing are poisoned with NaN and
the invariants are checked, so a read of what is not held cannot go unseen.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
from builders import held_kvs, poison

from kvc_jax.attention.decode import decode_attention
from kvc_jax.attention.prefill import init_observation, prefill_attention, score_observed
from kvc_jax.cache.alloc import allocate, release
from kvc_jax.cache.share import adopt, drop, hold, unshare
from kvc_jax.cache.state import CacheConfig, check_invariants, init_cache
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_window import WindowAttention
from kvc_jax.eviction.step import evict

CONFIG = CacheConfig(
    num_layers=2, num_slots=3, num_kv_heads=2, head_dim=4, num_blocks=40, max_blocks_per_head=6, block_size=4,
    dtype=jnp.float32, num_heads=4)
GROUP, CHUNK, SCALE = 2, 16, 0.5
RULES = (WindowAttention(queries=4, pooling=3), FullAttention(buffer=2))


@functools.partial(jax.jit, static_argnames="rule")
def _prefill(state, slot, count, qkv, rule):
  state, ok = allocate(state, slot[None], count[None], max_count=CHUNK)
  count = jnp.where(ok[0], count, 0)
  observation = init_observation(rule, CONFIG.num_layers, CONFIG.num_kv_heads * GROUP, CONFIG.head_dim, jnp.float32)
  outs = []
  for layer in range(CONFIG.num_layers):
    out, state, observation = prefill_attention(
        state, observation, jnp.int32(layer), *(x[layer] for x in qkv), slot=slot, count=count, scale=SCALE, rule=rule)
    outs.append(out)
  return jnp.stack(outs), ok[0], score_observed(state, observation, slot, scale=SCALE, rule=rule)


@functools.partial(jax.jit, static_argnames="rule")
def _decode(state, active, qkv, rule):
  slots = jnp.arange(CONFIG.num_slots)
  state, ok = allocate(state, slots, active.astype(jnp.int32), max_count=1)
  ok &= active
  outs = []
  for layer in range(CONFIG.num_layers):
    out, state = decode_attention(
        state, jnp.int32(layer), *(x[layer] for x in qkv), active=ok, scale=SCALE, rule=rule)
    outs.append(out)
  return jnp.stack(outs), ok, state


_evict = jax.jit(evict, static_argnames=("rule", "allocation"))
_release = jax.jit(release)
_hold, _adopt, _unshare, _drop = (jax.jit(f) for f in (hold, adopt, unshare, drop))


def _random_qkv(seed, tokens):
  rng = np.random.default_rng(seed)
  heads = CONFIG.num_kv_heads
  shapes = ((CONFIG.num_layers, tokens, n, CONFIG.head_dim) for n in (heads * GROUP, heads, heads))
  return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


class CacheMachine(stateful.RuleBasedStateMachine):
  """The cache beside `oracles.CacheModel` and a dictionary of every KV written."""

  config, model_type = CONFIG, oracles.CacheModel

  @stateful.initialize(rule=st.sampled_from(RULES))
  def start(self, rule):
    self.held = {}
    self._take(init_cache(self.config))
    self.model = self.model_type(
        num_layers=CONFIG.num_layers, kv_heads=CONFIG.num_kv_heads, block_size=CONFIG.block_size,
        total_blocks=CONFIG.num_blocks - 1, max_blocks=CONFIG.max_blocks_per_head)
    self.written = {}
    self.scoring = rule

  def _take(self, state):
    self.state = poison(state, self.held.values())

  def _owns(self, slot):
    """Whether a slot's blocks may be written to."""
    return True

  @stateful.rule(slot=st.integers(0, 2), count=st.integers(1, CHUNK), seed=st.integers(0, 2**16))
  def prefill(self, slot, count, seed):
    if not self._owns(slot):
      return
    qkv = _random_qkv(seed, CHUNK)
    first = self.model.num_tokens.get(slot, 0)
    out, ok, state = _prefill(self.state, jnp.int32(slot), jnp.int32(count), qkv, self.scoring)
    assert bool(ok) == self.model.allocate(slot, count)
    self._take(state)
    if not ok:
      return
    self._write(slot, range(first, first + count), qkv)
    for row in range(count):
      self._check_attention(slot, first + row, qkv[0][:, row], np.asarray(out)[:, row])

  @stateful.rule(active=st.lists(st.booleans(), min_size=3, max_size=3), seed=st.integers(0, 2**16))
  def decode(self, active, seed):
    active = [a and slot in self.model.positions and self._owns(slot) for slot, a in enumerate(active)]
    qkv = _random_qkv(seed, CONFIG.num_slots)
    out, ok, state = _decode(self.state, np.array(active), qkv, self.scoring)
    self._take(state)
    for slot in range(CONFIG.num_slots):
      if not active[slot]:
        assert not ok[slot]
        assert not np.asarray(out)[:, slot].any()
      elif ok[slot]:
        assert self.model.allocate(slot, 1)
        newest = self.model.num_tokens[slot] - 1
        self._write(slot, [newest], [x[:, slot : slot + 1] for x in qkv])
        self._check_attention(slot, newest, qkv[0][:, slot], np.asarray(out)[:, slot])
    refused = [s for s in range(CONFIG.num_slots) if active[s] and not ok[s]]
    # Blocks go in slot order: the first that was refused does not fit even now.
    assert not refused or not self.model.allocate(refused[0], 1)

  @stateful.rule(
      slot=st.integers(0, 2), budget=st.integers(1, 24), window=st.integers(0, 8), sinks=st.integers(0, 3),
      allocation=st.sampled_from(["all", "layer", "head"]))
  def evict(self, slot, budget, window, sinks, allocation):
    if not self._owns(slot):
      return
    before = held_kvs(self.state, slot)
    rows = np.array([[slot, budget, window, sinks]], np.int32).T
    state, report = _evict(self.state, *rows, rule=self.scoring, allocation=allocation)
    self._take(state)
    kept, _ = oracles.evict(
        before, num_tokens=self.model.num_tokens.get(slot, 0), window=window, sinks=sinks,
        block_size=CONFIG.block_size, allowed=budget, allocation=allocation)
    assert held_kvs(self.state, slot) == kept
    if slot in self.model.positions:
      freed = self.model.evict(slot, [[[p for p, _ in head] for head in layer] for layer in kept])
      assert int(report.freed_blocks[0]) == freed

  @stateful.rule(slot=st.integers(0, 2))
  def release(self, slot):
    self._take(_release(self.state, jnp.array([slot])))
    self.model.release(slot)

  @stateful.invariant()
  def holds(self):
    if hasattr(self, "state"):
      check_invariants(self.state, self.held.values())
      self.model.check_invariants()
      assert int(self.state.free_count) == self.model.blocks_free
      for slot, held in self.model.positions.items():
        assert [[[p for p, _ in head] for head in layer] for layer in held_kvs(self.state, slot)] == held

  def _write(self, slot, positions, qkv):
    for row, position in enumerate(positions):
      for layer in range(CONFIG.num_layers):
        self.written[slot, layer, position] = qkv[1][layer, row], qkv[2][layer, row]

  def _check_attention(self, slot, position, q, out):
    """The output of one token [L, H*G, D] equals dense attention over what its heads hold."""
    for layer, held in enumerate(self.model.positions[slot]):
      seen = [[p for p in head if p <= position] for head in held]
      keys = [[self.written[slot, layer, p][0][h] for p in ps] for h, ps in enumerate(seen)]
      values = [[self.written[slot, layer, p][1][h] for p in ps] for h, ps in enumerate(seen)]
      np.testing.assert_allclose(out[layer], oracles.attention_ragged(q[layer], keys, values, SCALE), atol=1e-5)


class SharingMachine(CacheMachine):
  """The same, and sequences that share blocks; what is held stays as it was, bit for bit."""

  config, model_type = dataclasses.replace(CONFIG, sharing=True), oracles.SharedCacheModel

  @stateful.initialize()
  def start_holding(self):
    self.of_held = {}  # name -> (the KVs written, scores, content)

  def _owns(self, slot):
    state, ok = _unshare(self.state, jnp.int32(slot))
    assert bool(ok) == self.model.unshare(slot)
    self._take(state)
    return bool(ok)

  @stateful.rule(slot=st.integers(0, 2), name=st.sampled_from("abc"))
  def hold(self, slot, name):
    if slot not in self.model.positions or name in self.held:
      return
    state, self.held[name] = _hold(self.state, jnp.int32(slot))
    self._take(state)
    self.model.hold(name, slot)
    written = {(layer, p): kv for (s, layer, p), kv in self.written.items() if s == slot}
    self.of_held[name] = written, held_kvs(state, slot), self._content(name)

  @stateful.rule(name=st.sampled_from("abc"), slot=st.integers(0, 2))
  def adopt(self, name, slot):
    if name not in self.held:
      return
    state, ok = _adopt(self.state, self.held[name], jnp.int32(slot))
    assert bool(ok) == (slot not in self.model.positions and self.model.adopt(name, slot))
    self._take(state)
    if ok:
      written, kvs, _ = self.of_held[name]
      self.written |= {(slot, *at): kv for at, kv in written.items()}
      assert held_kvs(self.state, slot) == kvs

  @stateful.rule(slot=st.integers(0, 2))
  def unshare(self, slot):
    self._owns(slot)

  @stateful.rule(name=st.sampled_from("abc"))
  def drop(self, name):
    if name in self.held:
      state = _drop(self.state, self.held.pop(name))
      self._take(state)
      self.model.drop(name)

  @stateful.rule(slots=st.permutations([0, 1, 2]))
  def release_all(self, slots):
    self._take(_release(self.state, jnp.array(slots)))
    for slot in slots:
      self.model.release(slot)

  @stateful.invariant()
  def nothing_that_is_held_changes(self):
    for name in getattr(self, "held", ()):
      for now, before in zip(self._content(name), self.of_held[name][2], strict=True):
        np.testing.assert_array_equal(now, before)

  def _content(self, name):
    """KVs, scores and positions of what is held, in its order."""
    held, state = self.held[name], self.state
    live = np.arange(held.tables.shape[-1] * state.block_size) < np.asarray(held.lengths)[..., None]
    arrays = (np.asarray(state.kv)[held.tables].swapaxes(3, 4), np.asarray(state.scores)[held.tables],
              np.asarray(state.positions)[held.tables])
    out = [arrays[0].reshape(*live.shape[:2], -1, *arrays[0].shape[4:])[live]]
    return out + [a.reshape(live.shape)[live] for a in arrays[1:]]


CacheMachine.TestCase.settings = hypothesis.settings(
    max_examples=25, stateful_step_count=20, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large])
TestCacheMachine = CacheMachine.TestCase
SharingMachine.TestCase.settings = hypothesis.settings(CacheMachine.TestCase.settings, max_examples=18)
TestSharingMachine = SharingMachine.TestCase
