"""The engine on a GPU against the CPU: run with `pytest -m gpu` on a GPU machine.

The heads of stories260K (8 numbers) are too small for the kernels, so it takes XLA on both sides. recall-7m
and models with random weights take the kernels on the GPU.
"""

import contextlib
import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import stepwise
from hf_folders import hf_config, hf_tensors, write_folder

from kvc_jax import LLM, Compression, FullAttention, RandomScore, SamplingParams
from kvc_jax.cache.state import check_invariants
from kvc_jax.engine.batch import Batch
from kvc_jax.engine.sequence import Sequence
from kvc_jax.evaluation.haystack import held_out_sentences
from kvc_jax.evaluation.recall import SampleBuilder, score
from kvc_jax.evaluation.runner import greedy_params
from kvc_jax.kernels import backends

ASSETS = pathlib.Path(__file__).parents[2] / "assets"
STORIES, RECALL = ASSETS / "stories260K", ASSETS / "recall-7m"
LONG = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 5
RATES = (1.0, 2.0, 4.0, 8.0)
GREEDY = SamplingParams(temperature=0, max_tokens=48)

# Root mean square of logits of order 1, GPU against CPU, both in bfloat16.
BF16_TOLERANCE = 0.05

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning"),
]


@contextlib.contextmanager
def _cpu():
  with jax.default_device(jax.devices("cpu")[0]):
    assert backends.device_capability() is None
    yield


def _on_both(run):
  """What `run` gives on the GPU and on the CPU."""
  on_gpu = run()
  with _cpu():
    return on_gpu, run()


def test_story_on_the_gpu_is_the_reference_text():
  llm = LLM(STORIES, block_size=4, max_num_seqs=1, kv_cache_memory_bytes=1 << 20)
  greedy = SamplingParams(temperature=0, max_tokens=200)
  expected = (STORIES / "expected_200_steps.txt").read_text(encoding="utf-8")
  for compression in (None, Compression(rate=1, interval=8)):
    assert llm.generate("", greedy, compression)[0].text == expected


def _generate(folder, rates, scoring=None):
  """Token ids, KVs kept by each head and positions of three prompts at each rate."""
  llm = LLM(folder, dtype="float32", block_size=16, max_num_seqs=2, num_blocks=4096, chunk_size=64, max_model_len=512)
  found = []
  for rate in rates:
    compression = Compression(rate=rate, interval=8, **({} if scoring is None else {"scoring": scoring}))
    outputs = llm.generate([LONG, LONG[60:300], "The dog was sad."], GREEDY, compression, return_positions=True)
    found += [(o.token_ids, o.receipt.kvs_kept.tolist(), o.receipt.positions.tolist()) for o in outputs]
  check_invariants(llm.engine.batch.state)
  return found


@pytest.mark.parametrize("rate", RATES)
def test_shipped_model_gives_the_same_text_as_on_the_cpu(rate):
  on_gpu, on_cpu = _on_both(lambda: _generate(STORIES, (rate,)))
  assert on_gpu == on_cpu


def _answers(rate):
  """Token ids of answers about texts of 1,024 tokens, and whether each is right."""
  llm = LLM(RECALL, dtype="float32", max_num_seqs=2, num_blocks=4096, chunk_size=256)
  assert _takes_kernels(llm) == (backends.device_capability() is not None)
  builder = SampleBuilder(held_out_sentences(), llm.tokenizer)
  samples = [builder.sample("multi_key", 1024, number, seed=0) for number in range(4)]
  outputs = llm.generate([s.prompt for s in samples], [greedy_params(s) for s in samples], Compression(rate=rate))
  right = [score("multi_key", o.text, s.references[0]) for o, s in zip(outputs, samples, strict=True)]
  return [output.token_ids for output in outputs], right


@pytest.mark.parametrize("rate", RATES)
def test_the_model_that_finds_facts_gives_the_same_answers_as_on_the_cpu(rate):
  on_gpu, on_cpu = _on_both(lambda: _answers(rate))
  assert on_gpu == on_cpu
  assert on_gpu[1] == [1.0] * 4


def _random_model(folder, head_dim, group):
  """A model whose shape the kernels take; weights small enough for smooth attention."""
  config = hf_config(
      vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2 * group,
      num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=1024, tie_word_embeddings=False)
  tensors = {key: value if "norm" in key else value * np.float32(0.06) for key, value in hf_tensors(config).items()}
  tensors["model.embed_tokens.weight"] *= np.float32(16)
  return write_folder(folder / "model", config, tensors)


def _takes_kernels(llm):
  config = llm.engine.model.config
  shape = backends.shape_of(llm.engine.batch.state.kv, config.num_heads // config.num_kv_heads)
  return backends.choose("paged_decode", shape) != backends.XLA


@pytest.mark.parametrize(("head_dim", "group"), [(64, 4), (128, 2)])
def test_kernels_give_the_same_text_as_the_cpu(tmp_path, head_dim, group):
  folder = _random_model(tmp_path, head_dim, group)
  on_gpu, on_cpu = _on_both(lambda: _generate(folder, RATES, FullAttention()))
  assert on_gpu == on_cpu


def _logits(folder, dtype, compression, tokens, *, spoil=lambda state: state):
  """Logits behind the prompt and behind each of `tokens`, the same on every device."""
  llm = LLM(folder, dtype=dtype, block_size=16, max_num_seqs=2, num_blocks=4096, chunk_size=64, max_model_len=512)
  batch = Batch(llm.engine.model, llm.config, 64)
  sequence = Sequence(
      request_id=0, prompt=llm.tokenizer.encode(LONG), params=GREEDY, compression=compression, output=None)
  logits = [np.asarray(stepwise.prefill(batch, sequence))]
  if compression:
    stepwise.compress(batch, sequence)
  batch.state = spoil(batch.state)
  for token in tokens:
    sequence.token_ids.append(token)
    step, ok = stepwise.decode(batch, [sequence])
    assert ok[sequence.slot]
    logits.append(np.asarray(step[sequence.slot]))
  return np.array(logits), _takes_kernels(llm)


TOKENS = np.random.default_rng(0).integers(3, 500, 24).tolist()


def _rms(difference):
  return float(np.sqrt(np.mean(difference**2)))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("head_dim", "group"), [(64, 4), (128, 2)])
def test_bfloat16_logits_of_the_kernels_are_those_of_the_cpu(tmp_path, head_dim, group, rate):
  """By a rule that ignores attention: rounding decides between KVs of almost equal worth."""
  folder = _random_model(tmp_path, head_dim, group)
  (on_gpu, by_kernels), (on_cpu, on_cpu_by_kernels) = _on_both(
      lambda: _logits(folder, "bfloat16", Compression(rate=rate, scoring=RandomScore()), TOKENS))
  assert by_kernels
  assert not on_cpu_by_kernels
  assert np.isfinite(on_gpu).all()
  assert _rms(on_gpu - on_cpu) < BF16_TOLERANCE


def test_the_logits_comparison_can_fail(tmp_path):
  """Zeroed values, and tables whose heads are swapped."""
  folder = _random_model(tmp_path, 128, 2)
  with _cpu():
    expected, _ = _logits(folder, "bfloat16", None, TOKENS)
  for spoil in (
      lambda state: dataclasses.replace(state, kv=state.kv.at[:, 1].set(0)),
      lambda state: dataclasses.replace(state, tables=state.tables[:, :, ::-1])):
    wrong, _ = _logits(folder, "bfloat16", None, TOKENS, spoil=spoil)
    assert _rms((wrong - expected)[1:]) > BF16_TOLERANCE
