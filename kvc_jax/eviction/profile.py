"""Head profiles: what share of its tokens each head keeps, from a file."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from kvc_jax.errors import InputError

_FORMAT = "kvc head profile 1"
_LEAST_WEIGHT = 1e-3
"""Of the mean: so much a head gets that kept nothing while calibrating."""


@dataclasses.dataclass(frozen=True, eq=False)
class HeadProfile:
  """Shares of tokens that heads keep, by layer, head and place in the sequence; hashable, equal where its shares are.

  Heads differ from each other in a way that inputs hardly change, so what they kept on some prompts
  (`kvc calibrate`) says what they need on others. As `Compression(allocation=profile)` it gives each head a budget
  of its own that is known before the prompt is read; in a `HeadBias` it shifts a choice among heads.

  Attributes:
    shares: f32 [L, H, bins] share kept of the tokens in each of `bins` equal parts of what was not protected, 0 to 1.
    about: what it was made from (texts), for readers.
  """

  shares: np.ndarray
  about: dict[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    shares = np.array(self.shares, np.float32)
    if shares.ndim != 3 or 0 in shares.shape:
      raise InputError(f"head profile: shares have the shape {list(shares.shape)}; give [layers, KV heads, bins]")
    if not ((shares >= 0) & (shares <= 1)).all():  # NaN fails too
      raise InputError("head profile: shares must be numbers from 0 to 1")
    if not shares.any():
      raise InputError("head profile: no head keeps anything; calibrate on longer prompts or with a lower rate")
    shares.flags.writeable = False
    object.__setattr__(self, "shares", shares)
    object.__setattr__(self, "_key", (shares.shape, shares.tobytes()))
    object.__setattr__(self, "_hash", hash(self._key))  # type: ignore[attr-defined]

  def __eq__(self, other: object) -> bool:
    return self is other or (isinstance(other, HeadProfile) and self._key == other._key)  # type: ignore[attr-defined]

  def __hash__(self) -> int:
    return self._hash  # type: ignore[attr-defined]

  def __repr__(self) -> str:
    layers, heads, bins = self.shares.shape
    return f"HeadProfile({layers} layers, {heads} heads, {bins} bins)"

  @property
  def weights(self) -> np.ndarray:
    """f32 [L, H] share of each head over all places, relative to the mean head; positive."""
    by_head = self.shares.mean(axis=2)
    return np.maximum(by_head / by_head.mean(), _LEAST_WEIGHT).astype(np.float32)

  def check_fits(self, num_layers: int, num_kv_heads: int) -> None:
    """Raises InputError where it was made for a model of another shape."""
    layers, heads, _ = self.shares.shape
    if (layers, heads) != (num_layers, num_kv_heads):
      raise InputError(
          f"the head profile is for {layers} layers of {heads} KV heads, but the model has {num_layers} of "
          f"{num_kv_heads}; calibrate one with this model")

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a safetensors file.

    Raises:
      InputError: it cannot be written.
    """
    try:
      safetensors.numpy.save_file({"shares": self.shares}, path, metadata={**self.about, "format": _FORMAT})
    except (OSError, safetensors.SafetensorError) as e:
      raise InputError(f"cannot write {path} ({e}); give a path that can be written") from None

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "HeadProfile":
    """Reads what `save` wrote.

    Raises:
      InputError: the file is missing, damaged or something else.
    """
    try:
      with safetensors.safe_open(path, framework="numpy") as file:
        about: dict[str, Any] = dict(file.metadata() or {})
        if about.pop("format", None) != _FORMAT or list(file.keys()) != ["shares"]:
          raise InputError(f"{path} is no head profile; make one with kvc calibrate")
        dtype = file.get_slice("shares").get_dtype()
        if dtype != "F32":  # NumPy has no type for some that safetensors knows
          raise InputError(f"{path} has shares of dtype {dtype}, not F32; make one with kvc calibrate")
        shares = file.get_tensor("shares")
    except FileNotFoundError:
      raise InputError(f"{path} is missing; make a head profile with kvc calibrate") from None
    except (OSError, safetensors.SafetensorError) as e:
      raise InputError(f"{path} cannot be read as a head profile ({e}); make one with kvc calibrate") from None
    try:
      return cls(shares, about)
    except (InputError, ValueError, TypeError) as e:
      raise InputError(f"{path}: {e}") from None
