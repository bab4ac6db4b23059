"""Problems for the ops of prefill, and their answers: a ragged prefix, NaN in all that is not held."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles


@dataclasses.dataclass(frozen=True)
class PrefillProblem:
  """Arguments of `paged_prefill` and `column_scores`, for one layer and slot; fields as there."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  kv: jax.Array
  positions: jax.Array
  tables: jax.Array
  lengths: jax.Array
  layer: jax.Array
  slot: jax.Array
  count: jax.Array

  @property
  def attention(self) -> tuple[jax.Array, ...]:
    """Arguments of `paged_prefill`."""
    return (self.q, self.k, self.v, self.kv, self.tables, self.lengths[self.layer, self.slot], self.layer, self.slot,
            self.count)

  @property
  def held(self) -> tuple[jax.Array, ...]:
    """Arguments of `column_scores` behind the queries."""
    return self.kv, self.positions, self.tables, self.lengths, self.layer, self.slot


def make_problem(
    seed, lengths, *, tokens=24, count=None, group=2, head_dim=16, block_size=4, spare_columns=3, dtype=jnp.float32,
    pool_dtype=None, layers=2, slots=2,
) -> PrefillProblem:
  """A chunk of `tokens` rows behind a prefix of `lengths` [H] KVs, in the last layer and slot.

  Tables have `spare_columns` or more behind the longest head: their width is rounded up, so that problems that
  differ in `lengths` alone run one compiled program.
  """
  rng = np.random.default_rng(seed)
  heads = len(lengths)
  columns = -(-max(lengths) // block_size) + spare_columns
  columns += -columns % 16
  num_blocks = heads * columns + 8
  ids = rng.permutation(np.arange(1, num_blocks))
  tables = np.zeros((layers, slots, heads, columns), np.int32)
  all_lengths = np.full((layers, slots, heads), 1, np.int32)
  kv = np.full((num_blocks, 2, block_size, head_dim), np.nan, np.float32)
  positions = np.full((num_blocks, block_size), 2**30, np.int32)
  for head, length in enumerate(lengths):
    all_lengths[-1, -1, head] = length
    at = rng.permutation(max(2 * length, 1))  # positions in no order, as after an eviction
    for m in range(-(-length // block_size)):
      block = tables[-1, -1, head, m] = ids[head * columns + m]
      filled = min(block_size, length - m * block_size)
      kv[block, :, :filled] = rng.normal(size=(2, filled, head_dim))
      positions[block, :filled] = at[m * block_size:][:filled]
  q, k, v = (rng.normal(size=(tokens, n, head_dim)) for n in (heads * group, heads, heads))
  return PrefillProblem(
      *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(kv, pool_dtype or dtype), jnp.asarray(positions),
      jnp.asarray(tables), jnp.asarray(all_lengths), jnp.int32(layers - 1), jnp.int32(slots - 1),
      jnp.int32(tokens if count is None else count))


def held_by(problem: PrefillProblem, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Keys [n, D], values [n, D] and positions [n] of one head's prefix, in the order of its list."""
  layer, slot = int(problem.layer), int(problem.slot)
  ids, length = np.asarray(problem.tables)[layer, slot, head], int(problem.lengths[layer, slot, head])
  blocks = np.asarray(problem.kv, np.float64)[ids]  # [M, 2, P, D]
  keys, values = blocks.swapaxes(0, 1).reshape(2, -1, blocks.shape[-1])[:, :length]
  return keys, values, np.asarray(problem.positions)[ids].reshape(-1)[:length]


def expected_attention(problem: PrefillProblem, scale: float) -> tuple[np.ndarray, np.ndarray]:
  """Output [count, H*G, D] and log-sum-exp [count, H*G], head by head, in float64."""
  count, heads = int(problem.count), problem.k.shape[1]
  q, k, v = (np.asarray(x, np.float64)[:count] for x in (problem.q, problem.k, problem.v))
  outs, log_sums = [], []
  for head, queries in enumerate(np.split(q, heads, axis=1)):
    keys, values, _ = held_by(problem, head)
    keys, values = np.concatenate([keys, k[:, head]]), np.concatenate([values, v[:, head]])
    row, where = np.arange(count), np.arange(len(keys)) - (len(keys) - count)
    outs.append(oracles.attention(queries, keys[:, None], values[:, None], row, np.maximum(where, -1), scale))
    logits = np.einsum("tgd,nd->tgn", queries, keys) * scale
    logits[np.broadcast_to((where[None] > row[:, None])[:, None], logits.shape)] = -np.inf
    log_sums.append(np.log(np.exp(logits).sum(axis=-1)))
  return np.concatenate(outs, axis=1), np.concatenate(log_sums, axis=1)


def expected_sums(problem, log_sums, query_positions, scale, power, buffer) -> np.ndarray:
  """Column sums [H, G, M*P] over the queries `problem.q`, in float64."""
  heads, columns = problem.k.shape[1], problem.tables.shape[-1] * problem.kv.shape[2]
  q, log_sums = np.asarray(problem.q, np.float64), np.asarray(log_sums, np.float64)
  sums = np.zeros((heads, q.shape[1] // heads, columns))
  for head, (queries, offsets) in enumerate(zip(np.split(q, heads, 1), np.split(log_sums, heads, 1), strict=True)):
    keys, _, positions = held_by(problem, head)
    counted = positions[None] <= np.asarray(query_positions)[:, None] - buffer  # [R, n]
    logits = np.einsum("rgd,nd->rgn", queries, keys) * scale - offsets[..., None]
    raised = np.exp(np.where(counted[:, None], logits, -np.inf)) ** power
    sums[head, :, : len(keys)] = raised.sum(axis=0)
  return sums


MUTATIONS = ("zeroed V", "swapped heads", "shifted lengths")


def mutate(problem: PrefillProblem, mutation: str) -> PrefillProblem:
  """A problem whose answer differs: a tolerance that lets it pass is too wide."""
  if mutation == "zeroed V":
    return dataclasses.replace(problem, kv=problem.kv.at[:, 1].set(0))
  if mutation == "swapped heads":
    return dataclasses.replace(
        problem, tables=problem.tables[:, :, ::-1], lengths=problem.lengths[:, :, ::-1])
  assert mutation == "shifted lengths", mutation
  return dataclasses.replace(problem, lengths=jnp.maximum(problem.lengths - 1, 0))


def largest_error(got: jax.Array, expected: np.ndarray) -> float:
  """Largest difference over 1 + the expected magnitude; NaN counts as infinite."""
  error = np.abs(np.asarray(got, np.float64) - expected) / (1 + np.abs(expected))
  return float(np.where(np.isnan(error), np.inf, error).max())


def sums_error(got: jax.Array, expected: np.ndarray) -> float:
  """Largest difference over the largest expected sum; NaN counts as infinite."""
  error = np.abs(np.asarray(got, np.float64) - expected) / expected.max()
  return float(np.where(np.isnan(error), np.inf, error).max())
