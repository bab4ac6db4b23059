"""Models come back from disk exactly, and a damaged checkpoint is named."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hf_folders import edit_json, hf_config, hf_tensors, truncate, write_folder

from kvc_jax.checkpoint.convert import convert
from kvc_jax.checkpoint.hf_reader import param_shapes
from kvc_jax.checkpoint.store import load_model, save_params
from kvc_jax.config import LlamaConfig
from kvc_jax.errors import InputError
from kvc_jax.model.llama import Llama


def arrays(model):
  return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_equal_models(first, second):
  a, b = arrays(first), arrays(second)
  assert a.keys() == b.keys()
  for path, value in a.items():
    assert value.dtype == b[path].dtype, path
    np.testing.assert_array_equal(value, b[path], err_msg=str(path))


def refusal(path, **options):
  with pytest.raises(InputError) as error:
    load_model(path, **options)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
  """A converted folder; tests damage copies of it."""
  base = tmp_path_factory.mktemp("pristine")
  return convert(write_folder(base / "hf"), base / "converted", progress=False)


@pytest.fixture
def converted(pristine, tmp_path):
  return shutil.copytree(pristine, tmp_path / "converted")


@pytest.mark.parametrize(("dtype", "shards", "changes"), [
    ("float32", 1, {}),
    ("bfloat16", 3, {"tie_word_embeddings": True}),
    ("float16", 2, {"attention_bias": True, "mlp_bias": True}),
    ("bfloat16", 1, {"attention_bias": True}),
    ("float16", 1, {}),
])
def test_a_converted_model_equals_the_hugging_face_one(tmp_path, changes, dtype, shards):
  config = hf_config(**changes)
  source = write_folder(tmp_path / "hf", config, hf_tensors(config, dtype), shards=shards)
  target = convert(source, tmp_path / "converted", progress=False)
  direct, stored = load_model(source), load_model(target)
  assert_equal_models(direct, stored)
  assert direct.embed.embedding.dtype == ("bfloat16" if dtype == "float16" else dtype)
  assert_equal_models(load_model(source, jnp.float16), load_model(target, jnp.float16))


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_conversion_to_a_dtype_rounds_as_loading_does(tmp_path, wanted):
  source = write_folder(tmp_path / "hf")
  target = convert(source, tmp_path / "converted", dtype=wanted, progress=False)
  assert_equal_models(load_model(source, wanted), load_model(target, wanted))
  assert load_model(target).embed.embedding.dtype == ("bfloat16" if wanted == "float16" else wanted)


def test_a_loaded_model_runs_on_the_default_device(pristine):
  model = load_model(str(pristine))
  assert isinstance(model, Llama)
  leaf = model.layers.mlp.up_proj.kernel[...]
  assert leaf.devices() == jnp.zeros(()).devices()
  hidden, _ = model(jnp.arange(5), jnp.arange(5), lambda layer, q, k, v, state: (q, state))
  assert model.logits(hidden).shape == (5, 40)
  assert bool(jnp.isfinite(model.logits(hidden)).all())


def test_saved_parameters_can_be_read_with_plain_orbax(tmp_path):
  params = {("a", "b"): np.arange(6.0).reshape(2, 3), ("c",): jnp.ones(4, jnp.bfloat16)}
  save_params(tmp_path / "params", params)
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.restore(tmp_path / "params")
  np.testing.assert_array_equal(tree["a"]["b"], params["a", "b"])
  assert tree["c"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(tree["c"], np.ones(4))


def test_a_model_can_be_saved_without_hugging_face(tmp_path):
  raw = hf_config(tie_word_embeddings=True)
  shapes = param_shapes(LlamaConfig.from_hf(raw))
  params = {path: np.full(shape, i, np.float32) for i, (path, shape) in enumerate(shapes.items())}
  save_params(tmp_path / "params", params)
  (tmp_path / "config.json").write_text(json.dumps(raw))
  loaded = arrays(load_model(tmp_path))
  assert loaded.keys() == params.keys()
  for path, value in params.items():
    np.testing.assert_array_equal(loaded[path], value)


def test_saving_over_a_folder_is_refused(tmp_path):
  with pytest.raises(InputError, match="exists; give the name of a new folder"):
    save_params(tmp_path, {("a",): np.ones(3)})


def test_orbax_is_silent(pristine, tmp_path, capfd):
  convert(pristine.parent / "hf", tmp_path / "again", progress=True)
  load_model(tmp_path / "again")
  load_model(pristine.parent / "hf", progress=True)
  assert capfd.readouterr() == ("", "")
  assert logging.getLogger("absl").level != logging.ERROR


# Faults of the folder.


def test_a_missing_folder(tmp_path):
  assert f"{tmp_path / 'absent'} is missing" in refusal(tmp_path / "absent")


def test_a_file_in_place_of_a_folder(tmp_path):
  (tmp_path / "model").touch()
  assert f"{tmp_path / 'model'} is a file" in refusal(tmp_path / "model")


def test_an_empty_folder(tmp_path):
  assert f"{tmp_path} is empty" in refusal(tmp_path)


def test_a_folder_without_a_config(converted):
  (converted / "config.json").unlink()
  assert f"{converted / 'config.json'} is missing" in refusal(converted)


@pytest.mark.parametrize("dtype", ["int8", "float64", "f32", "nonsense", jnp.int32])
def test_a_dtype_that_is_not_supported(pristine, dtype):
  assert "is not supported; use one of bfloat16, float16, float32" in refusal(pristine, dtype=dtype)


# Faults of the checkpoint.


def test_every_lost_or_cut_file_is_noticed(pristine, tmp_path):
  names = sorted(file.relative_to(pristine) for file in (pristine / "params").rglob("*") if file.is_file())
  assert len(names) > 20
  for name in names:
    folder = shutil.copytree(pristine, tmp_path / "copy")
    (folder / name).unlink()
    assert f"{folder / name} is missing; convert the model again" in refusal(folder)
    shutil.copyfile(pristine / name, folder / name)
    truncate(folder / name, 1)
    assert f"{folder / name} is damaged" in refusal(folder)
    shutil.rmtree(folder)


def test_an_empty_checkpoint(converted):
  shutil.rmtree(converted / "params")
  (converted / "params").mkdir()
  assert f"{converted / 'params' / 'file_sizes.json'} is missing" in refusal(converted)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1', '"text"'])
def test_a_damaged_list_of_files(converted, text):
  (converted / "params" / "file_sizes.json").write_text(text)
  assert f"{converted / 'params' / 'file_sizes.json'} is damaged" in refusal(converted)


def test_damage_that_keeps_the_sizes_is_noticed_in_the_metadata(converted):
  metadata = converted / "params" / "_METADATA"
  metadata.write_bytes(b"x" * metadata.stat().st_size)
  assert f"{converted / 'params'} is damaged" in refusal(converted)


def test_damage_that_keeps_the_sizes_is_noticed_in_an_arrays_header(converted):
  header = converted / "params" / "layers.mlp.up_proj.kernel" / ".zarray"
  header.write_bytes(header.read_bytes().replace(b'"<f4"', b'"<f8"'))  # asks for twice the bytes
  assert f"layers.mlp.up_proj.kernel in {converted / 'params'} is damaged" in refusal(converted)


@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_size": 16}, "embed.embedding in {params} has shape [40, 12], but config.json asks for [40, 16]"),
    ({"num_hidden_layers": 4},
     "layers.attention.k_proj.kernel in {params} has shape [3, 12, 8], but config.json asks for [4, 12, 8]"),
    ({"vocab_size": 41}, "embed.embedding in {params} has shape [40, 12], but config.json asks for [41, 12]"),
    ({"attention_bias": True}, "lacks layers.attention.k_proj.bias"),
    ({"tie_word_embeddings": True}, "{params} holds lm_head.embedding, which config.json has no place for"),
])
def test_a_config_of_another_model(converted, changes, words):
  edit_json(converted / "config.json", **changes)
  message = refusal(converted)
  assert words.format(params=converted / "params") in message
  assert "use the config.json of this model" in message


def test_weights_too_large_for_float16(tmp_path):
  tensors = hf_tensors(hf_config())
  tensors["model.norm.weight"][0] = 1e6
  source = write_folder(tmp_path / "hf", tensors=tensors)
  target = convert(source, tmp_path / "converted", progress=False)
  for folder in (source, target):
    assert "norm.weight does not fit float16" in refusal(folder, dtype="float16")


def test_nothing_is_left_on_another_device(pristine):
  devices = {device for leaf in jax.tree.leaves(nnx.state(load_model(pristine))) for device in leaf.devices()}
  assert len(devices) == 1
