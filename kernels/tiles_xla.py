"""What the XLA kernels share: walking block tables in tiles, and the online softmax.

A tile is TILE_BLOCKS blocks of every head at once. Loops run over as many tiles
as the longest head has, so time follows what is held, not the tables' width.
"""

import jax
import jax.numpy as jnp
from jax import lax

TILE_BLOCKS = 16


def pad_to_tiles(tables: jax.Array) -> jax.Array:
  """Widens tables [..., M] to whole tiles; the padding is the null block, 0."""
  spare = -tables.shape[-1] % TILE_BLOCKS
  return jnp.pad(tables, [(0, 0)] * (tables.ndim - 1) + [(0, spare)])


def count_tiles(lengths: jax.Array, block_size: int) -> jax.Array:
  """Tiles that the longest of the heads has, i32 []."""
  tile = TILE_BLOCKS * block_size
  return lax.div(jnp.max(lengths) + (tile - 1), jnp.int32(tile))


def tile_of(tables: jax.Array, lengths: jax.Array, step: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
  """Blocks [..., TILE_BLOCKS] of tile `step`, and which of its KVs are held, bool [..., tile]."""
  blocks = lax.dynamic_slice_in_dim(tables, step * TILE_BLOCKS, TILE_BLOCKS, axis=-1)
  tile = TILE_BLOCKS * block_size
  return blocks, step * tile + jnp.arange(tile, dtype=jnp.int32) < lengths[..., None]


def gather(kv: jax.Array, blocks: jax.Array, held: jax.Array, which: int) -> jax.Array:
  """Keys (`which` = 0) or values (1) of a tile, f32 [..., tile, D], 0 where nothing is held."""
  rows = kv[blocks, which].reshape(*held.shape, kv.shape[-1]).astype(jnp.float32)
  # What lies behind a head's end may be anything, NaN too, and 0 * NaN is NaN.
  return jnp.where(held[..., None], rows, 0.0)


def logits_of(queries: jax.Array, keys: jax.Array, seen: jax.Array) -> jax.Array:
  """queries [..., Q, D] times keys [..., tile, D], -inf where not `seen` (broadcast to [..., Q, tile])."""
  logits = jnp.einsum("...qd,...td->...qt", queries, keys, precision=lax.Precision.HIGHEST)
  return jnp.where(seen, logits, -jnp.inf)


def start_softmax(queries: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Running maximum, sum [..., Q] and output [..., Q, D] before the first tile."""
  rows = queries.shape[:-1]
  return jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(queries.shape)


def online_softmax(
    carry: tuple[jax.Array, jax.Array, jax.Array], logits: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Adds a tile of logits [..., Q, tile] and values [..., tile, D] to what `start_softmax` began."""
  top, total, acc = carry
  new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
  safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)  # a row that has seen nothing yet
  weights = jnp.exp(logits - safe[..., None])
  decay = jnp.exp(top - safe)
  gain = jnp.einsum("...qt,...td->...qd", weights, values, precision=lax.Precision.HIGHEST)
  return new_top, total * decay + jnp.sum(weights, axis=-1), acc * decay[..., None] + gain
