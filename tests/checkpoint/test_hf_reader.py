"""Hugging Face weights land in the right place, and every fault is named."""

import json
import shutil

import numpy as np
import pytest
from hf_folders import (
    INDEX,
    edit_json,
    hf_config,
    hf_tensors,
    truncate,
    write_folder,
    write_raw_safetensors,
)
from safetensors.numpy import save_file

from kvc_jax.checkpoint.hf_reader import read_params
from kvc_jax.config import LlamaConfig
from kvc_jax.errors import InputError

LAYER_TENSORS = {
    ("layers", "attention", "q_proj", "kernel"): "self_attn.q_proj.weight",
    ("layers", "attention", "k_proj", "kernel"): "self_attn.k_proj.weight",
    ("layers", "attention", "v_proj", "kernel"): "self_attn.v_proj.weight",
    ("layers", "attention", "o_proj", "kernel"): "self_attn.o_proj.weight",
    ("layers", "attention", "q_proj", "bias"): "self_attn.q_proj.bias",
    ("layers", "attention", "k_proj", "bias"): "self_attn.k_proj.bias",
    ("layers", "attention", "v_proj", "bias"): "self_attn.v_proj.bias",
    ("layers", "attention", "o_proj", "bias"): "self_attn.o_proj.bias",
    ("layers", "mlp", "gate_proj", "kernel"): "mlp.gate_proj.weight",
    ("layers", "mlp", "up_proj", "kernel"): "mlp.up_proj.weight",
    ("layers", "mlp", "down_proj", "kernel"): "mlp.down_proj.weight",
    ("layers", "mlp", "gate_proj", "bias"): "mlp.gate_proj.bias",
    ("layers", "mlp", "up_proj", "bias"): "mlp.up_proj.bias",
    ("layers", "mlp", "down_proj", "bias"): "mlp.down_proj.bias",
    ("layers", "input_norm", "weight"): "input_layernorm.weight",
    ("layers", "post_attention_norm", "weight"): "post_attention_layernorm.weight",
}


def load(folder, **options):
  params = read_params(folder, LlamaConfig.from_folder(folder), **options)
  return {path: param.load() for path, param in params.items()}


def refusal(folder):
  """The message with which a folder is refused; one line always."""
  with pytest.raises(InputError) as error:
    load(folder)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("biases", [False, True])
def test_tensors_are_stacked_and_kernels_transposed(tmp_path, shards, biases):
  config = hf_config(attention_bias=biases, mlp_bias=biases)
  tensors = hf_tensors(config)
  params = load(write_folder(tmp_path / "m", config, tensors, shards=shards))
  np.testing.assert_array_equal(params.pop(("embed", "embedding")), tensors["model.embed_tokens.weight"])
  np.testing.assert_array_equal(params.pop(("lm_head", "embedding")), tensors["lm_head.weight"])
  np.testing.assert_array_equal(params.pop(("norm", "weight")), tensors["model.norm.weight"])
  assert len(params) == (16 if biases else 9)
  for path, stacked in params.items():
    for layer in range(3):
      tensor = tensors[f"model.layers.{layer}.{LAYER_TENSORS[path]}"]
      np.testing.assert_array_equal(stacked[layer], tensor.T)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_dtypes_are_kept_or_rounded_to_nearest(tmp_path, stored, wanted):
  config = hf_config()
  tensors = hf_tensors(config, stored)
  folder = write_folder(tmp_path / "m", config, tensors)
  kept = load(folder)["embed", "embedding"]
  assert kept.dtype == stored
  np.testing.assert_array_equal(kept, tensors["model.embed_tokens.weight"])
  cast = load(folder, choose_dtype=lambda own: np.dtype(wanted))["embed", "embedding"]
  assert cast.dtype == wanted
  np.testing.assert_array_equal(cast, tensors["model.embed_tokens.weight"].astype(np.float32).astype(wanted))


def test_the_dtype_of_most_values_is_the_models_own(tmp_path):
  tensors = hf_tensors(hf_config(), "bfloat16")
  tensors |= {key: value.astype(np.float32) for key, value in tensors.items() if "norm" in key}
  params = load(write_folder(tmp_path / "m", tensors=tensors))
  assert {value.dtype.name for value in params.values()} == {"bfloat16"}


def test_float64_is_rounded_to_float32(tmp_path):
  tensors = hf_tensors(hf_config(), "float64")
  params = load(write_folder(tmp_path / "m", tensors=tensors))
  assert params["norm", "weight"].dtype == np.float32
  np.testing.assert_array_equal(params["norm", "weight"], tensors["model.norm.weight"].astype(np.float32))


def test_progress_counts_the_bytes_of_the_parameters(tmp_path):
  folder = write_folder(tmp_path / "m", dtype="bfloat16")
  counted = []
  params = load(folder, on_bytes=counted.append)
  assert sum(counted) == sum(value.nbytes for value in params.values())


