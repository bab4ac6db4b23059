"""Folders that training writes: a model as Hugging Face has it, and a state to go on from."""

import json
import os
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kvc_jax.checkpoint.hf_rules import rules_for
from kvc_jax.config import LlamaConfig
from kvc_jax.errors import InputError
from kvc_jax.training.language_model import Params, Progress
from kvc_jax.training.recall_corpus import BOS, EOS, tokenizer_config

_PARAMS = ("params-0.safetensors", "params-1.safetensors")
_MOMENTS = "moments.safetensors"
_STATE = "state.json"


def hf_config(config: LlamaConfig) -> dict[str, Any]:
  """Contents of config.json."""
  return {
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
      "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
      "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
      "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
      "max_position_embeddings": config.max_position_embeddings, "hidden_act": "silu",
      "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope.theta,
      "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": config.tie_embeddings,
      "bos_token_id": BOS, "eos_token_id": EOS, "dtype": "bfloat16"}


def export_model(folder: pathlib.Path, params: Params, config: LlamaConfig, tokenizer: pathlib.Path) -> None:
  """Writes a Hugging Face folder with the parameters in bf16, in place of what was there."""
  staged = _staged(folder)
  tensors = {}
  for rule in rules_for(config):
    value = np.asarray(params[".".join(rule.path)]).astype(ml_dtypes.bfloat16)
    for layer, key in enumerate(rule.keys(config.num_layers)):
      tensor = value[layer] if rule.stacked else value
      tensors[key] = np.ascontiguousarray(tensor.T if rule.transpose else tensor)
  _save(staged / "model.safetensors", tensors)
  shutil.copyfile(tokenizer, staged / "tokenizer.json")
  _write_json(staged / "config.json", hf_config(config))
  _write_json(staged / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
  _write_json(staged / "tokenizer_config.json", tokenizer_config(config.max_position_embeddings))
  _swap(staged, folder)


def save_state(folder: pathlib.Path, state: Progress, notes: dict[str, Any], *, moments: bool) -> None:
  """Writes a state to go on from, in place of what was there.

  Args:
    folder: holds the parameters in two files of half the size each, `state.json`, and maybe the moments.
    state: parameters and moments, f32.
    notes: JSON values, such as the number of steps.
    moments: also write Adam's moments; without them training goes on with fresh ones.
  """
  staged = _staged(folder)
  names = sorted(state.params, key=lambda name: state.params[name].size)
  halves: tuple[list[str], list[str]] = ([], [])
  sizes = [0, 0]
  for name in reversed(names):
    lighter = int(sizes[1] < sizes[0])
    halves[lighter].append(name)
    sizes[lighter] += state.params[name].size
  for file, half in zip(_PARAMS, halves, strict=True):
    _save(staged / file, {name: np.asarray(state.params[name]) for name in half})
  if moments:
    _save(staged / _MOMENTS, {
        "count": np.asarray(state.adam.count),
        **{f"mean.{name}": np.asarray(value) for name, value in state.adam.mu.items()},
        **{f"square.{name}": np.asarray(value) for name, value in state.adam.nu.items()}})
  _write_json(staged / _STATE, notes)
  _swap(staged, folder)


def load_state(folder: pathlib.Path) -> tuple[Progress, dict[str, Any]]:
  """What `save_state` wrote, and its notes.

  Raises:
    InputError: a file is missing or damaged, or is of another model.
  """
  try:
    values = {name: value for file in _PARAMS for name, value in load_file(folder / file).items()}
    notes = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    moments = load_file(folder / _MOMENTS) if (folder / _MOMENTS).is_file() else None
  except (OSError, SafetensorError, ValueError) as e:
    raise InputError(f"{folder} holds no state of a training ({e}); give a folder that train_recall.py wrote") from None
  state = Progress.start({name: jnp.asarray(value) for name, value in values.items()})
  if moments is not None:
    mean, square = (
        {name: jnp.asarray(moments[f"{kind}.{name}"]) for name in values} for kind in ("mean", "square"))
    state = Progress(state.params, state.adam._replace(count=jnp.asarray(moments["count"]), mu=mean, nu=square))
  return state, notes


def check_same_model(params: Params, fresh: Params, folder: pathlib.Path) -> None:
  """Raises InputError unless both have the same parameters."""
  if {name: value.shape for name, value in params.items()} != {name: value.shape for name, value in fresh.items()}:
    raise InputError(
        f"{folder} holds a model of another shape; give the settings that it was trained with")


def _save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  save_file(tensors, path, metadata={"format": "pt"})
  path.chmod(0o644)


def _staged(folder: pathlib.Path) -> pathlib.Path:
  staged = folder.with_name(folder.name + ".writing")
  shutil.rmtree(staged, ignore_errors=True)
  staged.mkdir(parents=True)
  return staged


def _swap(staged: pathlib.Path, folder: pathlib.Path) -> None:
  old = folder.with_name(folder.name + ".old")
  shutil.rmtree(old, ignore_errors=True)
  if folder.exists():
    os.replace(folder, old)
  os.replace(staged, folder)
  shutil.rmtree(old, ignore_errors=True)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
