"""What `paged_decode` needs to keep scores up to date, one query behind."""

from typing import NamedTuple

import jax


class Observed(NamedTuple):
  """Scores, and the last query of each sequence, whose probabilities are still to be added.

  A query's probabilities need its log-sum-exp over all keys, which decode attention
  knows only at its end. So they are added at the sequence's next step, when each key
  is read anyway, and by then exactly.

  Attributes:
    scores: f32 [N, P], updated.
    positions: i32 [N, P] token position of each KV.
    queries: [L, S, H*G, D] after RoPE, finite; replaced by the new ones, cast to this dtype.
    log_sums: f32 [L, S, H*G] of these queries, +inf where a sequence has none yet, so
      that its probabilities are 0; replaced by the new ones.
    query_positions: i32 [S] of these queries; they say which of them count.
  """

  scores: jax.Array
  positions: jax.Array
  queries: jax.Array
  log_sums: jax.Array
  query_positions: jax.Array
