"""Rotary position embedding with the Llama 3.1 and linear scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvc_jax.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
  """Angle per position of each pair of dimensions, f32 [D/2], in radians."""
  freqs = 1.0 / config.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
  freqs = freqs.astype(np.float32)
  if config.kind == "linear":
    return freqs / np.float32(config.factor)
  if config.kind == "llama3":
    return _llama3_scaled(freqs, config)
  return freqs


def _llama3_scaled(freqs: np.ndarray, config: RopeConfig) -> np.ndarray:
  wavelength = 2 * math.pi / freqs
  longest = config.original_max_position / config.low_freq_factor
  shortest = config.original_max_position / config.high_freq_factor
  smooth = (config.original_max_position / wavelength - config.low_freq_factor) / (
      config.high_freq_factor - config.low_freq_factor)
  blended = (1 - smooth) * freqs / config.factor + smooth * freqs
  scaled = np.where(wavelength > longest, freqs / config.factor, freqs)
  middle = (wavelength <= longest) & (wavelength >= shortest)
  return np.where(middle, blended, scaled).astype(np.float32)


def apply_rope(
    x: Float[Array, "tokens heads head_dim"],
    positions: Int[Array, " tokens"],
    frequencies: np.ndarray | jax.Array,
) -> Float[Array, "tokens heads head_dim"]:
  """Rotates each pair (i, i + D/2) by position times frequency; f32 inside, dtype of `x` out."""
  angles = positions.astype(jnp.float32)[:, None] * frequencies  # [T, D/2]
  cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jax.lax.convert_element_type(rotated, x.dtype)
