"""Problems for the decode op, and their answer: ragged heads, empty heads, NaN in all that is not held."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from kvc_jax.kernels.observed import Observed


@dataclasses.dataclass(frozen=True)
class DecodeProblem:
  """Arguments of `paged_decode`; fields as there."""

  q: jax.Array
  kv: jax.Array
  tables: jax.Array
  lengths: jax.Array
  observed: Observed

  @property
  def attention(self) -> tuple[jax.Array, ...]:
    return self.q, self.kv, self.tables, self.lengths


def make_problem(
    seed, *, layers=2, seqs=3, group=2, heads=2, head_dim=8, block_size=4, max_blocks=37, dtype=jnp.float32,
    query_dtype=None, unused=np.nan,
) -> DecodeProblem:
  """Lengths 0..M*P at random, the extremes among them; block ids at random."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, max_blocks * block_size + 1, (layers, seqs, heads)).astype(np.int32)
  if heads > 1 and seqs > 1:
    lengths[0, 0, 0], lengths[0, 0, 1], lengths[0, 1, 0] = 0, 1, max_blocks * block_size
  num_blocks = layers * seqs * heads * max_blocks + 1
  ids = list(rng.permutation(np.arange(1, num_blocks)))
  tables = np.zeros((*lengths.shape, max_blocks), np.int32)
  kv = np.full((num_blocks, 2, block_size, head_dim), unused, np.float32)
  scores = np.full((num_blocks, block_size), unused, np.float32)
  positions = np.full((num_blocks, block_size), 2**30, np.int32)
  for at in np.ndindex(lengths.shape):
    for m in range(-(-lengths[at] // block_size)):
      block = tables[at][m] = ids.pop()
      filled = min(block_size, lengths[at] - m * block_size)
      kv[block, :, :filled] = rng.normal(size=(2, filled, head_dim))
      scores[block, :filled] = rng.random(filled)
      positions[block, :filled] = rng.integers(0, 100, filled)
    if lengths[at]:  # the newest KV, newer than the observed query
      positions[tables[at][(lengths[at] - 1) // block_size], (lengths[at] - 1) % block_size] = 121
  q = rng.normal(size=(layers + 1, seqs, heads * group, head_dim))
  query_positions = rng.integers(100, 120, seqs)
  query_positions[:2] = (107, 105)[:seqs]  # of which one is a multiple of 3
  log_sums = rng.uniform(2, 5, (layers, seqs, heads * group))
  log_sums[:, -1] = np.inf  # a sequence that has not decoded yet
  observed = Observed(
      scores=jnp.asarray(scores), positions=jnp.asarray(positions), queries=jnp.asarray(q[1:], query_dtype or dtype),
      log_sums=jnp.asarray(log_sums, jnp.float32),
      query_positions=jnp.asarray(query_positions, jnp.int32))
  return DecodeProblem(
      jnp.asarray(q[0], query_dtype or dtype), jnp.asarray(kv, dtype), jnp.asarray(tables), jnp.asarray(lengths),
      observed)


def expected_output(problem: DecodeProblem, layer: int, scale: float) -> np.ndarray:
  """Dense attention over the KVs that each head holds, float64 [S, H*G, D]."""
  q, kv = np.asarray(problem.q, np.float64), np.asarray(problem.kv, np.float64)
  tables, lengths = np.asarray(problem.tables)[layer], np.asarray(problem.lengths)[layer]
  out = []
  for seq, (ids, counts) in enumerate(zip(tables, lengths, strict=True)):
    lists = [[kv[ids[h], which].reshape(-1, q.shape[-1])[:n] for h, n in enumerate(counts)] for which in (0, 1)]
    out.append(oracles.attention_ragged(q[seq], *lists, scale))
  return np.array(out)


def expected_scores(
    problem: DecodeProblem, layer: int, scale: float, power: int, buffer: int, every: int = 1,
) -> np.ndarray:
  """The scores [N, P] afterwards: + sum over G of probability ** power of the observed queries, where they count."""
  observed = problem.observed
  kv, queries = np.asarray(problem.kv, np.float64), np.asarray(observed.queries, np.float64)[layer]
  log_sums = np.asarray(observed.log_sums, np.float64)[layer]
  scores, positions = np.asarray(observed.scores, np.float64), np.asarray(observed.positions)
  heads = problem.lengths.shape[2]
  for seq, head in np.ndindex(problem.lengths.shape[1:]):
    ids, n = np.asarray(problem.tables)[layer, seq, head], int(problem.lengths[layer, seq, head])
    at = np.repeat(ids, kv.shape[2])[:n], np.tile(np.arange(kv.shape[2]), len(ids))[:n]
    logits = scale * queries[seq].reshape(heads, -1, kv.shape[-1])[head] @ kv[at[0], 0, at[1]].T  # [G, n]
    chances = np.exp(logits - log_sums[seq].reshape(heads, -1)[head][:, None])
    position = int(observed.query_positions[seq])
    counted = (positions[at] <= position - buffer) & (position % every == 0)
    scores[at] += np.where(counted, every * (chances**power).sum(axis=0), 0.0)
  return scores


def expected_log_sums(problem: DecodeProblem, layer: int, scale: float) -> np.ndarray:
  """Log-sum-exp [S, H*G] of the queries over what their head holds; the observed one's where it holds nothing."""
  kv, q = np.asarray(problem.kv, np.float64), np.asarray(problem.q, np.float64)
  out = np.array(problem.observed.log_sums, np.float64)[layer]
  heads = problem.lengths.shape[2]
  for seq, head in np.ndindex(problem.lengths.shape[1:]):
    ids, n = np.asarray(problem.tables)[layer, seq, head], int(problem.lengths[layer, seq, head])
    keys = kv[ids, 0].reshape(-1, kv.shape[-1])[:n]
    if n:
      logits = scale * q[seq].reshape(heads, -1, kv.shape[-1])[head] @ keys.T
      out[seq].reshape(heads, -1)[head] = logits.max(1) + np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
  return out


MUTATIONS = ("zeroed V", "swapped heads", "shifted lengths")


def mutate(problem: DecodeProblem, mutation: str) -> DecodeProblem:
  """A problem whose answer differs: a tolerance that lets it pass is too wide."""
  if mutation == "zeroed V":
    return dataclasses.replace(problem, kv=problem.kv.at[:, 1].set(0))
  if mutation == "swapped heads":
    return dataclasses.replace(problem, tables=problem.tables[:, :, ::-1], lengths=problem.lengths[:, :, ::-1])
  assert mutation == "shifted lengths", mutation
  return dataclasses.replace(problem, lengths=jnp.maximum(problem.lengths - 1, 0))


def output_error(out: jax.Array, expected: np.ndarray) -> float:
  """Largest difference over 1 + the expected magnitude; NaN counts as infinite."""
  error = np.abs(np.asarray(out, np.float64) - expected) / (1 + np.abs(expected))
  return float(np.where(np.isnan(error), np.inf, error).max())


def score_error(problem: DecodeProblem, observed: Observed | None, expected: np.ndarray) -> float:
  """Largest error of what was added, over the largest addition; all KV slots but the null block's count."""
  assert observed is not None
  scores, before = observed.scores, np.asarray(problem.observed.scores, np.float64)
  held = ~np.isnan(before)
  np.testing.assert_array_equal(np.isnan(np.asarray(scores))[1:], ~held[1:])
  error = np.abs(np.asarray(scores, np.float64) - expected)[held]
  return float(error.max() / (expected - before)[held].max())
