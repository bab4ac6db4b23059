"""Head profiles: the file, what is refused, and the bias against an oracle."""

import json

import numpy as np
import pytest
import safetensors.numpy

from kvc_jax.errors import InputError
from kvc_jax.eviction.compression import Compression
from kvc_jax.eviction.profile import HeadProfile
from kvc_jax.eviction.score import HeldKVs
from kvc_jax.eviction.score_full import FullAttention
from kvc_jax.eviction.score_head_bias import HeadBias
from kvc_jax.eviction.score_key_norm import KeyNorm
from kvc_jax.eviction.score_snapkv import SnapKV
from kvc_jax.eviction.score_tova import TOVA

LAYERS, HEADS, BINS = 2, 3, 4


def _profile(seed=0, **options):
  return HeadProfile(np.random.default_rng(seed).uniform(0, 1, (LAYERS, HEADS, BINS)), **options)


def test_it_comes_back_from_its_file(tmp_path):
  profile, path = _profile(about={"rate": "8"}), tmp_path / "p.safetensors"
  profile.save(path)
  again = HeadProfile.load(path)
  assert again == profile
  assert hash(again) == hash(profile)
  assert again.about == {"rate": "8"}
  assert again != _profile(1)
  assert Compression(rate=2, allocation=again) == Compression(rate=2, allocation=profile)


def test_weights_are_relative_and_positive():
  shares = np.zeros((1, 3, 2))
  shares[0, 0], shares[0, 1] = (0.2, 0.4), (0.6, 0.6)
  np.testing.assert_allclose(HeadProfile(shares).weights, [[1.0, 2.0, 1e-3]], rtol=1e-6)


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: None, "is missing; make a head profile"),
    (lambda path: path.write_text("{}"), "cannot be read as a head profile"),
    (lambda path: path.write_bytes(b"\xff" * 100), "cannot be read as a head profile"),
    (lambda path: path.mkdir(), "cannot be read as a head profile"),
    (lambda path: safetensors.numpy.save_file({"shares": np.ones((1, 1, 1), np.float32)}, path), "is no head profile"),
    (lambda path: _write(path, np.ones((2, 2), np.float32)), "give .layers, KV heads, bins."),
    (lambda path: _write(path, np.full((1, 1, 1), np.nan, np.float32)), "numbers from 0 to 1"),
    (lambda path: _write(path, np.zeros((1, 1, 1), np.float32)), "no head keeps anything"),
    (lambda path: _write(path, np.full((1, 1, 1), 2, np.float32)), "numbers from 0 to 1"),
    (lambda path: _write(path, np.ones((1, 1, 1), np.int32)), "shares of dtype I32, not F32"),
    (lambda path: _write_fp8(path), "shares of dtype F8_E4M3, not F32"),
])
def test_a_wrong_file_is_refused_in_one_line(tmp_path, write, message):
  path = tmp_path / "p.safetensors"
  write(path)
  with pytest.raises(InputError, match=message) as e:
    HeadProfile.load(path)
  assert str(path) in str(e.value)
  assert "\n" not in str(e.value)


def _write(path, shares):
  safetensors.numpy.save_file({"shares": shares}, path, metadata={"format": "kvc head profile 1"})


def _write_fp8(path):
  """By hand: safetensors' NumPy side cannot."""
  shares = {"dtype": "F8_E4M3", "shape": [1, 1, 2], "data_offsets": [0, 2]}
  header = json.dumps({"__metadata__": {"format": "kvc head profile 1"}, "shares": shares}).encode()
  path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x38\x30")


def test_a_cut_file_is_refused(tmp_path):
  path = tmp_path / "p.safetensors"
  _profile().save(path)
  data = path.read_bytes()
  path.write_bytes(data[:-8])
  with pytest.raises(InputError, match="cannot be read as a head profile"):
    HeadProfile.load(path)
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
  assert header["__metadata__"]["format"] == "kvc head profile 1"


def test_a_folder_that_is_missing_is_refused(tmp_path):
  with pytest.raises(InputError, match="cannot write"):
    _profile().save(tmp_path / "no" / "p.safetensors")


def test_a_model_of_another_shape_is_refused():
  _profile().check_fits(LAYERS, HEADS)
  with pytest.raises(InputError, match="for 2 layers of 3 KV heads, but the model has 5 of 4"):
    _profile().check_fits(5, 4)


def _held(rng):
  scores = rng.random((2, LAYERS, HEADS, 12)).astype(np.float32)
  positions = np.stack([np.stack([[rng.permutation(20)[:12] for _ in range(HEADS)] for _ in range(LAYERS)])] * 2)
  tokens = np.array([20, 20])
  evictable = (positions >= 2) & (positions < 16)
  return HeldKVs(scores, positions.astype(np.int32), tokens, np.zeros(2, np.int32), evictable=evictable)


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
def test_a_bias_multiplies_by_the_relative_share_of_the_place(weight):
  """Oracle: place = part of the way from the first to the last evictable position of the sequence."""
  kvs, profile = _held(np.random.default_rng(3)), _profile()
  found = HeadBias(rule=FullAttention(), profile=profile, weight=weight).value(kvs)
  first, last = kvs.positions[kvs.evictable].min(), kvs.positions[kvs.evictable].max()
  missed = 0
  for index in np.ndindex(kvs.scores.shape):
    if not kvs.evictable[index]:
      continue
    _, layer, head, _ = index
    part = int((kvs.positions[index] - first) * BINS // (last + 1 - first))
    factor = (profile.shares[layer, head, part] / profile.shares.mean()) ** weight
    assert found[index] == pytest.approx(kvs.scores[index] * factor, rel=1e-4)
    swapped = (profile.shares[layer, head - 1, part] / profile.shares.mean()) ** weight  # a mutation
    missed += abs(found[index] - kvs.scores[index] * swapped) > 1e-2 * kvs.scores[index]
  assert missed > 0 or weight == 0


def test_a_bias_observes_as_its_rule_does():
  rule = SnapKV(queries=9, pooling=5, pool="mean", decode_every=3)
  biased = HeadBias(rule=rule, profile=_profile())
  for name in ("observed", "queries", "power", "buffer", "pooling", "pool", "pools_observed", "decode_every"):
    assert getattr(biased, name) == getattr(rule, name)
  assert hash(biased) == hash(HeadBias(rule=rule, profile=_profile()))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: HeadBias(rule=KeyNorm(), profile=_profile()), "KeyNorm does not"),
    (lambda: HeadBias(rule=TOVA(), profile=_profile()), "TOVA does not"),
    (lambda: HeadBias(rule="full", profile=_profile()), "no scoring rule"),
    (lambda: HeadBias(rule=FullAttention(), profile="p"), "give a HeadProfile"),
    (lambda: HeadBias(rule=FullAttention(), profile=_profile(), weight=-1), "weight of a head bias is -1"),
    (lambda: Compression(rate=2, allocation=_profile(), safeguard=0.2), "heads compete"),
])
def test_what_does_not_go_together_is_refused(make, message):
  with pytest.raises(InputError, match=message):
    make()