def test_a_tied_models_head_and_old_buffers_are_passed_over(tmp_path):
  config = hf_config(tie_word_embeddings=True)
  tensors = hf_tensors(config)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  for layer in range(3):
    tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
  params = load(write_folder(tmp_path / "m", config, tensors))
  assert ("lm_head", "embedding") not in params
  assert len(params) == 11


# Faults of the folder.


def test_a_folder_without_weights(tmp_path):
  folder = write_folder(tmp_path / "m")
  (folder / "model.safetensors").unlink()
  assert f"{folder} holds no weights" in refusal(folder)


@pytest.mark.parametrize(("name", "words"), [
    ("pytorch_model.bin", "PyTorch weights only; convert them to safetensors"),
    ("consolidated.00.pth", "PyTorch weights only; convert them to safetensors"),
    ("model.Q4.gguf", "GGUF weights only"),
    ("model-00001-of-00002.safetensors", "neither model.safetensors nor model.safetensors.index.json"),
])
def test_a_folder_with_other_weights_only(tmp_path, name, words):
  folder = write_folder(tmp_path / "m")
  (folder / "model.safetensors").rename(folder / name)
  assert words in refusal(folder)


def test_a_missing_shard(tmp_path):
  folder = write_folder(tmp_path / "m", shards=3)
  shard = folder / "model-00002-of-00003.safetensors"
  shard.unlink()
  assert f"{shard} is missing, but {INDEX} names it" in refusal(folder)


# Faults of a file.


def test_a_truncated_shard(tmp_path):
  folder = write_folder(tmp_path / "m", shards=2)
  shard = folder / "model-00002-of-00002.safetensors"
  size = shard.stat().st_size
  truncate(shard, 10)
  assert f"{shard} is cut off: it has {size - 10} of {size} bytes" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_a_shard_cut_off_in_its_header(tmp_path, keep):
  folder = write_folder(tmp_path / "m")
  shard = folder / "model.safetensors"
  shard.write_bytes(shard.read_bytes()[:keep])
  assert f"{shard} is cut off or is no safetensors file ({keep} bytes)" in refusal(folder)


@pytest.mark.parametrize("header", [b'{"model.norm.weight": ', b"[1, 2]", b"\xff\xfe{}", b'{"a": 1}'])
def test_a_damaged_header(tmp_path, header):
  folder = write_folder(tmp_path / "m")
  write_raw_safetensors(folder / "model.safetensors", header)
  assert f"{folder / 'model.safetensors'} has a damaged header" in refusal(folder)


def test_a_page_saved_in_place_of_a_shard(tmp_path):
  folder = write_folder(tmp_path / "m")
  (folder / "model.safetensors").write_text("<html><body>404: not found</body></html>")
  assert "is no safetensors file" in refusal(folder)


