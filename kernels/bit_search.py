"""Search for a threshold among all uint32, several bits at a time."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

NEVER = jnp.uint32(0xFFFF_FFFF)
"""Above every threshold that a search tries; what it finds where nothing holds."""


def smallest(holds: Callable[[Array], Array], shape: tuple[int, ...], step_bits: int) -> Array:
  """Smallest uint32 for which the monotone `holds` is true, NEVER where it is for none below.

  Args:
    holds: takes thresholds u32 [*shape, 2**step_bits - 1], none of them NEVER, and
      answers for each.
    shape: of the answer.
    step_bits: bits of the answer that each call of `holds` finds; divides 32.
  """
  steps = 32 // step_bits
  digits = jnp.arange(1, 2**step_bits, dtype=jnp.uint32)

  def body(step, low):
    shift = jnp.uint32(step_bits) * jnp.asarray(steps - 1 - step, jnp.uint32)
    # The last number with a smaller digit: where `holds` is false, this digit or a higher one is the answer's.
    missed = ~holds(low[..., None] + (digits << shift) - 1)
    return low + (jnp.sum(missed, axis=-1, dtype=jnp.uint32) << shift)

  # Few steps stand one after the other, which spares a GPU the loop's own launches.
  return lax.fori_loop(0, steps, body, jnp.zeros(shape, jnp.uint32), unroll=steps if steps <= 8 else 1)
