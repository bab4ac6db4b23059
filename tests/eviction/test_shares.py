"""Budgets that differ from head to head, Ada-KV's safeguard and budgets by the scores' sum, against the oracle."""

import functools

import jax
import numpy as np
import oracles
import pytest
from builders import build_cache, held_kvs

from kvc_jax.cache.state import check_invariants
from kvc_jax.eviction.profile import HeadProfile
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.shares import excess_blocks
from kvc_jax.eviction.step import evict

LAYERS, HEADS, MAX_TOKENS = 3, 2, 40
PROFILE = HeadProfile(np.random.default_rng(0).uniform(0.05, 1, (LAYERS, HEADS, 4)))


def _sequence(rng, whole):
  num_tokens = int(rng.integers(8, MAX_TOKENS + 1))
  heads = []
  for _ in range(LAYERS):
    counts = [num_tokens if whole else int(rng.integers(1, num_tokens + 1)) for _ in range(HEADS)]
    heads.append([
        [(int(p), float(np.float32(rng.exponential()))) for p in rng.permutation(num_tokens)[:n]] for n in counts])
  return num_tokens, heads


@functools.cache
def _jitted(allocation):
  return jax.jit(functools.partial(evict, rule=FullAttention(), allocation=allocation))


_excess_blocks = jax.jit(excess_blocks, static_argnums=(4, 5))