def test_a_git_lfs_pointer(tmp_path):
  folder = write_folder(tmp_path / "m")
  (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  assert "is a Git LFS pointer and not the weights; run `git lfs pull`" in refusal(folder)


def test_a_folder_in_place_of_a_shard(tmp_path):
  folder = write_folder(tmp_path / "m")
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors").mkdir()
  assert f"{folder / 'model.safetensors'} cannot be read" in refusal(folder)


def test_bytes_behind_the_last_tensor(tmp_path):
  folder = write_folder(tmp_path / "m")
  shard = folder / "model.safetensors"
  shard.write_bytes(shard.read_bytes() + b"0123")
  assert f"{shard} is damaged" in refusal(folder)


def test_an_offset_that_does_not_fit_the_shape(tmp_path):
  folder = write_folder(tmp_path / "m")
  header = {"model.norm.weight": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}
  write_raw_safetensors(folder / "model.safetensors", header, bytes(16))
  assert f"{folder / 'model.safetensors'} is damaged" in refusal(folder)


# Faults of a tensor.


@pytest.mark.parametrize(("dtype", "name"), [("int8", "I8"), ("int64", "I64"), ("bool", "BOOL"), ("uint8", "U8")])
def test_a_tensor_that_is_not_of_a_float_dtype(tmp_path, dtype, name):
  key = "model.layers.1.mlp.up_proj.weight"
  tensors = hf_tensors(hf_config())
  tensors[key] = np.ones(tensors[key].shape, dtype)
  folder = write_folder(tmp_path / "m", tensors=tensors)
  assert f"{key} in {folder / 'model.safetensors'} has dtype {name}" in refusal(folder)


def test_an_8_bit_float_is_refused_by_name(tmp_path):
  key = "model.norm.weight"
  tensors = hf_tensors(hf_config())
  folder = write_folder(tmp_path / "m", tensors={k: v for k, v in tensors.items() if k != key}, shards=2)
  header = {key: {"dtype": "F8_E4M3", "shape": [12], "data_offsets": [0, 12]}}
  write_raw_safetensors(folder / "extra.safetensors", header, bytes(12))
  index = json.loads((folder / INDEX).read_text())
  edit_json(folder / INDEX, weight_map=index["weight_map"] | {key: "extra.safetensors"})
  assert f"{key} in {folder / 'extra.safetensors'} has dtype F8_E4M3" in refusal(folder)


def test_a_dtype_that_safetensors_does_not_know(tmp_path):
  folder = write_folder(tmp_path / "m")
  header = {"model.norm.weight": {"dtype": "Q3", "shape": [12], "data_offsets": [0, 12]}}
  write_raw_safetensors(folder / "model.safetensors", header, bytes(12))
  assert f"model.norm.weight in {folder / 'model.safetensors'} has the unknown dtype 'Q3'" in refusal(folder)


def test_a_tensor_of_another_shape(tmp_path):
  key = "model.layers.2.self_attn.k_proj.weight"
  tensors = hf_tensors(hf_config())
  tensors[key] = tensors[key].T.copy()
  folder = write_folder(tmp_path / "m", tensors=tensors)
  words = f"{key} in {folder / 'model.safetensors'} has shape [12, 8], but config.json asks for [8, 12]"
  assert words in refusal(folder)


def test_a_missing_tensor(tmp_path):
  tensors = hf_tensors(hf_config())
  del tensors["model.layers.2.mlp.up_proj.weight"]
  folder = write_folder(tmp_path / "m", tensors=tensors)
  assert f"{folder} lacks model.layers.2.mlp.up_proj.weight" in refusal(folder)


def test_a_missing_head_hints_at_tied_embeddings(tmp_path):
  tensors = hf_tensors(hf_config())
  del tensors["lm_head.weight"]
  folder = write_folder(tmp_path / "m", tensors=tensors)
  assert "lacks lm_head.weight; set tie_word_embeddings in config.json" in refusal(folder)


@pytest.mark.parametrize("key", [
    "model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "score.weight"])
def test_a_tensor_that_the_model_does_not_have(tmp_path, key):
  tensors = hf_tensors(hf_config()) | {key: np.ones(3, np.float32)}
  folder = write_folder(tmp_path / "m", tensors=tensors)
  assert f"{folder / 'model.safetensors'} holds {key}, which" in refusal(folder)


def test_weights_too_large_for_float16(tmp_path):
  tensors = hf_tensors(hf_config())
  tensors["model.norm.weight"][3] = 1e6
  folder = write_folder(tmp_path / "m", tensors=tensors)
  with pytest.raises(InputError, match=r"norm\.weight does not fit float16; use bfloat16 or float32"):
    load(folder, choose_dtype=lambda own: np.dtype("float16"))


# Faults of the index.


def test_a_tensor_in_two_shards(tmp_path):
  folder = write_folder(tmp_path / "m", shards=2)
  first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
  index = json.loads((folder / INDEX).read_text())["weight_map"]
  tensors = hf_tensors(hf_config())
  key = next(key for key in index if index[key] == second.name)
  save_file({k: tensors[k] for k in index if index[k] == first.name or k == key}, first)
  assert f"{key} is in both {first.name} and {second.name}" in refusal(folder)


def test_an_index_that_names_an_absent_tensor(tmp_path):
  folder = write_folder(tmp_path / "m", shards=2)
  weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
  name = weight_map["model.norm.weight"]
  edit_json(folder / INDEX, weight_map=weight_map | {"model.layers.9.mlp.up_proj.weight": name})
  assert f"places model.layers.9.mlp.up_proj.weight in {name}, which does not hold it" in refusal(folder)


def test_an_index_that_names_the_wrong_shard(tmp_path):
  folder = write_folder(tmp_path / "m", shards=2)
  weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
  other = next(name for name in weight_map.values() if name != weight_map["model.norm.weight"])
  edit_json(folder / INDEX, weight_map=weight_map | {"model.norm.weight": other})
  assert f"places model.norm.weight in {other}, which does not hold it" in refusal(folder)


def test_an_index_that_leaves_out_a_tensor(tmp_path):
  folder = write_folder(tmp_path / "m", shards=2)
  weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
  del weight_map["model.norm.weight"]
  edit_json(folder / INDEX, weight_map=weight_map)
  assert f"holds model.norm.weight, which {INDEX} does not name" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": ["a"]}', '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path, text):
  folder = write_folder(tmp_path / "m", shards=2)
  (folder / INDEX).write_text(text)
  assert f"{folder / INDEX} holds no weight_map" in refusal(folder)


def test_an_empty_index(tmp_path):
  folder = write_folder(tmp_path / "m", shards=2)
  (folder / INDEX).write_text('{"weight_map": {}}')
  assert f"{folder / INDEX} names no tensors" in refusal(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/model.safetensors", "", ".."])
def test_an_index_cannot_reach_out_of_its_folder(tmp_path, name):
  folder = write_folder(tmp_path / "m", shards=2)
  shutil.copytree(folder, tmp_path / "other")
  edit_json(folder / INDEX, weight_map={"model.norm.weight": name})
  assert f"names the shard {name!r}, which is not a plain file name" in refusal(folder)
