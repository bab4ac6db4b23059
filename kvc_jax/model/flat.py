"""A model as its arrays in a row, for functions that are called all the time."""

from typing import Any

import jax

from kvc_jax.model.llama import Llama


class _Structure:
  """The tree of a model; comparing one with itself, as every call does, takes no walk through it."""

  def __init__(self, tree: Any):
    self.tree = tree
    self._hash = hash(tree)

  def __eq__(self, other: object) -> bool:
    return self is other or (isinstance(other, _Structure) and self.tree == other.tree)

  def __hash__(self) -> int:
    return self._hash


@jax.tree_util.register_pytree_node_class
class FlatModel:
  """A `Llama` that jit takes apart in microseconds.

  Flax flattens a module in Python at every call of a jitted function: two milliseconds for
  32 layers apart, in which the device may have nothing to do.
  """

  def __init__(self, leaves: tuple[Any, ...], structure: _Structure):
    self._leaves, self._structure = leaves, structure

  @classmethod
  def of(cls, model: Llama) -> "FlatModel":
    """The model's arrays as they are now."""
    leaves, tree = jax.tree.flatten(model)
    return cls(tuple(leaves), _Structure(tree))

  def model(self) -> Llama:
    """The model again; inside a jitted function it costs nothing at run time."""
    return jax.tree.unflatten(self._structure.tree, self._leaves)

  def tree_flatten(self) -> tuple[tuple[Any, ...], _Structure]:
    return self._leaves, self._structure

  @classmethod
  def tree_unflatten(cls, structure: _Structure, leaves: tuple[Any, ...]) -> "FlatModel":
    return cls(tuple(leaves), structure)
