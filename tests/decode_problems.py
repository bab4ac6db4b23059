"""Problems for the decode op, and their answer: ragged heads, empty heads, NaN in all that is not held."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles


@dataclasses.dataclass(frozen=True)
class DecodeProblem:
  """Arguments of `paged_decode`; fields as there."""

  q: jax.Array
  kv: jax.Array
  tables: jax.Array
  lengths: jax.Array
  scores: jax.Array
  positions: jax.Array
  query_positions: jax.Array

  @property
  def attention(self) -> tuple[jax.Array, ...]:
    return self.q, self.kv, self.tables, self.lengths

  @property
  def scoring(self) -> tuple[jax.Array, ...]:
    return self.scores, self.positions, self.query_positions


def make_problem(
    seed, *, layers=2, seqs=3, group=2, heads=2, head_dim=8, block_size=4, max_blocks=37, dtype=jnp.float32,
    unused=np.nan,
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
  q = rng.normal(size=(seqs, heads * group, head_dim))
  return DecodeProblem(
      jnp.asarray(q, dtype), jnp.asarray(kv, dtype), jnp.asarray(tables), jnp.asarray(lengths), jnp.asarray(scores),
      jnp.asarray(positions), jnp.asarray(rng.integers(100, 120, seqs), jnp.int32))


def expected_output(problem: DecodeProblem, layer: int, scale: float) -> np.ndarray:
  """Dense attention over the KVs that each head holds, float64 [S, H*G, D]."""
  q, kv = np.asarray(problem.q, np.float64), np.asarray(problem.kv, np.float64)
  tables, lengths = np.asarray(problem.tables)[layer], np.asarray(problem.lengths)[layer]
  out = []
  for seq, (ids, counts) in enumerate(zip(tables, lengths, strict=True)):
    lists = [[kv[ids[h], which].reshape(-1, q.shape[-1])[:n] for h, n in enumerate(counts)] for which in (0, 1)]
    out.append(oracles.attention_ragged(q[seq], *lists, scale))
  return np.array(out)


def expected_scores(problem: DecodeProblem, layer: int, scale: float, power: int, buffer: int) -> np.ndarray:
  """The scores [N, P] afterwards: + sum over G of probability ** power where the query counts for the key."""
  q, kv = np.asarray(problem.q, np.float64), np.asarray(problem.kv, np.float64)
  scores, positions = np.asarray(problem.scores, np.float64), np.asarray(problem.positions)
  heads = problem.lengths.shape[2]
  for seq, head in np.ndindex(problem.lengths.shape[1:]):
    ids, n = np.asarray(problem.tables)[layer, seq, head], int(problem.lengths[layer, seq, head])
    at = np.repeat(ids, kv.shape[2])[:n], np.tile(np.arange(kv.shape[2]), len(ids))[:n]
    logits = scale * q[seq].reshape(heads, -1, q.shape[-1])[head] @ kv[at[0], 0, at[1]].T
    if n:
      chances = np.exp(logits - logits.max(axis=1, keepdims=True))
      chances /= chances.sum(axis=1, keepdims=True)
      counted = positions[at] <= int(problem.query_positions[seq]) - buffer
      scores[at] += np.where(counted, (chances**power).sum(axis=0), 0.0)
  return scores


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


def score_error(problem: DecodeProblem, scores: jax.Array, expected: np.ndarray) -> float:
  """Largest error of what was added, over the largest addition; all KV slots but the null block's count."""
  before = np.asarray(problem.scores, np.float64)
  held = ~np.isnan(before)
  np.testing.assert_array_equal(np.isnan(np.asarray(scores))[1:], ~held[1:])
  error = np.abs(np.asarray(scores, np.float64) - expected)[held]
  return float(error.max() / (expected - before)[held].max())
