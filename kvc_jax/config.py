"""Model configuration, read from a Hugging Face `config.json`."""

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

from kvc_jax.errors import InputError

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_ACTIVATIONS = ("silu", "swish")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary position embedding (RoPE): base frequency and how it is scaled.

  `kind` "linear" divides every frequency by `factor`; "llama3" divides the low
  ones only, with a smooth step between (Llama 3.1 model card).
  """

  theta: float = 10_000.0
  kind: Literal["default", "linear", "llama3"] = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192

  @classmethod
  def from_hf(cls, hf: dict[str, Any]) -> "RopeConfig":
    """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (older).

    Raises:
      InputError: the scaling type is not one of the three known, or lacks a number.
    """
    raw = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = raw.get("rope_type", raw.get("type", "default"))
    theta = _positive("rope_theta", raw.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    if raw.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1) != 1:
      raise InputError("config.json: partial_rotary_factor is not 1, which is not supported")
    if kind == "default":
      return cls(theta=theta)
    if kind not in ("linear", "llama3"):
      raise InputError(
          f"config.json: RoPE type {kind!r} is not supported; known types are default, linear, llama3")
    names = {"linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings")}[kind]
    missing = [n for n in names if n not in raw]
    if missing:
      raise InputError(f"config.json: RoPE type {kind!r} lacks {', '.join(missing)}; add it to rope_parameters")
    if kind == "linear":
      return cls(theta=theta, kind="linear", factor=_positive("factor", raw["factor"]))
    low, high = (_positive(n, raw[n]) for n in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
      raise InputError(f"config.json: low_freq_factor ({low}) must be below high_freq_factor ({high})")
    return cls(
        theta=theta, kind="llama3", factor=_positive("factor", raw["factor"]), low_freq_factor=low,
        high_freq_factor=high, original_max_position=int(raw["original_max_position_embeddings"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """Shape of a Llama-family decoder (Llama 2, 3, 3.1, 3.2; Mistral without sliding window)."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rms_norm_eps: float
  rope: RopeConfig
  tie_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  max_position_embeddings: int = 2048
  eos_token_ids: tuple[int, ...] = ()

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise InputError(
          f"config.json: num_attention_heads ({self.num_heads}) is not a multiple of "
          f"num_key_value_heads ({self.num_kv_heads})")
    if self.head_dim < 2 or self.head_dim % 2:
      raise InputError(
          f"config.json: head_dim is {self.head_dim}, but a positive even number is needed (RoPE turns pairs)")

  @classmethod
  def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
    """Converts the contents of a `config.json`.

    Raises:
      InputError: unknown architecture, activation or RoPE type, an active
        sliding window, quantised weights, or a missing or unfit field.
    """
    _refuse_unsupported(hf)
    heads = _positive_int(hf, "num_attention_heads")
    hidden = _positive_int(hf, "hidden_size")
    head_dim = hf.get("head_dim") or hidden // heads
    eos = hf.get("eos_token_id")
    mistral = hf["architectures"][0] == "MistralForCausalLM"
    return cls(
        vocab_size=_positive_int(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_positive_int(hf, "intermediate_size"),
        num_layers=_positive_int(hf, "num_hidden_layers"),
        num_heads=heads,
        # Where the field is absent, transformers takes 8 for Mistral.
        num_kv_heads=_positive_int(
            {"num_key_value_heads": 8 if mistral else heads, **_given(hf)}, "num_key_value_heads"),
        head_dim=int(head_dim),
        rms_norm_eps=_positive("rms_norm_eps", hf.get("rms_norm_eps", 1e-6)),
        rope=RopeConfig.from_hf(hf),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        attention_bias=not mistral and bool(hf.get("attention_bias", False)),
        mlp_bias=not mistral and bool(hf.get("mlp_bias", False)),
        max_position_embeddings=int(hf.get("max_position_embeddings", 2048)),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )

  @classmethod
  def from_folder(cls, folder: str | pathlib.Path) -> "LlamaConfig":
    """Reads `config.json` in `folder`.

    Raises:
      InputError: the file is missing, is not JSON, or `from_hf` refuses it.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
      hf = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
      raise InputError(f"{path} is missing; give a folder with a Hugging Face or converted model") from None
    except OSError as e:
      raise InputError(f"{path} cannot be read ({e.strerror or e}); check that it is a readable file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
      raise InputError(f"{path} is not valid JSON ({e}); copy it again from its source") from None
    if not isinstance(hf, dict):
      raise InputError(f"{path} holds no JSON object; copy it again from its source")
    try:
      return cls.from_hf(hf)
    except InputError:
      raise
    except (TypeError, ValueError, AttributeError) as e:  # a text where a number belongs, and the like
      raise InputError(f"{path} has a field of the wrong kind ({e}); copy it again from its source") from None


def _refuse_unsupported(hf: dict[str, Any]) -> None:
  architectures = hf.get("architectures") or []
  if len(architectures) != 1 or architectures[0] not in _ARCHITECTURES:
    raise InputError(
        f"config.json: architecture {', '.join(map(str, architectures)) or '(none)'} is not supported; "
        f"known ones are {', '.join(_ARCHITECTURES)}")
  # transformers takes 4096 for a Mistral whose config does not say.
  window = hf.get("sliding_window", 4096 if architectures[0] == "MistralForCausalLM" else None)
  if window is not None and hf.get("use_sliding_window", True):
    raise InputError(
        f"config.json: a sliding window of {window} tokens is active, which is not supported; "
        "use a model without one (such as Mistral-7B v0.2 or later)")
  if hf.get("quantization_config"):
    raise InputError("config.json: the weights are quantised, which is not supported; give bf16, f16 or f32 weights")
  activation = hf.get("hidden_act", "silu")
  if activation not in _ACTIVATIONS:
    raise InputError(
        f"config.json: activation {activation!r} is not supported; known ones are {', '.join(_ACTIVATIONS)}")


def _given(hf: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in hf.items() if value is not None}


def _positive(name: str, value: Any) -> float:
  number = float(value)
  if not (math.isfinite(number) and number > 0):
    raise InputError(f"config.json: {name} is {value!r}, but a positive number is needed")
  return number


def _positive_int(hf: dict[str, Any], name: str) -> int:
  value = hf.get(name)
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise InputError(f"config.json: {name} is {value!r}, but a positive whole number is needed")
  return value
