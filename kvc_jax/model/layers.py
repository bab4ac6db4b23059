"""The parts of one Llama decoder layer, as Flax NNX modules.

Tokens come flat, [T]: one sequence's chunk in prefill, one token of each
sequence in decode. Nothing here knows which; only `attend` does.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvc_jax.config import LlamaConfig
from kvc_jax.model.rope import apply_rope


@runtime_checkable
class Attend(Protocol):
  """Attention of one layer, given to the model as a function.

  Called with the layer's index (i32 []), q [T, H*G, D], k and v [T, H, D] (q and k
  after RoPE; query head h*G + g belongs to KV head h) and a state that is any
  pytree. Returns the output [T, H*G, D] and the state, of unchanged structure.
  """

  def __call__(
      self, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, state: Any
  ) -> tuple[jax.Array, Any]: ...


def _linear(inputs: int, outputs: int, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
  # f32 weights ask for f32 products; the GPU default for f32 is TF32.
  precision = lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
  return nnx.Linear(
      inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, precision=precision, rngs=rngs)


def _side_by_side(*linears: nnx.Linear) -> nnx.Linear:
  """One product in place of several of one input: their outputs stand behind each other. Deletes theirs."""
  first = linears[0]
  kernels = [linear.kernel[...] for linear in linears]
  outputs = sum(kernel.shape[1] for kernel in kernels)
  has_bias = first.bias is not None
  merged = nnx.eval_shape(
      lambda: _linear(kernels[0].shape[0], outputs, has_bias, kernels[0].dtype, nnx.Rngs(0)))
  replaced = [kernels, [linear.bias[...] for linear in linears]] if has_bias else [kernels]
  merged.kernel = nnx.Param(jnp.concatenate(kernels, axis=1))
  if has_bias:
    merged.bias = nnx.Param(jnp.concatenate(replaced[1]))
  if not isinstance(kernels[0], jax.core.Tracer):  # as in `abstract_llama`
    # Modules refer to one another, so that these would live on until Python looks for such circles.
    jax.block_until_ready(nnx.state(merged))
    for array in itertools.chain.from_iterable(replaced):
      array.delete()
  return merged


class RMSNorm(nnx.Module):
  """Root-mean-square norm; the mean in f32, the weight applied in the parameters' dtype."""

  def __init__(self, size: int, eps: float, dtype: DTypeLike):
    self.weight = nnx.Param(jnp.ones((size,), dtype))
    self.eps = eps

  def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return self.weight[...] * x32.astype(x.dtype)


class Attention(nnx.Module):
  """Projections and RoPE around an `attend` function (grouped-query attention)."""

  def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs):
    self.head_dim = config.head_dim
    hidden, bias = config.hidden_size, config.attention_bias
    self.q_proj = _linear(hidden, config.num_heads * config.head_dim, bias, dtype, rngs)
    self.k_proj = _linear(hidden, config.num_kv_heads * config.head_dim, bias, dtype, rngs)
    self.v_proj = _linear(hidden, config.num_kv_heads * config.head_dim, bias, dtype, rngs)
    self.o_proj = _linear(config.num_heads * config.head_dim, hidden, bias, dtype, rngs)

  def __call__(
      self, x: jax.Array, layer: jax.Array, positions: jax.Array, frequencies: np.ndarray,
      attend: Attend, state: Any,
  ) -> tuple[jax.Array, Any]:
    tokens = x.shape[0]
    q, k, v = (rows.reshape(tokens, -1, self.head_dim) for rows in self._project(x))
    q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
    out, state = attend(layer, q, k, v, state)
    return self.o_proj(out.reshape(tokens, -1).astype(x.dtype)), state

  def _project(self, x: jax.Array) -> Sequence[jax.Array]:
    return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class MergedAttention(Attention):
  """The same with one product for queries, keys and values."""

  def __init__(self, attention: Attention):
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    self.head_dim = attention.head_dim
    self.splits = tuple(itertools.accumulate(part.kernel.shape[1] for part in parts[:2]))
    self.qkv_proj = _side_by_side(*parts)
    self.o_proj = attention.o_proj

  def _project(self, x: jax.Array) -> Sequence[jax.Array]:
    return jnp.split(self.qkv_proj(x), self.splits, axis=-1)


class MLP(nnx.Module):
  """SwiGLU feed-forward network."""

  def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs):
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    self.gate_proj = _linear(hidden, inner, bias, dtype, rngs)
    self.up_proj = _linear(hidden, inner, bias, dtype, rngs)
    self.down_proj = _linear(inner, hidden, bias, dtype, rngs)

  def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
    gate, up = self._project(x)
    return self.down_proj(nnx.silu(gate) * up)

  def _project(self, x: jax.Array) -> Sequence[jax.Array]:
    return self.gate_proj(x), self.up_proj(x)


class MergedMLP(MLP):
  """The same with one product for gate and up."""

  def __init__(self, mlp: MLP):
    self.gate_up_proj = _side_by_side(mlp.gate_proj, mlp.up_proj)
    self.down_proj = mlp.down_proj

  def _project(self, x: jax.Array) -> Sequence[jax.Array]:
    return jnp.split(self.gate_up_proj(x), 2, axis=-1)


class DecoderLayer(nnx.Module):
  """Pre-norm attention and feed-forward with residual connections."""

  def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs):
    self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
    self.attention = Attention(config, dtype, rngs)
    self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
    self.mlp = MLP(config, dtype, rngs)

  def __call__(
      self, x: jax.Array, layer: jax.Array, positions: Int[Array, " tokens"], frequencies: np.ndarray,
      attend: Attend, state: Any,
  ) -> tuple[jax.Array, Any]:
    out, state = self.attention(self.input_norm(x), layer, positions, frequencies, attend, state)
    x = x + out
    return x + self.mlp(self.post_attention_norm(x)), state

  def merge_products(self) -> None:
    """Replaces products of one input by one: fewer and larger ones read the weights faster."""
    self.attention = MergedAttention(self.attention)
    self.mlp = MergedMLP(self.mlp)
