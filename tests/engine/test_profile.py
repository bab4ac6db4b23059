"""Head profiles made from prompts, and requests that use them; budgets by the scores' sum."""

import dataclasses

import numpy as np
import oracles
import pytest

from kvc_jax import LLM, Compression, FullAttention, HeadBias, HeadProfile, InputError, SamplingParams, measure_profile
from kvc_jax.cli import main
from kvc_jax.serving.api_error import ApiError
from kvc_jax.serving.protocol import Defaults, parse_call

PROMPTS = [
    "Once upon a time, there was a little dog named Tim. He liked to play. " * 2, "The sun was hot. Lily ran. " * 6]
BASE = Compression(rate=4, window=6, sinks=2, keep=[(8, 11)], scoring=FullAttention(buffer=2))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
MODEL = "assets/stories260K"


@pytest.fixture(scope="module")
def llm():
  return LLM(MODEL, block_size=4, max_num_seqs=2, chunk_size=32, dtype="float32")


@pytest.fixture(scope="module")
def profile(llm):
  return measure_profile(llm, PROMPTS, BASE, bins=4)


def test_shares_are_what_the_receipts_say(llm, profile):
  """The oracle goes through positions one by one."""
  kept, seen = np.zeros(profile.shares.shape), np.zeros(4)
  for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=1), BASE, return_positions=True):
    tokens = output.receipt.tokens_seen
    held = output.receipt.positions
    for position in range(2, tokens - 6):
      if 8 <= position < 11:
        continue
      part = (position - 2) * 4 // (tokens - 8)
      seen[part] += 1
      kept[..., part] += (held == position).any(axis=-1)
  np.testing.assert_allclose(profile.shares, kept / seen, rtol=1e-6)
  assert profile.shares.std() > 0.05
  assert profile.about["prompts"] == "2"
  assert profile.about["model"] == llm.engine.fingerprint


def test_a_profile_gives_heads_their_budgets(llm, profile):
  """Behind the prompt each head holds exactly its blocks: 11 tokens are protected, the rest goes by weight."""
  static = dataclasses.replace(BASE, allocation=profile)
  for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=1), static):
    tokens = output.receipt.tokens_seen
    floor, budget = -(-11 // 4), -(-static.cache_tokens(tokens) // 4)
    expected = floor + oracles.weighted_blocks(budget - floor, -(-tokens // 4) - floor, profile.weights)
    assert budget > floor
    np.testing.assert_array_equal(-(-output.receipt.kvs_kept // 4), expected)
    assert np.ptp(expected) >= 2
    assert output.receipt.blocks_held == budget * expected.size


def test_a_bias_shifts_the_choice(llm, profile):
  kept = [
      llm.generate(PROMPTS[0], GREEDY, dataclasses.replace(
          BASE, scoring=HeadBias(rule=BASE.scoring, profile=profile, weight=weight)))[0].receipt.kvs_kept
      for weight in (0.0, 4.0)]
  plain = llm.generate(PROMPTS[0], GREEDY, BASE)[0].receipt.kvs_kept
  np.testing.assert_array_equal(kept[0], plain)
  assert np.corrcoef(kept[1].ravel(), profile.weights.ravel())[0, 1] > np.corrcoef(
      plain.ravel(), profile.weights.ravel())[0, 1]


def test_mass_and_safeguard(llm):
  """A larger share of the scores needs more blocks; without any other budget."""
  held = [
      llm.generate(PROMPTS[0], GREEDY, Compression(mass=mass, window=6, scoring=FullAttention(power=1)))[0].receipt
      for mass in (0.6, 0.9, 0.99)]
  assert held[0].blocks_held < held[1].blocks_held < held[2].blocks_held < held[2].blocks_uncompressed
  guarded = llm.generate(PROMPTS[0], GREEDY, dataclasses.replace(BASE, rate=3, safeguard=1.0))[0].receipt
  assert np.ptp(guarded.kvs_kept) == 0
  assert llm.free_blocks == llm.config.num_blocks - 1


def test_what_cannot_be_calibrated_is_refused(llm):
  with pytest.raises(InputError, match="prompt 0 has 4 tokens, but 8 are protected and 16 parts"):
    measure_profile(llm, [[1, 2, 3, 4]], BASE)
  with pytest.raises(InputError, match="calibrate needs prompts"):
    measure_profile(llm, [], BASE)
  for allocation in ("layer", "head", "pyramid", HeadProfile(np.ones((5, 4, 1)))):
    with pytest.raises(InputError, match="leave the allocation at 'all'"):
      measure_profile(llm, PROMPTS, dataclasses.replace(BASE, allocation=allocation))
  wrong = HeadProfile(np.ones((2, 2, 1)))
  for compression in (Compression(rate=2, allocation=wrong),
                      Compression(rate=2, scoring=HeadBias(rule=FullAttention(), profile=wrong))):
    with pytest.raises(InputError, match="for 2 layers of 2 KV heads, but the model has 5 of 4"):
      llm.generate(PROMPTS[0], GREEDY, compression)


def test_a_request_with_a_profile_cannot_be_saved(llm, profile, tmp_path):
  params = dataclasses.replace(GREEDY, max_tokens=64)
  request = llm.engine.add(PROMPTS[0], params, dataclasses.replace(BASE, allocation=profile))
  while not llm.engine.step():
    pass
  with pytest.raises(InputError, match="only allocations by name can"):
    llm.engine.save(request, tmp_path / "r.safetensors")
  assert llm.engine.cancel(request)


def test_the_command_makes_a_profile_that_others_take(tmp_path, capsys):
  path = str(tmp_path / "p.safetensors")
  options = ["--rate", "4", "--window", "6", "--block-size", "4", "--prompt", PROMPTS[0]]
  assert main(["calibrate", MODEL, *options, "--bins", "3", "-o", path]) == 0
  assert "wrote" in capsys.readouterr().out
  assert HeadProfile.load(path).shares.shape == (5, 4, 3)
  generate = ["generate", MODEL, *options, "--max-tokens", "2", "--quiet", "--head-profile", path]
  assert main(generate) == 0
  assert main([*generate, "--head-bias", "1", "--allocation", "layer"]) == 0
  for extra, message in ((["--allocation", "layer"], "goes with --allocation profile"),
                         (["--allocation", "profile", "--head-bias", "1"], "leaves no choice")):
    assert main([*generate, *extra]) == 2
    assert message in capsys.readouterr().err
  assert main(["calibrate", "nowhere", "--rate", "2", "--allocation", "head", "--prompt", "a"]) == 2
  assert "with allocation 'head' heads do not all compete" in capsys.readouterr().err
  assert main(["calibrate", MODEL, "--prompt", "a"]) == 2
  assert "give --rate" in capsys.readouterr().err
  assert main(["calibrate", MODEL, "--rate", "2", "--prompt", "a", "-o", str(tmp_path / "no" / "p")]) == 2
  assert "in a folder that exists" in capsys.readouterr().err


def test_a_server_has_its_own_profile(profile):
  def asked(own):
    fields = {"model": "m", "prompt": "a", "rate": 2, "allocation": "profile"}
    defaults = Defaults(model="m", max_model_len=9, interval=4, compression=own)
    return parse_call("completions", fields, defaults).compression

  assert asked(dataclasses.replace(BASE, allocation=profile)).allocation == profile
  for own in (None, BASE):
    with pytest.raises(ApiError, match="this server has no head profile; give one of all, layer, head, pyramid"):
      asked(own)
