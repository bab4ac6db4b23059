"""The table that maps Hugging Face Llama keys to this package's parameters.

Hugging Face stores one tensor per layer and linear weights as [out, in]; here
the layers of a parameter are stacked on a leading axis L and linear kernels are
[in, out]. Its RoPE pairs (i, i + D/2) as ours does, so nothing is permuted.
"""

import dataclasses
import re

from kvc_jax.config import LlamaConfig

Path = tuple[str, ...]
"""Where a parameter sits in the model's state, e.g. ("layers", "mlp", "up_proj", "kernel")."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """One parameter and the tensors that fill it.

  A `key` with `{layer}` stands for L tensors, stacked in layer order on axis 0.
  """

  key: str
  path: Path
  transpose: bool = False

  @property
  def stacked(self) -> bool:
    """Whether the parameter has the leading layer axis."""
    return "{layer}" in self.key

  def keys(self, num_layers: int) -> tuple[str, ...]:
    """The tensors' names, in the order in which they are stacked."""
    if not self.stacked:
      return (self.key,)
    return tuple(self.key.format(layer=layer) for layer in range(num_layers))

  def tensor_shape(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each tensor on disk, given the parameter's shape."""
    shape = param_shape[1:] if self.stacked else param_shape
    return shape[::-1] if self.transpose else shape


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LAYER = "model.layers.{layer}."

_EMBED = Rule(key="model.embed_tokens.weight", path=("embed", "embedding"))
_NORM = Rule(key="model.norm.weight", path=("norm", "weight"))
_HEAD = Rule(key="lm_head.weight", path=("lm_head", "embedding"))
_LAYER_NORMS = (
    Rule(key=_LAYER + "input_layernorm.weight", path=("layers", "input_norm", "weight")),
    Rule(key=_LAYER + "post_attention_layernorm.weight", path=("layers", "post_attention_norm", "weight")),
)

# Buffers that old checkpoints carry; the model computes them from its config.
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def _linear(hf_module: str, module: str, name: str, bias: bool) -> tuple[Rule, ...]:
  key, path = f"{_LAYER}{hf_module}.{name}", ("layers", module, name)
  weight = Rule(key=key + ".weight", path=(*path, "kernel"), transpose=True)
  return (weight, Rule(key=key + ".bias", path=(*path, "bias"))) if bias else (weight,)


def rules_for(config: LlamaConfig) -> tuple[Rule, ...]:
  """The rules of one model: one for each of its parameters."""
  linear = [_linear("self_attn", "attention", name, config.attention_bias) for name in _ATTENTION]
  linear += [_linear("mlp", "mlp", name, config.mlp_bias) for name in _MLP]
  head = () if config.tie_embeddings else (_HEAD,)
  return (_EMBED, *_LAYER_NORMS, *(rule for rules in linear for rule in rules), _NORM, *head)


def is_ignorable(key: str, config: LlamaConfig) -> bool:
  """Whether a tensor may be left unread: a computed buffer, or the head of a model with tied embeddings."""
  return bool(_COMPUTED.fullmatch(key)) or (config.tie_embeddings and key == _HEAD.key)
