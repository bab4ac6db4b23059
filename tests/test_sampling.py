"""Sampling against plain NumPy: which tokens can be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvc_jax.sampling import SamplingArrays, _truncate, best_one_by_one, logprobs_of, sample

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
DRAWS = 4000
_sample = jax.jit(sample)


def _draw(*, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
  """Draws DRAWS tokens with one seed and rising steps; returns how often each came."""
  rows = SamplingArrays(
      temperature=jnp.full(DRAWS, temperature, jnp.float32), top_k=jnp.full(DRAWS, top_k, jnp.int32),
      top_p=jnp.full(DRAWS, top_p, jnp.float32), min_p=jnp.full(DRAWS, min_p, jnp.float32),
      seed=jnp.full(DRAWS, seed, jnp.uint32), step=jnp.arange(DRAWS, dtype=jnp.int32))
  tokens = _sample(jnp.broadcast_to(LOGITS, (DRAWS, LOGITS.size)), rows)
  return np.bincount(np.asarray(tokens), minlength=LOGITS.size) / DRAWS


def _expected(kept, temperature=1.0):
  weights = np.where(np.isin(np.arange(LOGITS.size), kept), np.exp(LOGITS / temperature), 0)
  return weights / weights.sum()


@pytest.mark.parametrize(("settings", "kept"), [
    ({}, [0, 1, 2, 3, 4]),
    ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
    ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
    ({"top_k": 1}, [1]),
    ({"top_k": 3}, [1, 3, 4]),
    ({"top_k": 9}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.3}, [1]),  # the best token alone reaches it
    ({"top_p": 0.6}, [1, 3]),  # 0.4 + 0.25
    ({"top_p": 0.7}, [1, 3, 4]),
    ({"min_p": 0.45}, [1, 3, 4]),  # at least 0.18
    ({"min_p": 1.0}, [1]),
    ({"top_k": 2, "top_p": 0.99, "min_p": 0.6}, [1, 3]),
    ({"temperature": 0.0}, [1]),
])
def test_tokens_come_as_often_as_they_should(settings, kept):
  expected = _expected(kept, settings.get("temperature") or 1.0)
  shares = _draw(**settings)
  assert not shares[expected == 0].any()
  # Five standard deviations of a share of 4000 draws.
  np.testing.assert_allclose(shares, expected, atol=5 * 0.5 / np.sqrt(DRAWS))


def test_seeds_and_steps_draw_differently():
  assert (_draw(seed=1) != _draw(seed=2)).any()


def test_a_row_that_truncates_nothing_draws_the_same_beside_one_that_does():
  logits = jnp.concatenate([jnp.full(2000, 8.0), jnp.full(2000, -9.5)])
  rows = SamplingArrays(
      temperature=jnp.ones(2), top_k=jnp.array([0, 5]), top_p=jnp.ones(2), min_p=jnp.zeros(2),
      seed=jnp.array([1, 2], jnp.uint32), step=jnp.array([0, 0]))
  beside = _sample(jnp.stack([jnp.full(4000, -1.0), logits]), rows)
  alone = _sample(jnp.full((1, 4000), -1.0), jax.tree.map(lambda x: x[:1], rows))
  assert beside[0] == alone[0]
  assert beside[1] < 5


def test_rows_do_not_depend_on_their_neighbours():
  """A greedy row beside drawn ones, and the same row in another place."""
  logits = jnp.stack([LOGITS, LOGITS[::-1], LOGITS])
  rows = SamplingArrays(
      temperature=jnp.array([0.0, 1.0, 1.0]), top_k=jnp.zeros(3, jnp.int32), top_p=jnp.ones(3), min_p=jnp.zeros(3),
      seed=jnp.array([3, 4, 5], jnp.uint32), step=jnp.array([0, 1, 2]))
  tokens = _sample(logits, rows)
  turned = _sample(logits[::-1], jax.tree.map(lambda x: x[::-1], rows))
  assert tokens[0] == 1
  assert tokens.tolist() == turned.tolist()[::-1]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(7, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.02), (40, 0.5, 0.01)])
def test_what_is_truncated_is_what_a_sort_would_leave(top_k, top_p, min_p):
  """With many ties, of which the first go first."""
  rng = np.random.default_rng(top_k)
  logits = np.round(rng.normal(size=(5, 301)) * 2, 1).astype(np.float32)
  rows = SamplingArrays(
      temperature=jnp.ones(5), top_k=jnp.full(5, top_k, jnp.int32), top_p=jnp.full(5, top_p), min_p=jnp.full(5, min_p),
      seed=jnp.zeros(5, jnp.uint32), step=jnp.zeros(5, jnp.int32))
  found = np.isfinite(np.asarray(jax.jit(_truncate)(logits, rows)))
  for row, kept in zip(logits.astype(np.float64), found, strict=True):
    order = np.argsort(-row, kind="stable")
    probabilities = np.exp(row[order]) / np.exp(row).sum()
    stays = (np.arange(len(row)) < (top_k or len(row))) & (np.cumsum(probabilities) - probabilities < top_p)
    stays &= probabilities >= min_p * probabilities[0]
    assert set(np.flatnonzero(kept)) == set(order[stays])


def test_nothing_sorts_or_loops_on_a_gpu():
  """Such a branch makes the host wait in every step; see the module."""
  rows = SamplingArrays(*(jax.ShapeDtypeStruct((3,), d) for d in ("f4", "i4", "f4", "f4", "u4", "i4")))
  logits = jax.ShapeDtypeStruct((3, 1000), jnp.float32)

  def draw(logits, rows):
    tokens = sample(logits, rows)
    return tokens, logprobs_of(logits, tokens, jnp.any(rows.step > 0))

  def text(platform):
    return jax.jit(draw).trace(logits, rows).lower(lowering_platforms=(platform,)).as_text()

  assert "stablehlo.case" in text("cuda")
  assert not any(f"stablehlo.{op}" in text("cuda") or f"chlo.{op}" in text("cuda") for op in ("sort", "top_k", "while"))
  assert "chlo.top_k" in text("cpu")


def test_one_by_one_finds_what_top_k_does():
  """Where few are finite too: none comes twice."""
  inf, nan = np.inf, np.nan
  values = jnp.array([
      [0.5, -inf, 2.0, -inf, 2.0, -inf], [-inf] * 6, [-1.0, 3.0, 0.0, -0.0, inf, 1e-30],
      [nan, 1.0, nan, -inf, 0.0, 2.0]])
  best, ids = best_one_by_one(values, 5)
  expected, places = jax.lax.top_k(values, 5)
  np.testing.assert_array_equal(ids, places)
  np.testing.assert_array_equal(best, expected)


def test_the_best_are_in_order_with_the_first_of_ties_first():
  logits = np.random.default_rng(0).integers(0, 9, (3, 50)).astype(np.float32)
  found = logprobs_of(jnp.asarray(logits), jnp.zeros(3, jnp.int32), jnp.bool_(True))
  order = np.argsort(-logits, axis=-1, kind="stable")[:, :20]
  np.testing.assert_array_equal(found.top_ids, order)
  expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), order, axis=-1)
  np.testing.assert_allclose(found.top, expected, rtol=1e-6)
