"""XLA version of `compact_kv`: a loop of gathers and scatters of fixed size."""

import jax
import jax.numpy as jnp
from jax import lax

MOVES_PER_STEP = 2048


def compact_kv(
    kv: jax.Array,
    scores: jax.Array,
    positions: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `compact_kv.compact_kv`."""
  block_size = kv.shape[2]
  spare = -sources.shape[0] % MOVES_PER_STEP
  # Padding moves slot 0 onto itself: the null block's contents mean nothing.
  sources, targets = jnp.pad(sources, (0, spare)), jnp.pad(targets, (0, spare))

  def body(step, pools):
    kv, scores, positions = pools
    source = lax.dynamic_slice_in_dim(sources, step * MOVES_PER_STEP, MOVES_PER_STEP)
    target = lax.dynamic_slice_in_dim(targets, step * MOVES_PER_STEP, MOVES_PER_STEP)
    from_block, from_offset = source // block_size, source % block_size
    to_block, to_offset = target // block_size, target % block_size
    return (
        kv.at[to_block, :, to_offset].set(kv[from_block, :, from_offset]),
        scores.at[to_block, to_offset].set(scores[from_block, from_offset]),
        positions.at[to_block, to_offset].set(positions[from_block, from_offset]),
    )

  steps = lax.div(count + (MOVES_PER_STEP - 1), jnp.int32(MOVES_PER_STEP))
  return lax.fori_loop(0, steps, body, (kv, scores, positions))