def _check(rng, allocation, block_size, *, cases=6, oracle_allocation=None, least=0, mass=None, head_blocks=None):
  """`evict` keeps what the oracle keeps; `head_blocks` and `least` are functions of (tokens, budget, protected)."""
  freed = 0
  for case in range(cases):
    num_tokens, heads = _sequence(rng, whole=case % 2 == 0)
    budget, window, sinks = int(rng.integers(4, num_tokens + 1)), int(rng.integers(1, 4)), int(rng.integers(0, 2))
    max_blocks = -(-MAX_TOKENS // block_size)
    state = build_cache(
        rng, {0: (num_tokens, heads)}, slots=1, block_size=block_size, max_blocks=max_blocks,
        num_blocks=LAYERS * HEADS * max_blocks + 1)
    own_least = least(budget) if least else 0
    extra = {} if not least else {"least": np.array([own_least])}
    if mass is not None:
      extra["mass"] = np.array([mass], np.float32)
      budget = num_tokens if case % 3 else budget
    rows = np.array([[0, budget, window, sinks]], np.int32).T
    new, _ = _jitted(allocation)(state, *rows, **extra)
    check_invariants(new)
    kept, blocks = oracles.evict(
        heads, num_tokens=num_tokens, window=window, sinks=sinks, block_size=block_size, allowed=budget,
        allocation=oracle_allocation or allocation, least=own_least, mass=mass,
        head_blocks=head_blocks and head_blocks(num_tokens, budget, window + sinks, block_size))
    assert held_kvs(new, 0) == kept
    freed += np.sum(blocks)
  assert freed > 0


def _pyramid_blocks(num_tokens, budget, protected, block_size):
  """The oracle's shares in blocks, added up from the first layer on and rounded there."""
  floor = -(-min(protected, num_tokens) // block_size)
  mean, most = max(-(-budget // block_size) - floor, 0), -(-num_tokens // block_size) - floor
  marks = np.floor(np.cumsum([0, *oracles.pyramid(mean, most, LAYERS)]) + 0.5 + 1e-6)
  return [[floor + int(n)] * HEADS for n in np.diff(marks)]


@pytest.mark.parametrize("block_size", [1, 4])
def test_pyramid(block_size):
  _check(np.random.default_rng(1), "pyramid", block_size, oracle_allocation="head", head_blocks=_pyramid_blocks)


def test_pyramid_hand_worked():
  """100 tokens, 10 protected, 40 allowed in blocks of 1: 30 beyond, 58.5 in the first of 3 layers, 1.5 in the last."""
  whole = np.full((1, 3, 2), 100)
  excess = _excess_blocks(*map(np.array, (whole, [100], [40], [10])), 1, "pyramid").reshape(3, 2)
  np.testing.assert_array_equal(90 - excess, [[59, 59], [30, 30], [1, 1]])
  # With 70 allowed the first layer would get more than there is: it keeps all 90, and the last 30.
  excess = _excess_blocks(*map(np.array, (whole, [100], [70], [10])), 1, "pyramid").reshape(3, 2)
  np.testing.assert_array_equal(90 - excess, [[90, 90], [60, 60], [30, 30]])


def _profile_blocks(num_tokens, budget, protected, block_size):
  floor = -(-min(protected, num_tokens) // block_size)
  mean, most = max(-(-budget // block_size) - floor, 0), -(-num_tokens // block_size) - floor
  return (floor + oracles.weighted_blocks(mean, most, PROFILE.shares.mean(axis=2))).tolist()


@pytest.mark.parametrize("block_size", [1, 4])
def test_profile(block_size):
  _check(np.random.default_rng(2), PROFILE, block_size, oracle_allocation="head", head_blocks=_profile_blocks)


@pytest.mark.parametrize("allocation", ["pyramid", PROFILE], ids=["pyramid", "profile"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_shares_add_up_to_the_budget(allocation, block_size):
  """What admission counts on: no more than ceil(C / P) blocks a head on the average, all of it where it can be held."""
  for tokens in (17, 64, 1000, 20_000):
    for budget in {1, 7, 33, tokens // 8, tokens // 2, tokens - 1, tokens}:
      for protected in (1, 36):
        if max(protected, 1) > budget or budget > tokens:
          continue
        held = np.full((1, LAYERS, HEADS), tokens)
        excess = _excess_blocks(
            held, np.array([tokens]), np.array([budget]), np.array([protected]), block_size, allocation)
        kept = LAYERS * HEADS * -(-tokens // block_size) - np.asarray(excess).sum()
        assert kept == LAYERS * HEADS * -(-budget // block_size), (tokens, budget, protected)


@pytest.mark.parametrize(("allocation", "block_size"), [("all", 4), ("layer", 1), ("layer", 4)])
def test_safeguard(allocation, block_size):
  _check(np.random.default_rng(3), allocation, block_size, least=lambda budget: int(0.6 * budget))


def test_safeguard_hand_worked():
  """Two heads of 4 KVs in blocks of 1, four may stay: without it head 0 loses all but the protected one."""
  heads = [[[(p, 0.1 + p / 100) for p in range(4)], [(p, 0.5 + p / 100) for p in range(4)]]]
  state = build_cache(np.random.default_rng(0), {0: (4, heads)}, slots=1, block_size=1, max_blocks=4, num_blocks=9)
  rows = np.array([[0, 2, 1, 0]], np.int32).T
  plain, _ = _jitted("all")(state, *rows)
  assert [[p for p, _ in head] for head in held_kvs(plain, 0)[0]] == [[3], [1, 2, 3]]
  guarded, _ = _jitted("all")(state, *rows, least=np.array([2]))
  assert [[p for p, _ in head] for head in held_kvs(guarded, 0)[0]] == [[2, 3], [2, 3]]


@pytest.mark.parametrize(("allocation", "mass", "block_size"), [
    ("all", 0.8, 1), ("all", 0.8, 4), ("all", 0.2, 1), ("all", 0.2, 4), ("layer", 0.95, 1), ("head", 0.5, 4)])
def test_mass(allocation, mass, block_size):
  _check(np.random.default_rng(4), allocation, block_size, mass=mass)


def test_mass_hand_worked():
  """Scores 1 2 3 4 and 10 20 30 30 sum to 100: 90% of that may lose 10, which 1 + 2 + 3 + 4 are, but not one more."""
  heads = [[[(p, float(p + 1)) for p in range(4)], [(0, 10.0), (1, 20.0), (2, 30.0), (3, 30.0)]]]
  state = build_cache(np.random.default_rng(0), {0: (9, heads)}, slots=1, block_size=1, max_blocks=4, num_blocks=9)
  rows = np.array([[0, 9, 1, 0]], np.int32).T
  for mass, lengths in ((0.9, [0, 4]), (0.91, [1, 4]), (0.79, [0, 3]), (1.0, [4, 4])):
    _, report = _jitted("all")(state, *rows, mass=np.array([mass], np.float32))
    assert report.lengths[0, 0].tolist() == lengths, mass


def test_a_share_above_one_evicts_nothing():
  heads = [[[(p, 0.0) for p in range(4)]] * 2]
  state = build_cache(np.random.default_rng(0), {0: (9, heads)}, slots=1, block_size=1, max_blocks=4, num_blocks=9)
  rows = np.array([[0, 9, 1, 0]], np.int32).T
  for mass, kept in ((2.0, 8), (1.0, 0)):
    _, report = _jitted("all")(state, *rows, mass=np.array([mass], np.float32))
    assert report.lengths.sum() == kept


@pytest.mark.parametrize("allocation", ["pyramid", PROFILE])
def test_ranges_to_keep_count_where_there_are_tokens(allocation):
  """Heads with budgets of their own keep no more for a range behind the end, nor for one that is there twice."""
  rng = np.random.default_rng(7)
  _, heads = _sequence(rng, whole=True)
  num_tokens = len(heads[0][0])
  state = build_cache(
      rng, {0: (num_tokens, heads)}, slots=1, block_size=2, max_blocks=20, num_blocks=LAYERS * HEADS * 20 + 1)
  rows = np.array([[0, 10, 2, 2]], np.int32).T
  lengths = [
      np.asarray(_jitted(allocation)(state, *rows, keep=np.array([keep], np.int32))[1].lengths)
      for keep in ([[3, 6], [0, 0], [0, 0]], [[3, 6], [4, 5], [100, 2000]])]
  np.testing.assert_array_equal(*lengths)
  assert lengths[0].sum() < LAYERS * HEADS * num_tokens
