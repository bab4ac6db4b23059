"""Many small arrays as one, for what the host gives to each call of a program on the device.

Every array that a call brings along is a transfer of its own, and on a GPU each operation that reads it has to be told
its new address before a CUDA graph can run again.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.tree_util.register_pytree_node_class
class Packed[Tree]:
  """A pytree of arrays of 32 bits or bools as one array i32 [n]; see `unpack`."""

  def __init__(self, words: Any, layout: tuple[Any, tuple[tuple[tuple[int, ...], np.dtype], ...]]):
    self.words = words
    self._layout = layout

  @classmethod
  def of(cls, tree: Tree) -> "Packed[Tree]":
    """Packs a pytree of at least one array, NumPy's or JAX's.

    Raises:
      TypeError: a leaf has neither 32 bits nor bools.
    """
    leaves, structure = jax.tree.flatten(tree)
    on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
    words = [_words_on_device(leaf) if on_device else _words(np.asarray(leaf)) for leaf in leaves]
    layout = structure, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves)
    return cls((jnp if on_device else np).concatenate(words), layout)

  def tree_flatten(self) -> tuple[tuple[Any], Any]:
    return (self.words,), self._layout

  @classmethod
  def tree_unflatten(cls, layout: Any, words: tuple[Any]) -> "Packed[Tree]":
    return cls(*words, layout)

  def unpacked(self) -> Tree:
    """The pytree again, within a jitted function."""
    structure, specs = self._layout
    leaves, at = [], 0
    for shape, dtype in specs:
      size = math.prod(shape)
      leaves.append(_of_words(self.words[at : at + size], dtype).reshape(shape))
      at += size
    # Each in a buffer within the program: what reads it has no argument's address, which is another in each call.
    return lax.optimization_barrier(jax.tree.unflatten(structure, leaves))


def unpack[Tree](tree: Tree | Packed[Tree]) -> Tree:
  """The tree of a function that takes it as it is or `Packed`."""
  return tree.unpacked() if isinstance(tree, Packed) else tree


def _words(leaf: np.ndarray) -> np.ndarray:
  flat = leaf.reshape(-1)
  return flat.astype(np.int32) if _checked_is_bool(leaf.dtype) else flat.view(np.int32)


def _words_on_device(leaf: Any) -> jax.Array:
  flat = jnp.reshape(leaf, -1)
  return flat.astype(jnp.int32) if _checked_is_bool(leaf.dtype) else lax.bitcast_convert_type(flat, jnp.int32)


def _of_words(words: jax.Array, dtype: np.dtype) -> jax.Array:
  return words != 0 if _checked_is_bool(dtype) else lax.bitcast_convert_type(words, dtype)


def _checked_is_bool(dtype: Any) -> bool:
  kind = np.dtype(dtype)
  if kind.kind != "b" and kind.itemsize != 4:
    raise TypeError(f"Packed takes arrays of 32 bits and bools, not {kind.name}")
  return kind.kind == "b"
