"""Small Hugging Face folders with random weights, and files damaged on purpose."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy's "bfloat16")
import numpy as np
from safetensors.numpy import save_file

ASSET = pathlib.Path(__file__).parents[1] / "assets" / "stories260K"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"


def hf_config(**changes: Any) -> dict[str, Any]:
  """A config.json: three layers, no two sizes alike, so that a wrong axis shows."""
  return {
      "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 12, "intermediate_size": 20,
      "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
      "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, **changes}


def hf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Names and shapes as Hugging Face's LlamaForCausalLM has them, written out by hand."""
  vocab, hidden, inner = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
  q_out = config["num_attention_heads"] * config["head_dim"]
  kv_out = config["num_key_value_heads"] * config["head_dim"]
  linear = {
      "self_attn.q_proj": (q_out, hidden), "self_attn.k_proj": (kv_out, hidden), "self_attn.v_proj": (kv_out, hidden),
      "self_attn.o_proj": (hidden, q_out), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
      "mlp.down_proj": (hidden, inner)}
  shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
  if not config.get("tie_word_embeddings"):
    shapes["lm_head.weight"] = (vocab, hidden)
  for layer in range(config["num_hidden_layers"]):
    prefix = f"model.layers.{layer}."
    shapes[prefix + "input_layernorm.weight"] = (hidden,)
    shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    for name, shape in linear.items():
      shapes[f"{prefix}{name}.weight"] = shape
      if config.get("attention_bias" if "attn" in name else "mlp_bias"):
        shapes[f"{prefix}{name}.bias"] = shape[:1]
  return shapes


def hf_tensors(config: Mapping[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
  """Random weights for a config, as Hugging Face stores them."""
  rng = np.random.default_rng(seed)
  return {key: rng.standard_normal(shape).astype(dtype) for key, shape in hf_shapes(config).items()}


def write_folder(
    folder: pathlib.Path, config: Mapping[str, Any] | None = None, tensors: Mapping[str, np.ndarray] | None = None,
    *, shards: int = 1, dtype: str = "float32",
) -> pathlib.Path:
  """Writes config, tokenizer and weights; several shards take the tensors in turn."""
  config = hf_config() if config is None else config
  tensors = hf_tensors(config, dtype) if tensors is None else tensors
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config))
  for name in TOKENIZER:
    shutil.copyfile(ASSET / name, folder / name)
  if shards == 1:
    save_file(dict(tensors), folder / "model.safetensors")
    return folder
  weight_map = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(tensors)}
  for name in set(weight_map.values()):
    save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
  (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return folder


def write_raw_safetensors(path: pathlib.Path, header: Any, data: bytes = b"") -> None:
  """Writes a safetensors file with any header at all; `header` is JSON, or bytes as they are."""
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def truncate(path: pathlib.Path, drop: int) -> None:
  """Cuts `drop` bytes off the end of a file."""
  path.write_bytes(path.read_bytes()[:-drop])


def edit_json(path: pathlib.Path, **changes: Any) -> None:
  """Sets fields of a JSON file; None removes one."""
  value = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
