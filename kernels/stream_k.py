"""Equal shares of ragged work: how the decode kernels split tiles of KVs over CTAs.

A pair is one (sequence, KV head); its KVs are read in tiles of `tile`. The tiles
of all pairs stand in one row and CTA c takes the c-th equal share of it, so the
load is balanced however ragged the heads are (stream-K, arXiv 2301.03598).

    pair        0 0 0 0 1 2 2 2 2 2 2        pair 1 has one tile
    CTA         0 0 0 0 1 1 1 1 2 2 2        11 tiles: shares of 4, 4 and 3

What CTA c finds for pair p goes to slot c + p. Both grow along the row, so a slot
is written at most once, the slots of a pair are neighbours, and ctas + pairs
slots are enough: no list of partial results is needed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

_CTA_FIELDS = 4
_PAIR_FIELDS = 2


def row_size(pairs: int, ctas: int) -> int:
  """Numbers that `schedule` gives for one layer."""
  return _CTA_FIELDS * ctas + _PAIR_FIELDS * pairs + pairs + 1


def schedule(lengths: Int[Array, "layers seqs kv_heads"], *, tile: int, ctas: int) -> Int[Array, " packed"]:
  """Plans every layer at once: i32 [L * row_size], to be read through `Row`.

  One packed array, because XLA copies every slice that feeds a kernel. It depends
  on the lengths alone, so layers that are written out share one; under a scan XLA's
  GPU compiler leaves it in the loop.

  Args:
    lengths: i32 [L, S, H] KVs of each head.
    tile: KVs per tile.
    ctas: CTAs that share the work, all of them on the GPU at once. Smaller shares
      behind a first wave, for multiprocessors that are done early, gained nothing.
  """
  layers, seqs, heads = lengths.shape
  tiles = (lengths.reshape(layers, seqs * heads) + (tile - 1)) // tile
  ends = jnp.cumsum(tiles, axis=1, dtype=jnp.int32)
  starts = ends - tiles
  total = ends[:, -1:]
  working = _working_ctas(tiles, total, ctas)
  # Shares differ by one tile at most: if all but the last were rounded up, the last CTAs would have nothing.
  share, longer = jnp.divmod(total, working)
  cta = jnp.minimum(jnp.arange(ctas + 1, dtype=jnp.int32), working)
  bounds = cta * share + jnp.minimum(cta, longer)  # [L, ctas + 1]
  low, high = bounds[:, :-1], bounds[:, 1:]
  first_pair = jnp.sum(ends[:, None] <= low[..., None], axis=2, dtype=jnp.int32)
  stop_pair = jnp.sum(starts[:, None] < high[..., None], axis=2, dtype=jnp.int32)
  # A CTA without work walks no pair.
  records = jnp.stack([jnp.where(low < high, first_pair, stop_pair), stop_pair, low, high], axis=2)

  def worker(tile: jax.Array) -> jax.Array:
    in_longer = longer * (share + 1)
    return jnp.where(tile < in_longer, tile // (share + 1), longer + (tile - in_longer) // jnp.maximum(share, 1))

  first_cta = worker(starts)
  workers = jnp.stack([first_cta, jnp.where(tiles > 0, worker(ends - 1) + 1, first_cta)], axis=2)
  return jnp.concatenate(
      [records.reshape(layers, -1), workers.reshape(layers, -1), jnp.zeros_like(ends[:, :1]), ends],
      axis=1).reshape(-1)


def _working_ctas(tiles: jax.Array, total: jax.Array, ctas: int) -> jax.Array:
  """How many CTAs share each layer's work, i32 [L, 1]: all of them, if there is a tile for each.

  Where all pairs have the same number of tiles, and a few CTAs less split them so that none
  has parts of two, those do: memory is busy all the same.
  """
  longest = jnp.max(tiles, axis=1, keepdims=True)
  pairs = jnp.maximum(jnp.sum(tiles > 0, axis=1, keepdims=True, dtype=jnp.int32), 1)
  each = -(-pairs // ctas)  # pairs of a CTA
  aligned = jnp.where(each == 1, ctas // pairs * pairs, pairs // each)
  alike = (longest * pairs == total) & (pairs % each == 0) & (total % aligned == 0)
  working = jnp.where(alike & (aligned >= 0.95 * ctas), aligned, ctas)
  return jnp.minimum(working, jnp.maximum(total, 1))


@dataclasses.dataclass(frozen=True)
class Row:
  """One layer's plan as a kernel reads it.

  Attributes:
    ref: the packed array.
    layer: i32 [].
    pairs: S*H.
    ctas: as given to `schedule`.
  """

  ref: Any
  layer: Any
  pairs: int
  ctas: int

  def _at(self, index: Any) -> Any:
    return self.ref[self.layer * row_size(self.pairs, self.ctas) + index]

  def cta(self, c: Any) -> tuple[Any, Any, Any, Any]:
    """First pair, one past the last pair, first tile, one past the last tile of CTA c."""
    first, stop, low, high = (self._at(_CTA_FIELDS * c + i) for i in range(_CTA_FIELDS))
    return first, stop, low, high

  def ctas_of(self, pair: Any) -> tuple[Any, Any]:
    """First CTA that works on a pair, and one past the last; equal for an empty pair."""
    at = _CTA_FIELDS * self.ctas + _PAIR_FIELDS * pair
    return self._at(at), self._at(at + 1)

  def start(self, pair: Any) -> Any:
    """First tile of a pair; of `pairs`: the number of tiles."""
    return self._at(_CTA_FIELDS * self.ctas + _PAIR_FIELDS * self.pairs + pair)
